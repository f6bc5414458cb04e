from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from quick_compile import jit
from vgpt_jax import UserError
from vgpt_jax.models.stylegan_discriminator import StyleGANDiscriminator, blur_downsample, minibatch_std
from vgpt_jax.training.sharding import make_mesh, shard_batch

MINIBATCH_STD = jit(minibatch_std, static_argnums=1)
BLUR = jit(blur_downsample, static_argnums=1)


def make(**options):
    """A discriminator with weights by NumPy: JAX would compile an initialiser for every shape."""
    arguments = {"image_size": 8, "ch": 4, "max_ch": 8} | options
    graph, state = nnx.split(nnx.eval_shape(lambda: StyleGANDiscriminator(**arguments, rngs=nnx.Rngs(0))))
    rng, filled = np.random.default_rng(0), []
    for path, variable in nnx.to_flat_state(state):
        spread = np.prod(variable.shape[:-1]) ** -0.5 if path[-1] == "kernel" else 0.3
        filled.append((path, variable.replace(jnp.asarray(spread * rng.normal(size=variable.shape), jnp.float32))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def apply(discriminator, images):
    graph, state = nnx.split(discriminator)
    return jit(lambda state, images: nnx.merge(graph, state)(images))(state, images)


def logits_and_gradients(discriminator, images, cotangent):
    """The logits, and the gradients of their sum weighted by ``cotangent``: of the parameters, of the images."""
    graph, params, rest = nnx.split(discriminator, nnx.Param, ...)
    assert not nnx.to_flat_state(rest)

    def weighted(params, images):
        logits = nnx.merge(graph, params, rest)(images)
        return jnp.sum(cotangent * logits), logits

    (_, logits), gradients = jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))(params, images)
    return logits, *gradients


# Parity with PyTorch


def torch_blur(x, taps):
    """A strided depthwise convolution of ``[B, C, H, W]`` with the outer product of the taps."""
    taps = torch.tensor(taps, dtype=x.dtype) / sum(taps)
    kernel = (taps[:, None] * taps[None]).expand(x.shape[1], 1, -1, -1)
    before = (len(taps) - 1) // 2
    x = torch.nn.functional.pad(x, (before, len(taps), before, len(taps)))  # more than enough behind
    return torch.nn.functional.conv2d(x, kernel, stride=2, groups=x.shape[1])


def halved(x, taps):
    return torch_blur(x, taps)[:, :, : (x.shape[2] + 1) // 2, : (x.shape[3] + 1) // 2]


def torch_logits(weights, images, taps, group):
    """The network on tensors ``weights`` {path: HWIO or IO tensor}, of images ``[B, C, H, W]``."""

    def conv(x, *path):
        kernel = weights[(*path, "kernel")].permute(3, 2, 0, 1)
        return torch.nn.functional.conv2d(x, kernel, weights.get((*path, "bias")), padding=kernel.shape[-1] // 2)

    activate = partial(torch.nn.functional.leaky_relu, negative_slope=0.2)
    x = activate(conv(images, "conv_in"))
    for i in range(1 + max(path[1] for path in weights if path[0] == "blocks")):
        y = halved(activate(conv(x, "blocks", i, "conv1")), taps)
        y = activate(conv(y, "blocks", i, "conv2"))
        x = (y + conv(halved(x, taps), "blocks", i, "shortcut")) / 2**0.5
    deviations = [
        (part.var(dim=0, unbiased=False) + 1e-8).sqrt().mean().expand(len(part), 1, *x.shape[2:])
        for part in x.split(group)
    ]
    x = activate(conv(torch.cat([x, torch.cat(deviations)], dim=1), "conv_out"))
    x = x.permute(0, 2, 3, 1).flatten(1)
    x = activate(x @ weights["dense", "kernel"] + weights["dense", "bias"])
    return x @ weights["head", "kernel"] + weights["head", "bias"]


@pytest.mark.parametrize(
    ("size", "blur", "end"),
    [(8, (1, 3, 3, 1), 4), (12, (1, 2, 1), 3), (9, (1, 3, 3, 1), 3), (11, (1, 1), 3)],
    ids=str,
)
def test_pytorch_is_reproduced(size, blur, end):
    discriminator, images = make(image_size=size, blur=blur, stddev_group=2), normal(1, 4, size, size, 3)
    assert discriminator.dense.in_features == end**2 * 8
    params = dict(nnx.to_flat_state(nnx.state(discriminator, nnx.Param)))
    weights = {path: torch.from_numpy(np.array(p[...])).requires_grad_() for path, p in params.items()}
    x = torch.from_numpy(images).requires_grad_()
    logits = torch_logits(weights, x.permute(0, 3, 1, 2), blur, 2)
    cotangent = normal(2, 4, 1)
    (logits * torch.from_numpy(cotangent)).sum().backward()

    ours, gradients, image_gradient = logits_and_gradients(discriminator, images, cotangent)
    np.testing.assert_allclose(ours, logits.detach(), atol=1e-5)
    assert np.std(ours) > 0.01
    np.testing.assert_allclose(image_gradient, x.grad, atol=1e-5)
    for path, gradient in nnx.to_flat_state(gradients):
        expected = weights[path].grad.numpy()
        assert np.abs(expected).max() > 1e-4
        np.testing.assert_allclose(gradient[...], expected, atol=1e-5 * max(1.0, np.abs(expected).max()))


def test_channels_double_up_to_the_greatest():
    discriminator = make(image_size=48, ch=16, max_ch=64)  # 48, 24, 12, 6, 3 pixels
    assert [block.conv2.out_features for block in discriminator.blocks] == [32, 64, 64, 64]
    assert discriminator.dense.in_features == 3 * 3 * 64


# Blur


@pytest.mark.parametrize("taps", [(1, 3, 3, 1), (1, 2, 1), (1, 1), (1,)], ids=str)
def test_blur_keeps_constants_away_from_the_border(taps):
    blurred = np.asarray(BLUR(np.full((1, 10, 7, 2), 3.0, np.float32), taps))
    assert blurred.shape == (1, 5, 4, 2)
    np.testing.assert_allclose(blurred[:, 1:-1, 1:-1], 3.0, rtol=1e-6)


def test_blur_by_hand():
    row = np.array([1.0, 2.0, 4.0, 8.0, 16.0], np.float32).reshape(1, 1, 5, 1)
    rows = np.concatenate(
        [np.zeros_like(row), row, np.zeros_like(row)], axis=1
    )  # output row 0 is half of the middle one
    half = BLUR(rows, (1, 2, 1))[0, 0, :, 0]
    np.testing.assert_allclose(half, np.array([0 + 2 * 1 + 2, 2 + 2 * 4 + 8, 8 + 2 * 16 + 0]) / 4 / 4, rtol=1e-6)
    blurred = BLUR(rows, (1, 3, 3, 1))[0, 0, :, 0] / (3 / 8)
    expected = np.array([0 + 3 * 1 + 3 * 2 + 4, 2 + 3 * 4 + 3 * 8 + 16, 8 + 3 * 16 + 0 + 0]) / 8
    np.testing.assert_allclose(blurred, expected, rtol=1e-6)


# Minibatch standard deviation


@pytest.mark.parametrize(("batch", "group", "size"), [(8, 4, 4), (6, 4, 3), (2, 4, 2), (3, 1, 1), (7, 4, 1)])
def test_minibatch_std_by_numpy(batch, group, size):
    x = normal(0, batch, 3, 2, 5)
    parts = x.reshape(batch // size, size, 3, 2, 5)
    expected = np.repeat(np.sqrt(parts.var(axis=1) + 1e-8).mean(axis=(1, 2, 3)), size)
    np.testing.assert_allclose(MINIBATCH_STD(x, group), expected, rtol=1e-5)


def test_minibatch_std_of_equal_examples_has_a_finite_gradient():
    x = np.ones((4, 2, 2, 3), np.float32)
    value, gradient = jit(jax.value_and_grad(lambda x: jnp.sum(minibatch_std(x, 4))))(x)
    np.testing.assert_allclose(value, 4e-4, rtol=1e-4)
    np.testing.assert_array_equal(gradient, np.zeros_like(x))


def test_minibatch_std_of_bfloat16_is_float32():
    x = jnp.asarray(normal(0, 4, 3, 3, 5), jnp.bfloat16)
    std = MINIBATCH_STD(x, 4)
    assert std.dtype == jnp.float32
    np.testing.assert_allclose(std, MINIBATCH_STD(x.astype(jnp.float32), 4), rtol=1e-6)


def test_logits_depend_on_the_group_and_on_nothing_beyond_it():
    discriminator, images = make(stddev_group=2), normal(1, 4, 8, 8, 3)
    changed = images.copy()
    changed[0] += normal(2, 8, 8, 3)
    difference = np.abs(np.asarray(apply(discriminator, changed) - apply(discriminator, images)))[:, 0]
    assert difference[1] > 1e-4
    np.testing.assert_array_equal(difference[2:], 0.0)
    alone = make(stddev_group=1)
    difference = np.abs(np.asarray(apply(alone, changed) - apply(alone, images)))[:, 0]
    np.testing.assert_array_equal(difference[1:], 0.0)


def test_one_device_and_eight_agree():
    discriminator, images = make(), normal(1, 8, 8, 8, 3)  # groups of four, one example a device
    cotangent = normal(2, 8, 1)
    expected = logits_and_gradients(discriminator, images, cotangent)
    batch = shard_batch(make_mesh(), {"images": images, "cotangent": cotangent})
    sharded = logits_and_gradients(discriminator, **batch)
    for ours, reference in zip(jax.tree.leaves(sharded), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-5)


# The rest


def test_bfloat16_stays_near_float32():
    images = normal(1, 4, 8, 8, 3)
    logits, half = (apply(make(dtype=dtype), images) for dtype in (jnp.float32, jnp.bfloat16))
    assert half.dtype == jnp.float32
    error = np.linalg.norm(half - logits) / np.linalg.norm(logits)
    assert 1e-4 < error < 0.05  # the lower bound: it did compute in bfloat16


def test_the_spectral_norm_update_changes_nothing():
    discriminator = make()
    before = jax.tree.map(np.asarray, nnx.state(discriminator))
    discriminator.update_spectral_norm()
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(discriminator))


def test_signals_keep_their_size_through_the_network_at_the_start():
    create = jit(lambda: nnx.state(StyleGANDiscriminator(image_size=16, ch=8, rngs=nnx.Rngs(0))))
    graph, _ = nnx.split(nnx.eval_shape(lambda: StyleGANDiscriminator(image_size=16, ch=8, rngs=nnx.Rngs(0))))
    logits = apply(nnx.merge(graph, create()), normal(0, 8, 16, 16, 3))
    assert logits.shape == (8, 1)
    assert 0.01 < np.std(logits) < 3.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 7}, "image_size is 7, but must be at least 8"),
        ({"ch": 0}, "stylegan_discriminator.ch is 0"),
        ({"max_ch": 3}, "max_ch is 3, but must be at least 4"),
        ({"stddev_group": 0}, "stddev_group is 0"),
        ({"blur": ()}, "blur is 0, but must be above 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_images_of_another_size_are_refused():
    with pytest.raises(UserError, match=r"images are \(8, 9\), but stylegan_discriminator.image_size is 8"):
        make()(normal(0, 2, 8, 9, 3))
