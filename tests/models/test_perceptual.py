"""LPIPS against the package of its authors, the feature distance against NumPy, and what both are to be."""

import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from scipy.ndimage import gaussian_filter
from skimage import data

from quick_compile import jit
from vgpt_jax import UserError
from vgpt_jax.data.transforms import resize_short_side
from vgpt_jax.models.perceptual import LPIPS, PERCEPTUAL, EfficientNetDistance, FeatureDistance, unit_vectors
from vgpt_jax.pretrained.load import load_perceptual


def picture(size=64):
    """A photograph ``[size, size, 3]`` float32 in 0..1."""
    return resize_short_side(data.astronaut(), size).astype(np.float32) / 255.0


def to_torch(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def from_torch(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def measure(module):
    """The compiled function ``(images, references) -> distances, gradient of their sum`` of a module."""
    graph, state = nnx.split(module)

    @jit
    def run(state, images, references):
        distances, pullback = jax.vjp(lambda x: nnx.merge(graph, state)(x, references), images)
        return distances, pullback(jnp.ones_like(distances))[0]

    return partial(run, state)


# LPIPS


def torch_vgg16(pretrained=False):
    """What torchvision's function of this name returns, with weights that keep the variance."""
    layers, width = [], 3
    for channels in (64, 64, None, 128, 128, None, 256, 256, 256, None, 512, 512, 512, None, 512, 512, 512, None):
        if channels is None:
            layers.append(torch.nn.MaxPool2d(2))
            continue
        conv = torch.nn.Conv2d(width, channels, 3, padding=1)
        torch.nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        torch.nn.init.normal_(conv.bias, std=0.1)
        layers += [conv, torch.nn.ReLU(inplace=True)]
        width = channels
    return SimpleNamespace(features=torch.nn.Sequential(*layers))


@pytest.fixture(scope="module")
def peer():
    """The package's LPIPS with its own heads, over a VGG16 of noise."""
    torchvision = ModuleType("torchvision")
    torchvision.models = SimpleNamespace(vgg16=torch_vgg16)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", torchvision)  # the real one does not import everywhere
        import lpips

    return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)


def ours_like(peer, value_range):
    """Our LPIPS with the peer's weights."""
    module = nnx.eval_shape(lambda: LPIPS(value_range=value_range, rngs=nnx.Rngs(0)))
    convs = [conv for stage in module.network.stages for conv in stage]
    theirs = [layer for layer in peer.net.modules() if isinstance(layer, torch.nn.Conv2d)]
    for conv, layer in zip(convs, theirs, strict=True):
        conv.kernel = nnx.Param(jnp.asarray(layer.weight.detach().permute(2, 3, 1, 0).numpy()))
        conv.bias = nnx.Param(jnp.asarray(layer.bias.detach().numpy()))
    module.heads = nnx.List([nnx.Param(jnp.asarray(lin.model[1].weight.detach().numpy().ravel())) for lin in peer.lins])
    return module


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0)])
def test_lpips_and_its_gradient_are_those_of_its_package(peer, value_range):
    low, high = value_range
    real = np.stack([picture(32), picture(32)[::-1]])
    recon = real + 0.2 * np.random.default_rng(0).normal(size=real.shape).astype(np.float32)  # beyond 0..1: not clipped
    theirs = (2.0 * to_torch(recon) - 1.0).requires_grad_()
    expected = peer(theirs, 2.0 * to_torch(real) - 1.0)
    expected.sum().backward()
    expected_gradient = from_torch(theirs.grad) * 2.0 / (high - low)

    run = measure(ours_like(peer, value_range))
    distances, gradient = run(low + (high - low) * recon, low + (high - low) * real)
    assert distances.shape == (2,)
    assert distances.dtype == jnp.float32
    np.testing.assert_allclose(distances, expected.detach().numpy().ravel(), atol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-4 * np.abs(expected_gradient).max())  # of 1e-3
    assert np.abs(gradient).max() > 1e-4
    assert distances.min() > 0.01


def test_lpips_has_a_gradient_where_features_vanish(peer):
    module = ours_like(peer, (0.0, 1.0))
    last = module.network.stages[4][2]
    last.bias[...] = jnp.full(512, -1e4)  # relu5_3 is zero everywhere
    real = picture(32)[None]
    distances, gradient = measure(module)(real, 1.0 - real)
    assert np.isfinite(distances).all()
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 1e-4  # from the four other maps


def test_unit_vectors_and_their_gradient():
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    x[1] = 0.0
    cotangent = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)

    @jit
    def run(x, cotangent):
        value, pullback = jax.vjp(unit_vectors, x)
        return value, pullback(cotangent)[0]

    value, gradient = run(x, cotangent)
    theirs = torch.from_numpy(x).requires_grad_()
    expected = theirs / (theirs.square().sum(1, keepdim=True).sqrt() + 1e-10)
    expected.backward(torch.from_numpy(cotangent))
    np.testing.assert_allclose(value, expected.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(np.delete(gradient, 1, 0), np.delete(theirs.grad.numpy(), 1, 0), atol=1e-6)
    np.testing.assert_array_equal(gradient[1], np.zeros(5))


# The feature distance


@pytest.fixture(scope="module")
def feature_distance():
    return load_perceptual("efficientnet", (0.0, 1.0))


@pytest.fixture(scope="module")
def run(feature_distance):
    return measure(feature_distance)


def test_the_feature_distance_by_numpy(feature_distance, run):
    pair = np.stack([picture(), picture()[:, ::-1] ** 2] * 2)
    graph, state = nnx.split(feature_distance.network)
    features = jit(lambda state, x: nnx.merge(graph, state).features(x))
    expected = 0.0
    for maps in features(state, (255.0 * pair - 127.0) / 128.0):
        first, second = np.asarray(maps, np.float64)[:2]
        first, second = (m / np.linalg.norm(m, axis=-1, keepdims=True) for m in (first, second))
        expected += np.square(first - second).sum(-1).mean() / 5.0
    np.testing.assert_allclose(run(pair, pair[::-1])[0], [expected] * 4, atol=1e-5)
    assert 0.1 < expected < 4.0


def test_it_grows_with_noise_and_with_blur(run):
    real = np.stack([picture()] * 4)
    noise = np.random.default_rng(0).normal(size=picture().shape).astype(np.float32)
    noisy = np.stack([picture() + strength * noise for strength in (0.0, 0.02, 0.05, 0.2)])
    blurred = np.stack([gaussian_filter(picture(), (sigma, sigma, 0)) for sigma in (0.0, 0.5, 1.0, 3.0)])
    for images in (noisy, blurred):
        distances, _ = run(images, real)
        assert abs(distances[0]) < 1e-6
        assert (np.diff(distances) > 0.01).all()
        assert distances[3] < 4.0


def test_its_gradient_leads_to_the_reference(run):
    real = np.stack([picture()] * 4)
    images = np.clip(real + 0.1 * np.random.default_rng(0).normal(size=real.shape), 0.0, 1.0).astype(np.float32)
    distances, gradient = run(images, real)
    unit = gradient / np.linalg.norm(gradient.reshape(4, -1), axis=1)[:, None, None, None]
    nearer, _ = run(images - unit, real)  # the noise is of length 11
    assert (nearer < 0.98 * distances).all()


def test_gradients_are_finite_where_a_picture_is_even_or_equal(run):
    real = np.stack([picture(), picture(), np.zeros_like(picture()), np.full_like(picture(), 0.5)])
    images = np.stack([np.zeros_like(picture()), picture(), np.zeros_like(picture()), np.ones_like(picture())])
    distances, gradient = run(images, real)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(distances[1:3], 0.0, atol=1e-6)
    np.testing.assert_allclose(gradient[1:3], 0.0, atol=1e-4)
    assert np.abs(gradient[0]).max() > 1e-3


# What they have in common, on a small network


class TwoMaps(nnx.Module):
    def __init__(self, rngs):
        self.convs = nnx.List([nnx.Conv(3, 6, (3, 3), rngs=rngs), nnx.Conv(6, 4, (3, 3), strides=2, rngs=rngs)])

    def features(self, x):
        first = self.convs[0](x)
        return first, self.convs[1](jnp.tanh(first))


SCALE, SHIFT, HEAD = (2.0, 3.0, 4.0), (-1.0, 0.5, 0.0), (0.5, 0.0, 2.0, 1.0)


def small_distance(value_range=(0.0, 1.0)):
    heads = [0.25, nnx.Param(jnp.array(HEAD))]
    return FeatureDistance(TwoMaps(nnx.Rngs(0)), heads, SCALE, SHIFT, value_range)


@pytest.fixture(scope="module")
def pair():
    return np.random.default_rng(0).uniform(-0.2, 1.2, size=(2, 2, 8, 8, 3)).astype(np.float32)  # beyond 0..1


def test_the_distance_by_numpy(pair):
    module = small_distance()
    expected = np.zeros(2)
    first, second = (module.network.features(x * np.array(SCALE) + np.array(SHIFT)) for x in pair)
    for ours, theirs, head in zip(first, second, (0.25, HEAD), strict=True):
        ours, theirs = (np.asarray(m) / np.linalg.norm(m, axis=-1, keepdims=True) for m in (ours, theirs))
        expected += (np.array(head) * (ours - theirs) ** 2).sum(-1).mean((1, 2))
    np.testing.assert_allclose(module(*pair), expected, atol=1e-5)
    np.testing.assert_allclose(module.distance_to(pair[0], module.features(pair[1])), expected, atol=1e-5)
    assert (module(*pair) > 0.1).all()


def test_the_value_range_is_that_of_the_images(pair):
    expected, expected_gradient = measure(small_distance())(*pair)
    distances, gradient = measure(small_distance((-3.0, 1.0)))(*(4.0 * pair - 3.0))
    np.testing.assert_allclose(distances, expected, atol=1e-5)
    np.testing.assert_allclose(4.0 * gradient, expected_gradient, atol=1e-5)
    assert np.abs(gradient).max() > 1e-3


def test_gradients_reach_the_images_only(pair):
    graph, state = nnx.split(small_distance())

    def total(state, images, references):
        module = nnx.merge(graph, state)
        return jnp.sum(module(images, references) + module.distance_to(images, module.features(references)))

    weights, first, second = jit(jax.grad(total, argnums=(0, 1, 2)))(state, *pair)
    assert len(jax.tree.leaves(weights)) == 5
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(weights))
    assert np.any(first)
    assert not np.any(second)


@pytest.mark.parametrize("name", PERCEPTUAL)
def test_images_of_any_dtype_give_float32(name):
    module = nnx.eval_shape(lambda: PERCEPTUAL[name](rngs=nnx.Rngs(0)))
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.bfloat16)
    distances = nnx.eval_shape(lambda module, image: module(image, image), module, image)
    assert distances.shape == (2,)
    assert distances.dtype == jnp.float32


@pytest.mark.parametrize("kind", [LPIPS, EfficientNetDistance])
def test_an_empty_value_range_is_refused(kind):
    with pytest.raises(UserError, match="greatest value of value_range is 0.0, but must be above 0.0"):
        nnx.eval_shape(lambda: kind(value_range=(0, 0), rngs=nnx.Rngs(0)))
