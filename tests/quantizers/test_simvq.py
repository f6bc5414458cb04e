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
from vgpt_jax.quantizers.simvq import SimVQ


def make(**options):
    return SimVQ(**({"num_codewords": 32, "embedding_dim": 6} | options), rngs=nnx.Rngs(0))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def with_gradients(quantizer):
    """``(map, z, weights) -> (output, gradients of sum(weights * z_q) + loss)`` with respect to map and latents."""
    graph, params, buffers = nnx.split(quantizer, nnx.Param, ...)

    def scalar(params, z, weights):
        output = nnx.merge(graph, params, buffers)(z)
        return jnp.sum(weights * output.z_q) + output.loss, output

    step = jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))

    def call(z, weights, params=params):
        (to_params, to_z), output = step(params, z, weights)
        return output, to_params["codebook_map"][...], to_z

    return call


def numpy_codes(quantizer):
    return np.asarray(quantizer.codebook[...], np.float64) @ np.asarray(quantizer.codebook_map[...], np.float64)


def nearest(z, codes):
    return np.argmin(np.sum((np.asarray(z, np.float64)[..., None, :] - codes) ** 2, axis=-1), axis=-1)


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_outputs_and_gradients_are_those_of_the_peer(estimator):
    quantizer, z, weights = make(estimator=estimator), normal(1, 4, 10, 6), normal(2, 4, 10, 6)
    output, to_map, to_z = with_gradients(quantizer)(z, weights)

    # The peer's defaults are the paper's weights: 1 for the codebook, 0.25 for the latents.
    sim_vq = peer.SimVQ(dim=6, codebook_size=32, rotation_trick=estimator == "rotation")
    with torch.no_grad():
        sim_vq.frozen_codebook.copy_(torch.tensor(np.asarray(quantizer.codebook[...])))
        sim_vq.code_transform.weight.copy_(torch.tensor(np.asarray(quantizer.codebook_map[...]).T))
    z_torch = torch.tensor(z, requires_grad=True)
    z_q, token_ids, loss = sim_vq(z_torch)
    ((torch.tensor(weights) * z_q).sum() + loss).backward()

    np.testing.assert_array_equal(output.token_ids, token_ids)
    np.testing.assert_allclose(output.z_q, z_q.detach(), atol=1e-5)
    np.testing.assert_allclose(output.loss, loss.detach(), atol=1e-5)
    np.testing.assert_allclose(to_z, z_torch.grad, atol=1e-5)
    np.testing.assert_allclose(to_map, sim_vq.code_transform.weight.grad.T, atol=1e-5)
    np.testing.assert_allclose(
        quantizer.dequantize(output.token_ids), sim_vq.indices_to_codes(token_ids).detach(), atol=1e-5
    )


def test_losses_match_numpy():
    quantizer, z = make(commitment_weight=3.0, codebook_weight=0.5), normal(1, 30, 6)
    codes = numpy_codes(quantizer)
    output, *_ = with_gradients(quantizer)(z, np.zeros_like(z))
    np.testing.assert_array_equal(output.token_ids, nearest(z, codes))
    distance = np.mean((z - codes[nearest(z, codes)]) ** 2)
    assert set(output.losses) == {"commitment", "codebook"}
    np.testing.assert_allclose(output.losses["commitment"], distance, rtol=1e-5)
    np.testing.assert_allclose(output.losses["codebook"], distance, rtol=1e-5)
    np.testing.assert_allclose(output.loss, 3.5 * distance, rtol=1e-5)
    np.testing.assert_array_equal(output.z_e, z)


@pytest.mark.parametrize("shape", [(6,), (50, 6), (2, 3, 5, 6)], ids=str)
@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_dequantize_returns_what_the_call_returned_to_the_bit(shape, estimator):
    quantizer, z = make(estimator=estimator), normal(3, *shape)
    graph, state = nnx.split(quantizer)
    output = jax.jit(lambda state, z: nnx.merge(graph, state)(z))(state, z)
    token_ids = jax.jit(lambda state, z: nnx.merge(graph, state).quantize(z))(state, z)
    np.testing.assert_array_equal(token_ids, output.token_ids)
    assert token_ids.dtype == output.token_ids.dtype == jnp.int32
    dequantized = jax.jit(lambda state, ids: nnx.merge(graph, state).dequantize(ids))(state, token_ids)
    np.testing.assert_array_equal(dequantized, output.z_q)
    assert output.z_q.shape == shape


def test_every_loss_moves_its_own_side_only():
    z, none = normal(1, 30, 6), np.zeros((30, 6), np.float32)
    _, to_map, to_z = with_gradients(make(codebook_weight=0.0))(z, none)
    np.testing.assert_array_equal(to_map, 0.0)
    assert (np.abs(to_z).max(axis=-1) > 0).all()
    _, to_map, to_z = with_gradients(make(commitment_weight=0.0))(z, none)
    np.testing.assert_array_equal(to_z, 0.0)
    assert (np.abs(to_map) > 0).all()


def test_straight_through_is_the_identity_and_gives_the_map_no_gradient():
    z, weights = normal(1, 30, 6), normal(2, 30, 6)
    _, to_map, to_z = with_gradients(make(commitment_weight=0.0, codebook_weight=0.0))(z, weights)
    np.testing.assert_array_equal(to_z, weights)
    np.testing.assert_array_equal(to_map, 0.0)


def test_the_map_is_the_only_parameter():
    params = nnx.to_flat_state(nnx.state(make(), nnx.Param))
    assert [(path, value.shape) for path, value in params] == [(("codebook_map",), (6, 6))]


def test_initial_values_are_those_of_the_paper():
    quantizer = SimVQ(num_codewords=4096, embedding_dim=64, rngs=nnx.Rngs(3))
    codes, matrix = np.asarray(quantizer.codebook[...]), np.asarray(quantizer.codebook_map[...])
    np.testing.assert_allclose([codes.mean(), codes.std()], [0.0, 1 / 8], atol=2e-3)
    assert np.abs(matrix).max() <= 1 / 8
    np.testing.assert_allclose([matrix.mean(), matrix.std()], [0.0, 1 / 8 / 3**0.5], atol=2e-3)


def test_learning_moves_every_code_and_takes_unused_ones_into_use():
    quantizer = make(num_codewords=64, commitment_weight=0.0)
    z = normal(1, 256, 6) * np.float32([4.0, 2.0, 1.0, 0.5, 0.1, 0.1])  # far from the codes, and wide in two directions
    call, params = with_gradients(quantizer), nnx.state(quantizer, nnx.Param)
    losses, used = [], []
    for _ in range(100):
        output, to_map, _ = call(z, np.zeros_like(z), params)
        losses.append(output.loss)
        used.append(len(np.unique(output.token_ids)))
        change_of_codes = quantizer.codebook[...] @ to_map
        assert (np.linalg.norm(change_of_codes, axis=-1) > 0).all()
        params = jax.tree.map(lambda x, step=to_map: x - 0.3 * step, params)
    assert losses[-1] < 0.7 * losses[0]
    assert used[0] < used[-1] <= 64


def test_surgery_changes_nothing():
    quantizer, z = make(), normal(1, 30, 6)
    before = jax.tree.map(np.asarray, nnx.state(quantizer))
    quantizer.surgery(quantizer(z), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(quantizer), before)


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_eight_devices_compute_what_one_does(estimator):
    call = with_gradients(make(estimator=estimator))
    z, weights = normal(1, 16, 3, 6), normal(2, 16, 3, 6)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shards = NamedSharding(mesh, PartitionSpec("data"))
    one, eight = call(z, weights), call(jax.device_put(z, shards), jax.device_put(weights, shards))
    assert len(eight[0].z_q.sharding.device_set) == 8
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), eight, one)


def test_bfloat16_is_computed_on_in_float32():
    call = with_gradients(make())
    z = jnp.asarray(normal(1, 30, 6), jnp.bfloat16)
    output, to_map, _ = call(z, np.zeros((30, 6), np.float32))
    expected, to_map_expected, _ = call(z.astype(jnp.float32), np.zeros((30, 6), np.float32))
    assert output.z_q.dtype == output.loss.dtype == output.z_e.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, output, expected)
    np.testing.assert_array_equal(to_map, to_map_expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_codewords", 1),
        ("embedding_dim", 0),
        ("commitment_weight", -1.0),
        ("codebook_weight", -1.0),
        ("estimator", "gumbel"),
    ],
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(UserError, match=rf"simvq.{name} is {value!r}"):
        make(**{name: value})


@pytest.mark.parametrize("method", ["__call__", "quantize"])
def test_latents_of_another_width_are_refused(method):
    with pytest.raises(UserError, match="SimVQ: latents are 5 wide, but embedding_dim is 6"):
        getattr(make(), method)(jnp.zeros((3, 5)))
