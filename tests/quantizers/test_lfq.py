from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import vector_quantize_pytorch as peer
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from vector_quantize_pytorch import lookup_free_quantization

from quick_compile import jit
from vgpt_jax.errors import UserError
from vgpt_jax.quantizers.lfq import LFQ


def make(**options):
    return LFQ(**({"num_bits": 6} | options), rngs=nnx.Rngs(0))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def with_gradient(quantizer, scalar=lambda output: output.loss):
    """``(z, weights) -> (gradient of sum(weights * z_q) + scalar(output) with respect to z, output)``."""

    def total(z, weights):
        output = quantizer(z)
        return jnp.sum(weights * output.z_q) + scalar(output), output

    return jit(jax.grad(total, has_aux=True))


@pytest.mark.parametrize(("scale", "inverse_temperature"), [(1.0, 100.0), (0.5, 1.0), (1.0, 0.1)])
def test_outputs_losses_and_gradients_are_those_of_the_peer(scale, inverse_temperature):
    z, weights = 0.1 * normal(1, 4, 50, 6), normal(2, 4, 50, 6)
    quantizer = make(
        codebook_scale=scale,
        inverse_temperature=inverse_temperature,
        entropy_group_bits=6,
        diversity_gamma=2.0,
        entropy_weight=0.3,
    )
    gradient, output = with_gradient(quantizer)(z, weights)

    lfq = peer.LFQ(
        dim=6, codebook_scale=scale, diversity_gamma=2.0, entropy_loss_weight=0.3, commitment_loss_weight=0.25
    )
    z_torch = torch.tensor(z, requires_grad=True)
    (z_q, token_ids, loss), parts = lfq(z_torch, inv_temperature=inverse_temperature, return_loss_breakdown=True)
    ((torch.tensor(weights) * z_q).sum() + loss).backward()

    np.testing.assert_array_equal(output.token_ids, token_ids)
    np.testing.assert_allclose(output.z_q, z_q.detach(), atol=1e-6)
    np.testing.assert_allclose(output.losses["commitment"], parts.commitment.detach(), rtol=1e-5)
    entropy = (parts.per_sample_entropy - 2.0 * parts.batch_entropy).detach()
    np.testing.assert_allclose(output.losses["entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(output.loss, loss.detach(), rtol=1e-5)
    np.testing.assert_allclose(gradient, z_torch.grad, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(output.z_e, z)
    every_id = np.arange(64)
    np.testing.assert_array_equal(quantizer.dequantize(every_id), lfq.indices_to_codes(torch.tensor(every_id)))


def test_entropy_gradient_alone_is_that_of_the_peer(monkeypatch):
    """Beside the gradient of ``z_q`` that of the entropy is small: here it is alone, times the number of latents.

    The peer takes log(max(p, 1e-5)) in its entropies, which gives rare codes another gradient: that quirk is taken out.
    """
    monkeypatch.setattr(lookup_free_quantization, "log", lambda p: p.clamp(min=1e-30).log())
    z = 0.3 * normal(1, 4, 50, 6)
    gradient, _ = with_gradient(
        make(inverse_temperature=2.0, entropy_weight=1.0), lambda output: 200.0 * output.losses["entropy"]
    )(z, np.zeros_like(z))
    z_torch = torch.tensor(z, requires_grad=True)
    _, parts = peer.LFQ(dim=6)(z_torch, inv_temperature=2.0, return_loss_breakdown=True)
    (200.0 * (parts.per_sample_entropy - parts.batch_entropy)).backward()
    assert (np.abs(gradient) > 1e-3).mean() > 0.5
    np.testing.assert_allclose(gradient, z_torch.grad, rtol=1e-4, atol=2e-5)  # sums of 64 products in float32


def test_codes_ids_and_commitment_by_hand():
    quantizer = make(num_bits=3, codebook_scale=0.5, entropy_weight=0.0)
    output = jit(quantizer)(jnp.array([[0.5, -0.1, 0.0], [-2.0, -0.5, 1.5]]))
    np.testing.assert_array_equal(output.z_q, [[0.5, -0.5, -0.5], [-0.5, -0.5, 0.5]])  # 0 counts as negative
    np.testing.assert_array_equal(output.token_ids, [4, 1])
    assert set(output.losses) == {"commitment"}
    commitment = (0.4**2 + 0.5**2 + 1.5**2 + 1.0**2) / 6
    np.testing.assert_allclose(output.losses["commitment"], commitment, rtol=1e-6)
    np.testing.assert_allclose(output.loss, 0.25 * commitment, rtol=1e-6)


def test_default_groups_of_18_bits_match_numpy():
    quantizer = make(num_bits=18, inverse_temperature=0.5)
    z = normal(1, 40, 18)
    output = jit(quantizer)(z)
    p = 1 / (1 + np.exp(-2.0 * z.astype(np.float64)))  # log-odds 4 * 0.5 * z
    sample = -(p * np.log(p) + (1 - p) * np.log(1 - p)).sum(axis=1).mean()
    codebook = 0.0
    for group in (p[:, :9], p[:, 9:]):
        usage = np.mean(
            [[np.prod(np.where(c >> np.arange(9) & 1, q, 1 - q)) for c in range(512)] for q in group], axis=0
        )
        codebook -= np.sum(usage * np.log(usage))
    np.testing.assert_allclose(output.losses["entropy"], sample - codebook, rtol=1e-5)
    assert quantizer.num_codewords == 2**18 and quantizer.embedding_dim == 18


@pytest.mark.parametrize("num_bits", [18, 30])
def test_the_default_makes_no_array_of_all_codes(num_bits):
    jaxpr = jax.make_jaxpr(jax.value_and_grad(lambda z: make(num_bits=num_bits)(z).loss))(jnp.zeros((64, num_bits)))

    def largest(jaxpr) -> int:
        sizes = [variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars]
        return max(sizes + [largest(x.jaxpr) for e in jaxpr.eqns for x in e.params.values() if hasattr(x, "jaxpr")])

    assert largest(jaxpr.jaxpr) <= 64 * num_bits // 9 * 2**5


@pytest.mark.parametrize("shape", [(6,), (50, 6), (2, 3, 5, 6)], ids=str)
def test_dequantize_returns_what_the_call_returned_to_the_bit(shape):
    quantizer, z = make(codebook_scale=0.3), normal(3, *shape)
    output, token_ids = jax.jit(quantizer)(z), jax.jit(quantizer.quantize)(z)
    np.testing.assert_array_equal(token_ids, output.token_ids)
    assert token_ids.dtype == output.token_ids.dtype == jnp.int32
    assert token_ids.shape == shape[:-1] and output.z_q.shape == shape
    np.testing.assert_array_equal(jax.jit(quantizer.dequantize)(token_ids), output.z_q)
    np.testing.assert_array_equal(quantizer.quantize(output.z_q), token_ids)


def test_straight_through_gradient_is_the_identity():
    z, weights = normal(1, 30, 6), normal(2, 30, 6)
    gradient, _ = with_gradient(make(), lambda output: 0.0)(z, weights)
    np.testing.assert_array_equal(gradient, weights)


def test_commitment_pulls_latents_to_their_corners():
    z = normal(1, 30, 6)
    gradient, _ = with_gradient(make(), lambda output: output.losses["commitment"])(z, np.zeros_like(z))
    np.testing.assert_allclose(gradient, 2 * (z - np.sign(z)) / z.size, rtol=1e-5)


def test_entropy_makes_latents_sure_and_takes_codes_into_use():
    z = normal(1, 256, 4) + np.float32([1.5, 1.5, -1.5, 1.5])
    quantizer = make(num_bits=4, inverse_temperature=0.5, entropy_weight=1.0, commitment_weight=0.0)
    step = with_gradient(quantizer)

    def usage(output):
        shares = np.bincount(np.asarray(output.token_ids), minlength=16) / 256
        return -np.sum(shares[shares > 0] * np.log(shares[shares > 0]))

    outputs = []
    for _ in range(100):
        gradient, output = step(z, np.zeros_like(z))
        z = z - 30.0 * gradient
        outputs.append(output)
    assert usage(outputs[0]) < 1.0 and usage(outputs[-1]) > 2.0  # of log 16 = 2.77
    assert outputs[-1].loss < outputs[0].loss
    assert np.abs(z).min(axis=1).mean() > 0.5  # away from the borders, where it began at 0.3


def test_there_is_nothing_to_learn_and_nothing_to_repair():
    quantizer, z = make(), normal(0, 10, 6)
    assert not jax.tree.leaves(nnx.state(quantizer))
    quantizer.surgery(jit(quantizer)(z), jax.random.key(0))
    assert not jax.tree.leaves(nnx.state(quantizer))
    assert not quantizer.is_warming_up()


def test_eight_devices_compute_what_one_does():
    call = with_gradient(make(inverse_temperature=1.0, entropy_group_bits=4, entropy_weight=1.0))
    z, weights = normal(1, 16, 3, 6), normal(2, 16, 3, 6)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shards = NamedSharding(mesh, PartitionSpec("data"))
    one, eight = call(z, weights), call(jax.device_put(z, shards), jax.device_put(weights, shards))
    assert len(eight[1].z_q.sharding.device_set) == 8
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), eight, one)


def test_bfloat16_is_computed_on_in_float32():
    z = jnp.asarray(normal(1, 100, 6), jnp.bfloat16)
    quantizer = jit(make(inverse_temperature=1.0))
    output, expected = quantizer(z), quantizer(z.astype(jnp.float32))
    assert output.z_q.dtype == output.z_e.dtype == output.loss.dtype == jnp.float32
    assert all(loss.dtype == jnp.float32 for loss in output.losses.values())
    jax.tree.map(np.testing.assert_array_equal, output, expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_bits", 0),
        ("num_bits", 31),
        ("codebook_scale", 0.0),
        ("entropy_weight", -0.1),
        ("diversity_gamma", -1.0),
        ("commitment_weight", -1.0),
        ("inverse_temperature", 0.0),
        ("entropy_group_bits", 0),
        ("entropy_group_bits", 25),
    ],
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(UserError, match=rf"lfq.{name} is {value!r}, but must be"):
        make(**{name: value})


@pytest.mark.parametrize("method", ["__call__", "quantize"])
def test_latents_of_another_width_are_refused(method):
    with pytest.raises(UserError, match="LFQ: latents are 5 wide, but embedding_dim is 6"):
        getattr(make(), method)(jnp.zeros((3, 5)))
