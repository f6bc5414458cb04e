import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm

from quick_compile import jit
from vgpt_jax import UserError
from vgpt_jax.losses import r1_penalty
from vgpt_jax.models.patchgan import PatchGAN
from vgpt_jax.models.spectral_norm import SpectralConv, SpectralState
from vgpt_jax.training.sharding import make_mesh, shard_batch


def make(**options):
    """A discriminator with weights by NumPy: JAX would compile an initialiser for every shape."""
    arguments = {"ndf": 4, "num_layers": 2} | options
    graph, state = nnx.split(nnx.eval_shape(lambda: PatchGAN(**arguments, rngs=nnx.Rngs(0))))
    rng, filled = np.random.default_rng(0), []
    for path, variable in nnx.to_flat_state(state):
        value = rng.normal(size=variable.shape)
        if path[-1] in ("u", "v"):
            value = value / np.linalg.norm(value)
        else:
            spread = {"kernel": np.prod(variable.shape[:-1]) ** -0.5, "bias": 0.3, "scale": 0.3}[path[-1]]
            value = (path[-1] == "scale") + spread * value
        filled.append((path, variable.replace(jnp.asarray(value, variable.dtype))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def apply(discriminator, images):
    graph, state = nnx.split(discriminator)
    return jit(lambda state, images: nnx.merge(graph, state)(images))(state, images)


def logits_and_gradients(discriminator, images, cotangent):
    """The logits, and the gradients of their sum weighted by ``cotangent``: of the parameters, of the images."""
    graph, params, rest = nnx.split(discriminator, nnx.Param, ...)

    def weighted(params, images):
        logits = nnx.merge(graph, params, rest)(images)
        return jnp.sum(cotangent * logits), logits

    (_, logits), gradients = jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))(params, images)
    return logits, *gradients


# Parity with PyTorch


def to_torch(images):
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)


def from_torch(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def torch_patchgan(ndf, num_layers, norm):
    """The network as published, in PyTorch: BatchNorm2d in training mode."""
    normalise = {"batch": torch.nn.BatchNorm2d, "group": lambda c: torch.nn.GroupNorm(np.gcd(32, c), c)}.get(norm)
    layers = [torch.nn.Conv2d(3, ndf, 4, 2, 1), torch.nn.LeakyReLU(0.2)]
    channels = ndf
    for n in range(1, num_layers + 1):
        width = ndf * min(2**n, 8)
        stride = 2 if n < num_layers else 1
        layers.append(torch.nn.Conv2d(channels, width, 4, stride, 1, bias=normalise is None))
        layers += [normalise(width)] if normalise else []
        layers.append(torch.nn.LeakyReLU(0.2))
        channels = width
    return torch.nn.Sequential(*layers, torch.nn.Conv2d(channels, 1, 4, 1, 1)).train()


def pairs_of_tensors(ours, network):
    """(our variable, their parameter), of all convolutions and norms; ``ours`` has `PatchGAN`'s attributes."""
    convs = [m for m in network if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in network if isinstance(m, torch.nn.BatchNorm2d | torch.nn.GroupNorm)]
    for i, conv in enumerate(convs):
        yield ours["convs"][i]["kernel"], getattr(conv, "parametrizations", {"weight": conv})["weight"], "kernel"
        if conv.bias is not None:
            yield ours["convs"][i]["bias"], conv, "bias"
    for i, norm in enumerate(norms):
        yield ours["norms"][i]["scale"], norm, "weight"
        yield ours["norms"][i]["bias"], norm, "bias"


def their_tensor(module, name):
    if name == "kernel":
        return module.original if hasattr(module, "original") else module.weight
    return getattr(module, name)


def their_layout(array):
    return np.asarray(array).transpose(3, 2, 0, 1) if np.ndim(array) == 4 else np.asarray(array)


def load(network, discriminator):
    """Copies every parameter of ours into theirs."""
    params = nnx.state(discriminator, nnx.Param)
    pairs = list(pairs_of_tensors(params, network))
    assert len(pairs) == len(jax.tree.leaves(params)) == len(list(network.parameters()))
    with torch.no_grad():
        for ours, module, name in pairs:
            their_tensor(module, name).copy_(torch.from_numpy(their_layout(ours[...]).copy()))


def check_against(network, discriminator, images, atol=1e-5):
    """Logits and every gradient; gradients relative to the greatest of their tensor."""
    x = to_torch(images).requires_grad_()
    logits = network(x)
    cotangent = normal(9, *from_torch(logits).shape)
    (logits * to_torch(cotangent)).sum().backward()

    ours, params, image_gradient = logits_and_gradients(discriminator, images, cotangent)
    np.testing.assert_allclose(ours, from_torch(logits), atol=atol)
    assert np.std(ours) > 0.01
    compared = [(image_gradient, from_torch(x.grad))]
    for gradient, module, name in pairs_of_tensors(params, network):
        compared.append((their_layout(gradient[...]), their_tensor(module, name).grad.numpy()))
    for gradient, expected in compared:
        assert np.abs(expected).max() > 1e-4
        np.testing.assert_allclose(gradient, expected, atol=atol * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("norm", "num_layers", "size"),
    [("batch", 3, (32, 32)), ("batch", 2, (13, 18)), ("group", 2, (17, 12)), ("none", 1, (10, 7))],
    ids=str,
)
def test_pytorch_is_reproduced(norm, num_layers, size):
    discriminator = make(norm=norm, num_layers=num_layers)
    network = torch_patchgan(4, num_layers, norm)
    load(network, discriminator)
    check_against(network, discriminator, normal(1, 3, *size, 3))


def test_spectral_norm_matches_pytorch_on_the_same_vectors():
    discriminator = make(norm="batch", spectral_norm=True)
    network = torch_patchgan(4, 2, "batch")
    for conv, theirs in zip(discriminator.convs, [m for m in network if isinstance(m, torch.nn.Conv2d)], strict=True):
        torch_spectral_norm(theirs)
        parametrization = theirs.parametrizations.weight[0].eval()  # in training it would iterate first
        kernel_shape = conv.kernel[...].shape
        v = np.asarray(conv.v[...]).reshape(kernel_shape[:-1]).transpose(2, 0, 1)  # theirs is of [in, kh, kw]
        parametrization._u.copy_(torch.from_numpy(np.array(conv.u[...])))
        parametrization._v.copy_(torch.from_numpy(v.ravel().copy()))
    load(network, discriminator)
    # Random u and v make the sigmas small and the gradients large: the tolerance is relative to them.
    check_against(network, discriminator, normal(1, 3, 13, 18, 3), atol=2e-5)


def test_the_gradient_of_the_r1_penalty_matches_pytorch():
    discriminator, images = make(norm="batch", num_layers=1), normal(1, 3, 8, 9, 3)
    network = torch_patchgan(4, 1, "batch")
    load(network, discriminator)
    x = to_torch(images).requires_grad_()
    (slope,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    expected = slope.pow(2).sum(dim=(1, 2, 3)).mean()
    expected.backward()

    graph, params, rest = nnx.split(discriminator, nnx.Param, ...)
    penalty = jit(jax.value_and_grad(lambda params: r1_penalty(nnx.merge(graph, params, rest), images)))
    value, gradients = penalty(params)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    for gradient, module, name in pairs_of_tensors(gradients, network):
        theirs = their_tensor(module, name).grad
        # A bias after which there is no curvature has none in PyTorch, and zeros here.
        expected = np.zeros(their_layout(gradient[...]).shape) if theirs is None else theirs.numpy()
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(their_layout(gradient[...]), expected, atol=1e-5 * scale)


# Norms


def test_channels_grow_to_eight_times_the_first():
    discriminator = nnx.eval_shape(lambda: PatchGAN(ndf=8, num_layers=5, rngs=nnx.Rngs(0)))
    widths = [conv.out_features for conv in discriminator.convs]
    assert widths == [8, 16, 32, 64, 64, 64, 1]
    assert [conv.use_bias for conv in discriminator.convs] == [True, *[False] * 5, True]
    assert len(discriminator.norms) == 5


@pytest.mark.parametrize(("norm", "depends"), [("batch", True), ("group", False)])
def test_only_with_batch_norm_the_logits_depend_on_other_images(norm, depends):
    images = normal(1, 3, 12, 12, 3)
    discriminator = make(norm=norm)
    graph, state = nnx.split(discriminator)
    first = jit(jax.grad(lambda images: jnp.sum(nnx.merge(graph, state)(images)[0])))(images)
    assert np.abs(first[0]).max() > 1e-3
    assert (np.abs(first[1:]).max() > 1e-3) == depends


def test_statistics_are_those_of_the_global_batch():
    discriminator, images = make(norm="batch"), normal(1, 8, 12, 12, 3)
    cotangent = normal(2, 8, 1, 1, 1)
    expected = logits_and_gradients(discriminator, images, cotangent)
    batch = shard_batch(make_mesh(), {"images": images, "cotangent": cotangent})
    sharded = logits_and_gradients(discriminator, **batch)
    for ours, reference in zip(jax.tree.leaves(sharded), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-5)


def test_bfloat16_stays_near_float32():
    images = normal(1, 4, 24, 24, 3)
    logits, half = (apply(make(norm="batch", dtype=dtype), images) for dtype in (jnp.float32, jnp.bfloat16))
    assert half.dtype == jnp.float32
    error = np.linalg.norm(half - logits) / np.linalg.norm(logits)
    assert 1e-4 < error < 0.05  # the lower bound: it did compute in bfloat16


# Spectral norm


def test_a_forward_pass_changes_nothing_and_only_the_update_moves_the_vectors():
    discriminator = make(spectral_norm=True)
    graph, params, rest = nnx.split(discriminator, nnx.Param, ...)
    assert {type(variable) for _, variable in nnx.to_flat_state(rest)} == {SpectralState}
    assert not nnx.to_flat_state(nnx.split(make(), nnx.Param, ...)[2])  # without it there is nothing but parameters

    @jit
    def step(params, rest, images):
        discriminator = nnx.merge(graph, params, rest)
        discriminator(images)
        after_forward = jax.tree.map(jnp.copy, nnx.split(discriminator, nnx.Param, ...)[1:])
        discriminator.update_spectral_norm()
        return after_forward, nnx.split(discriminator, nnx.Param, ...)[1:]

    after_forward, (params_after, rest_after) = step(params, rest, normal(1, 2, 12, 12, 3))
    jax.tree.map(np.testing.assert_array_equal, after_forward, (params, rest))
    jax.tree.map(np.testing.assert_array_equal, params_after, params)
    for i, conv in enumerate(discriminator.convs):
        matrix = np.asarray(conv.kernel[...]).reshape(-1, conv.out_features).T  # [out, kh * kw * in]
        v = matrix.T @ np.asarray(conv.u[...])
        v /= np.linalg.norm(v)
        u = matrix @ v
        u /= np.linalg.norm(u)
        np.testing.assert_allclose(rest_after["convs"][i]["v"][...], v, atol=1e-5)
        np.testing.assert_allclose(rest_after["convs"][i]["u"][...], u, atol=1e-5)


def test_updates_find_the_greatest_singular_value():
    @jit
    def sigmas():
        conv = SpectralConv(3, 5, (4, 4), strides=(2, 2), padding=((1, 1), (1, 1)), rngs=nnx.Rngs(0))
        first = conv.sigma()
        for _ in range(30):
            conv.update()
        return conv.kernel[...], first, conv.sigma()

    kernel, first, last = sigmas()
    greatest = np.linalg.svd(np.asarray(kernel).reshape(-1, 5), compute_uv=False)[0]
    np.testing.assert_allclose(first, greatest, rtol=0.02)  # by the iterations of the constructor
    np.testing.assert_allclose(last, greatest, rtol=1e-5)


def test_without_spectral_norm_the_update_does_nothing():
    discriminator = make()
    before = jax.tree.map(np.asarray, nnx.state(discriminator))
    discriminator.update_spectral_norm()
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(discriminator))


# Initialisation, and what a caller can get wrong


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_weights_start_as_published(spectral_norm):
    make_state = jit(lambda: nnx.state(PatchGAN(ndf=16, spectral_norm=spectral_norm, rngs=nnx.Rngs(0)), nnx.Param))
    values = {"kernel": [], "scale": [], "bias": []}
    for path, variable in nnx.to_flat_state(make_state()):
        values[path[-1]].append(np.ravel(variable[...]))
    values = {name: np.concatenate(arrays) for name, arrays in values.items()}
    np.testing.assert_allclose([values["kernel"].mean(), values["kernel"].std()], [0.0, 0.02], atol=2e-4)
    np.testing.assert_allclose([values["scale"].mean(), values["scale"].std()], [1.0, 0.02], atol=4e-3)
    assert (values["bias"] == 0).all()


@pytest.mark.parametrize("side", [24, 31])
def test_the_least_size_gives_one_logit_and_less_is_refused(side):
    discriminator = make(num_layers=3)
    assert apply(discriminator, normal(0, 2, side, side, 3)).shape == (2, 1, 1, 1)
    with pytest.raises(UserError, match="width of images for patchgan.num_layers 3 is 23, but must be at least 24"):
        discriminator(normal(0, 2, side, 23, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "layer"}, "patchgan.norm is 'layer', but must be one of batch, group, none"),
        ({"ndf": 0}, "patchgan.ndf is 0"),
        ({"num_layers": 0}, "patchgan.num_layers is 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(UserError, match=message):
        PatchGAN(**options, rngs=nnx.Rngs(0))
