"""Against the same layers in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from quick_compile import jit
from vgpt_jax import UserError
from vgpt_jax.models.vgg16 import VGG16, max_pool


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def to_torch(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def from_torch(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def test_features_and_the_gradient_of_the_picture_are_pytorchs():
    graph, state = nnx.split(nnx.eval_shape(lambda: VGG16(rngs=nnx.Rngs(0))))
    flat = [
        (path, variable.replace(jnp.asarray(normal(i, *variable.shape) * (2 / np.prod(variable.shape[:3])) ** 0.5)))
        for i, (path, variable) in enumerate(nnx.to_flat_state(state))
    ]
    state = nnx.from_flat_state(flat)
    x = normal(0, 2, 33, 50, 3)  # sides that cannot be halved evenly

    theirs, maps = to_torch(x).requires_grad_(), []
    for stage in nnx.merge(graph, state).stages:
        y = torch.max_pool2d(maps[-1], 2) if maps else theirs
        for conv in stage:
            kernel = torch.from_numpy(np.array(conv.kernel[...])).permute(3, 2, 0, 1)
            y = torch.relu(torch.conv2d(y, kernel, torch.from_numpy(np.array(conv.bias[...])), padding=1))
        maps.append(y)
    cotangents = [normal(i, *from_torch(m).shape) for i, m in enumerate(maps)]
    sum((m * to_torch(c)).sum() for m, c in zip(maps, cotangents, strict=True)).backward()

    @jit
    def run(state, x):
        maps, pullback = jax.vjp(lambda x: nnx.merge(graph, state).features(x), x)
        return maps, pullback(tuple(cotangents))[0]

    our_maps, gradient = run(state, x)
    assert [m.shape[1:] for m in our_maps] == [(33, 50, 64), (16, 25, 128), (8, 12, 256), (4, 6, 512), (2, 3, 512)]
    for ours, expected in zip(our_maps, map(from_torch, maps), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)
        assert np.std(ours) > 0.1
    expected = from_torch(theirs.grad)
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max())


def test_pooling_and_its_gradient_are_pytorchs_where_nothing_is_equal():
    x = normal(0, 2, 7, 8, 3)
    theirs = to_torch(x).requires_grad_()
    expected = torch.max_pool2d(theirs, 2)
    y, pullback = jax.vjp(max_pool, x)
    np.testing.assert_array_equal(y, from_torch(expected))
    cotangent = normal(1, *y.shape)
    expected.backward(to_torch(cotangent))
    np.testing.assert_array_equal(pullback(cotangent)[0], from_torch(theirs.grad))


def test_equal_elements_share_the_gradient():
    (gradient,) = jax.vjp(max_pool, jnp.ones((1, 2, 2, 1)))[1](jnp.ones((1, 1, 1, 1)))
    np.testing.assert_array_equal(gradient[0, :, :, 0], np.full((2, 2), 0.25))


def test_pictures_that_cannot_be_halved_four_times_are_refused():
    network = nnx.eval_shape(lambda: VGG16(rngs=nnx.Rngs(0)))
    maps = nnx.eval_shape(lambda n, x: n.features(x), network, jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32))
    assert maps[4].shape == (1, 1, 1, 512)
    with pytest.raises(UserError, match=r"at least 16 pixels, but was given \(64, 15\)"):
        network.features(jnp.zeros((1, 64, 15, 3)))
