from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import vector_quantize_pytorch as peer
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from quick_compile import jit
from vgpt_jax.errors import UserError
from vgpt_jax.quantizers.fsq import FSQ


def make(*levels):
    return FSQ(levels=levels, rngs=nnx.Rngs(0))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def with_gradient(quantizer):
    """``(z, weights) -> (gradient of sum(weights * z_q) + loss with respect to z, output)``."""

    def scalar(z, weights):
        output = quantizer(z)
        return jnp.sum(weights * output.z_q) + output.loss, output

    return jit(jax.grad(scalar, has_aux=True))


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (3, 4), (8, 8, 8, 6, 5), (1000, 7, 64)], ids=str)
def test_outputs_and_gradients_are_those_of_the_peer(levels):
    z, weights = 2.0 * normal(1, 3, 40, len(levels)), normal(2, 3, 40, len(levels))
    quantizer = make(*levels)
    gradient, output = with_gradient(quantizer)(z, weights)
    fsq = peer.FSQ(levels=list(levels))
    z_torch = torch.tensor(z, requires_grad=True)
    z_q, token_ids = fsq(z_torch)
    (torch.tensor(weights) * z_q).sum().backward()
    np.testing.assert_array_equal(output.token_ids, token_ids)
    np.testing.assert_allclose(output.z_q, z_q.detach(), atol=1e-6)
    np.testing.assert_allclose(gradient, z_torch.grad, atol=1e-5)
    np.testing.assert_array_equal(output.z_e, z)
    every_id = np.arange(min(quantizer.num_codewords, 4096))
    np.testing.assert_allclose(quantizer.dequantize(every_id), fsq.indices_to_codes(torch.tensor(every_id)), atol=1e-6)


def test_codes_and_ids_by_hand():
    z = jnp.array([[0.0, 0.0], [9.0, 9.0], [-9.0, -9.0], [9.0, -0.6], [0.0, 0.5]])
    output = jit(make(3, 4))(z)
    # levels -1 0 1 and -1 -1/2 0 1/2; id = digit 0 + 3 * digit 1
    np.testing.assert_array_equal(output.z_q, [[0.0, 0.0], [1.0, 0.5], [-1.0, -1.0], [1.0, -0.5], [0.0, 0.5]])
    np.testing.assert_array_equal(output.token_ids, [7, 11, 0, 5, 10])
    assert output.losses == {} and output.parts == ()
    assert output.loss == 0.0 and output.loss.dtype == jnp.float32


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (3, 4)], ids=str)
def test_every_id_is_a_code_and_codes_are_spread_evenly(levels):
    quantizer = make(*levels)
    assert quantizer.num_codewords == np.prod(levels) and quantizer.embedding_dim == len(levels)
    codes = np.asarray(jit(quantizer.dequantize)(np.arange(quantizer.num_codewords)))
    assert len(np.unique(codes, axis=0)) == quantizer.num_codewords
    for dimension, number in enumerate(levels):
        values = (np.arange(number) - number // 2) / (number // 2)
        np.testing.assert_allclose(np.unique(codes[:, dimension]), values, atol=1e-6)


def test_latents_reach_every_code_and_none_beyond():
    levels = (8, 5, 3)
    z = 3.0 * normal(0, 20000, 3)
    z[:2] = [[1e6], [-1e6]]
    token_ids = np.asarray(jit(make(*levels).quantize)(z))
    assert len(np.unique(token_ids)) == 120
    assert token_ids[0] == 119 and token_ids[1] == 0 and token_ids.min() == 0 and token_ids.max() == 119
    # At 1000 levels the overshoot is at its greatest: the outermost levels still hold the extremes.
    np.testing.assert_array_equal(make(999, 1000).quantize(z[:2, :2]), [999 * 1000 - 1, 0])


@pytest.mark.parametrize("shape", [(4,), (50, 4), (2, 3, 5, 4)], ids=str)
def test_dequantize_returns_what_the_call_returned_to_the_bit(shape):
    quantizer, z = make(7, 5, 6, 11), normal(3, *shape)
    output, token_ids = jax.jit(quantizer)(z), jax.jit(quantizer.quantize)(z)
    np.testing.assert_array_equal(token_ids, output.token_ids)
    assert token_ids.dtype == output.token_ids.dtype == jnp.int32
    assert token_ids.shape == shape[:-1] and output.z_q.shape == shape
    z_q, dequantized = np.asarray(output.z_q), np.asarray(jax.jit(quantizer.dequantize)(token_ids))
    np.testing.assert_array_equal(z_q.view(np.int32), dequantized.view(np.int32))  # a -0 is not a 0


def test_ids_that_need_31_bits():
    quantizer = make(*[8] * 9, 15)
    ids = np.random.default_rng(0).integers(0, quantizer.num_codewords, 100)
    ids[:2] = 0, 15 * 2**27 - 1
    levels, middles, offsets = np.array([[8] * 9 + [15], [4] * 9 + [7], [0.5] * 9 + [0.0]])
    digits = ids[:, None] // 8 ** np.arange(10) % levels
    codes = quantizer.dequantize(ids.astype(np.int32))
    np.testing.assert_allclose(codes, (digits - middles) / middles, atol=1e-6)
    half_range = (levels - 1) * 1.001 / 2
    z = np.arctanh((digits - middles + offsets) / half_range) - np.arctanh(offsets / half_range)
    np.testing.assert_array_equal(quantizer.quantize(z.astype(np.float32)), ids)


def test_gradients_take_latents_to_any_code():
    quantizer, target_ids = make(8, 5, 5), np.random.default_rng(0).integers(0, 200, 100)
    target = quantizer.dequantize(target_ids)
    gradient = jit(jax.grad(lambda z: jnp.sum((quantizer(z).z_q - target) ** 2)))
    z = normal(0, 100, 3)
    assert np.mean(quantizer.quantize(z) == target_ids) < 0.1
    for _ in range(100):
        z = z - 0.3 * gradient(z)
    assert np.mean(quantizer.quantize(z) == target_ids) > 0.95


def test_there_is_nothing_to_learn_and_nothing_to_repair():
    quantizer, z = make(8, 5), normal(0, 10, 2)
    assert not jax.tree.leaves(nnx.state(quantizer))
    quantizer.surgery(jit(quantizer)(z), jax.random.key(0))
    assert not jax.tree.leaves(nnx.state(quantizer))
    assert not quantizer.is_warming_up() and quantizer.token_shape((4, 3)) == (4, 3)


def test_split_and_merge():
    graph, state = nnx.split(FSQ(levels=[8, 5, 5], rngs=nnx.Rngs(0)))  # a list, as from a file
    z = normal(0, 10, 3)
    merged = jit(lambda state, z: nnx.merge(graph, state)(z))(state, z)
    np.testing.assert_array_equal(merged.token_ids, make(8, 5, 5).quantize(z))
    assert hash(graph) == hash(nnx.split(make(8, 5, 5))[0])


def test_eight_devices_compute_what_one_does():
    call = with_gradient(make(8, 5, 5, 5))
    z, weights = normal(1, 16, 3, 4), normal(2, 16, 3, 4)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shards = NamedSharding(mesh, PartitionSpec("data"))
    one, eight = call(z, weights), call(jax.device_put(z, shards), jax.device_put(weights, shards))
    assert len(eight[1].z_q.sharding.device_set) == 8
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), eight, one)


def test_bfloat16_is_computed_on_in_float32():
    z = jnp.asarray(normal(1, 100, 4), jnp.bfloat16)
    quantizer = jit(make(8, 64, 5, 5))
    output, expected = quantizer(z), quantizer(z.astype(jnp.float32))
    assert output.z_q.dtype == output.z_e.dtype == output.loss.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, output, expected)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((), "fsq.levels is empty"),
        ((8, 2, 5), r"fsq.levels\[1\] is 2, but must be at least 3 and at most 1000"),
        ((8, 5, 1001), r"fsq.levels\[2\] is 1001"),
        ((8,) * 11, r"fsq.levels: the product, the number of codes, is 8589934592, but must be at most 2147483647"),
    ],
)
def test_bad_arguments_are_named(levels, message):
    with pytest.raises(UserError, match=message):
        make(*levels)


@pytest.mark.parametrize("method", ["__call__", "quantize"])
def test_latents_of_another_width_are_refused(method):
    with pytest.raises(UserError, match="FSQ: latents are 5 wide, but embedding_dim is 4"):
        getattr(make(8, 5, 5, 5), method)(jnp.zeros((3, 5)))
