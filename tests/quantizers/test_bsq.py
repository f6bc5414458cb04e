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
from vgpt_jax.quantizers.bsq import BSQ


def make(**options):
    return BSQ(**({"num_bits": 6} | options), rngs=nnx.Rngs(0))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def with_gradient(quantizer, scalar=lambda output: output.loss):
    """``(z, weights) -> (gradient of sum(weights * z_q) + scalar(output) with respect to z, output)``."""

    def total(z, weights):
        output = quantizer(z)
        return jnp.sum(weights * output.z_q) + scalar(output), output

    return jit(jax.grad(total, has_aux=True))


@pytest.mark.parametrize("inverse_temperature", [200.0, 20.0, 2.0])
def test_outputs_losses_and_gradients_are_those_of_the_peer(inverse_temperature):
    """The peer's inverse temperature is half of ours: it multiplies ``2 c.u``, which is ``2 - |c - u|^2``."""
    z, weights = 3.0 * normal(1, 4, 50, 6), normal(2, 4, 50, 6)
    options = {"entropy_group_bits": 6, "diversity_gamma": 2.0, "entropy_weight": 0.3, "commitment_weight": 0.7}
    quantizer = make(inverse_temperature=inverse_temperature, **options)
    gradient, output = with_gradient(quantizer)(z, weights)

    lfq = peer.LFQ(dim=6, spherical=True, diversity_gamma=2.0, entropy_loss_weight=0.3, commitment_loss_weight=0.7)
    z_torch = torch.tensor(z, requires_grad=True)
    (z_q, token_ids, loss), parts = lfq(z_torch, inv_temperature=inverse_temperature / 2, return_loss_breakdown=True)
    ((torch.tensor(weights) * z_q).sum() + loss).backward()

    np.testing.assert_array_equal(output.token_ids, token_ids)
    np.testing.assert_allclose(output.z_q, z_q.detach(), atol=1e-6)
    np.testing.assert_allclose(output.losses["commitment"], parts.commitment.detach(), rtol=1e-5)
    entropy = (parts.per_sample_entropy - 2.0 * parts.batch_entropy).detach()
    np.testing.assert_allclose(output.losses["entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(output.loss, loss.detach(), rtol=1e-5)
    np.testing.assert_allclose(gradient, z_torch.grad, rtol=1e-5, atol=1e-5)
    every_id = np.arange(64)
    np.testing.assert_allclose(quantizer.dequantize(every_id), lfq.indices_to_codes(torch.tensor(every_id)), rtol=1e-6)


def test_entropy_gradient_alone_is_that_of_the_peer(monkeypatch):
    """Beside the gradient of ``z_q`` that of the entropy is small: here it is alone, times the number of latents.

    The peer takes log(max(p, 1e-5)) in its entropies, which gives rare codes another gradient: that quirk is taken out.
    """
    monkeypatch.setattr(lookup_free_quantization, "log", lambda p: p.clamp(min=1e-30).log())
    z = normal(1, 4, 50, 6)
    quantizer = make(inverse_temperature=10.0, entropy_group_bits=6)
    gradient, _ = with_gradient(quantizer, lambda output: 200.0 * output.losses["entropy"])(z, np.zeros_like(z))
    z_torch = torch.tensor(z, requires_grad=True)
    _, parts = peer.LFQ(dim=6, spherical=True)(z_torch, inv_temperature=5.0, return_loss_breakdown=True)
    (200.0 * (parts.per_sample_entropy - parts.batch_entropy)).backward()
    assert (np.abs(gradient) > 1e-2).mean() > 0.5
    np.testing.assert_allclose(gradient, z_torch.grad, rtol=1e-4, atol=2e-5)  # sums of 64 products in float32


def test_the_default_entropy_is_the_papers_approximation():
    """Equation 8: ``q(c | u)`` is a product of ``sigmoid(2 tau c_d u_d)``, and the average code one of their means."""
    z = normal(1, 100, 6)
    output = jit(make(inverse_temperature=7.0, diversity_gamma=1.5))(z)
    u = unit(z.astype(np.float64))
    codes = np.array([[1 if code >> bit & 1 else -1 for bit in range(6)] for code in range(64)]) / 6**0.5
    q = np.exp(7.0 * u @ codes.T)
    q /= q.sum(axis=1, keepdims=True)  # the assignment as it is defined, to all codes
    sample = -(q * np.log(q)).sum(axis=1).mean()
    p = (1 / (1 + np.exp(-2 * 7.0 * u / 6**0.5))).mean(axis=0)
    codebook = -(p * np.log(p) + (1 - p) * np.log(1 - p)).sum()
    np.testing.assert_allclose(output.losses["entropy"], sample - 1.5 * codebook, rtol=1e-5)


def test_codes_ids_and_commitment_by_hand():
    quantizer = make(num_bits=4, entropy_weight=0.0, commitment_weight=2.0)
    output = jit(quantizer)(jnp.array([[3.0, -4.0, 0.0, 0.0], [-7.0, 7.0, 7.0, 7.0]]))
    np.testing.assert_array_equal(output.z_q, [[0.5, -0.5, -0.5, -0.5], [-0.5, 0.5, 0.5, 0.5]])  # 0 counts as negative
    np.testing.assert_array_equal(output.token_ids, [8, 7])
    np.testing.assert_allclose(output.z_e, [[0.6, -0.8, 0.0, 0.0], [-0.5, 0.5, 0.5, 0.5]], rtol=1e-6)
    assert set(output.losses) == {"commitment"}
    commitment = (0.1**2 + 0.3**2 + 0.5**2 + 0.5**2) / 8
    np.testing.assert_allclose(output.losses["commitment"], commitment, rtol=1e-6)
    np.testing.assert_allclose(output.loss, 2.0 * commitment, rtol=1e-6)


@pytest.mark.parametrize("shape", [(6,), (50, 6), (2, 3, 5, 6)], ids=str)
def test_dequantize_returns_what_the_call_returned_to_the_bit(shape):
    quantizer, z = make(), normal(3, *shape)
    output, token_ids = jax.jit(quantizer)(z), jax.jit(quantizer.quantize)(z)
    np.testing.assert_array_equal(token_ids, output.token_ids)
    assert token_ids.dtype == output.token_ids.dtype == jnp.int32
    assert token_ids.shape == shape[:-1] and output.z_q.shape == shape
    np.testing.assert_array_equal(jax.jit(quantizer.dequantize)(token_ids), output.z_q)
    np.testing.assert_array_equal(quantizer.quantize(output.z_q), token_ids)


def test_everything_is_on_the_sphere_and_errors_are_bounded():
    z = normal(1, 500, 6) ** 5  # some nearly along an axis, where the error is greatest
    output = jit(make())(z)
    np.testing.assert_allclose(np.linalg.norm(output.z_q, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(output.z_e, unit(z), atol=1e-6)
    errors = np.linalg.norm(output.z_e - output.z_q, axis=1)
    assert 1.0 < errors.max() < (2 - 2 / 6**0.5) ** 0.5 + 1e-6 < 2**0.5


def test_norms_of_latents_change_nothing():
    quantizer, z = jit(make(inverse_temperature=5.0)), normal(1, 100, 6)
    output, scaled = quantizer(z), quantizer(z * np.exp(3.0 * normal(2, 100, 1)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), scaled, output)


def test_gradients_pass_through_the_norm():
    """The identity to u, so ``(I - u u^T) / |z|`` to z."""
    z, weights = 5.0 * normal(1, 30, 6), normal(2, 30, 6)
    gradient, _ = with_gradient(make(), lambda output: 0.0)(z, weights)
    u = unit(z.astype(np.float64))
    expected = (weights - u * (u * weights).sum(axis=1, keepdims=True)) / np.linalg.norm(z, axis=1, keepdims=True)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["commitment", "entropy"])
def test_losses_turn_latents_and_leave_their_norms(name):
    z = normal(1, 100, 6)
    quantizer = make(inverse_temperature=10.0)
    gradient, _ = with_gradient(quantizer, lambda output: 100.0 * output.losses[name])(z, np.zeros_like(z))
    assert (np.linalg.norm(gradient, axis=1) > 1e-3).all()
    np.testing.assert_allclose((gradient * z).sum(axis=1), 0.0, atol=1e-5)


def test_a_latent_of_zeros_is_finite():
    z = np.zeros((2, 6), np.float32)
    gradient, output = with_gradient(make(commitment_weight=1.0))(z, np.ones_like(z))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((gradient, output)))
    np.testing.assert_array_equal(output.token_ids, [0, 0])


def test_commitment_turns_latents_to_their_codes():
    z = normal(1, 100, 6)
    step = with_gradient(make(commitment_weight=1.0, entropy_weight=0.0))
    _, before = step(z, np.zeros_like(z))
    for _ in range(50):
        gradient, output = step(z, np.zeros_like(z))
        z = z - 100.0 * gradient
    np.testing.assert_array_equal(output.token_ids, before.token_ids)
    assert output.losses["commitment"] < 0.1 * before.losses["commitment"]


@pytest.mark.parametrize("entropy_group_bits", [1, 4])
def test_entropy_takes_codes_into_use(entropy_group_bits):
    z = normal(1, 256, 4) + np.float32([1.5, 1.5, -1.5, 1.5])
    quantizer = make(num_bits=4, inverse_temperature=5.0, entropy_weight=1.0, entropy_group_bits=entropy_group_bits)
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


def test_there_is_nothing_to_learn_and_nothing_to_repair():
    quantizer, z = make(), normal(0, 10, 6)
    assert not jax.tree.leaves(nnx.state(quantizer))
    quantizer.surgery(jit(quantizer)(z), jax.random.key(0))
    assert not jax.tree.leaves(nnx.state(quantizer))
    assert not quantizer.is_warming_up()


def test_eight_devices_compute_what_one_does():
    call = with_gradient(make(inverse_temperature=5.0, entropy_group_bits=4, entropy_weight=1.0, commitment_weight=1.0))
    z, weights = normal(1, 16, 3, 6), normal(2, 16, 3, 6)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shards = NamedSharding(mesh, PartitionSpec("data"))
    one, eight = call(z, weights), call(jax.device_put(z, shards), jax.device_put(weights, shards))
    assert len(eight[1].z_q.sharding.device_set) == 8
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), eight, one)


def test_bfloat16_is_computed_on_in_float32():
    z = jnp.asarray(normal(1, 100, 6), jnp.bfloat16)
    quantizer = jit(make(inverse_temperature=5.0))
    output, expected = quantizer(z), quantizer(z.astype(jnp.float32))
    assert output.z_q.dtype == output.z_e.dtype == output.loss.dtype == jnp.float32
    assert all(loss.dtype == jnp.float32 for loss in output.losses.values())
    jax.tree.map(np.testing.assert_array_equal, output, expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_bits", 0),
        ("num_bits", 31),
        ("entropy_weight", -0.1),
        ("diversity_gamma", -1.0),
        ("commitment_weight", -1.0),
        ("inverse_temperature", 0.0),
        ("entropy_group_bits", 0),
        ("entropy_group_bits", 25),
    ],
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(UserError, match=rf"bsq.{name} is {value!r}, but must be"):
        make(**{name: value})


@pytest.mark.parametrize("method", ["__call__", "quantize"])
def test_latents_of_another_width_are_refused(method):
    with pytest.raises(UserError, match="BSQ: latents are 5 wide, but embedding_dim is 6"):
        getattr(make(), method)(jnp.zeros((3, 5)))
