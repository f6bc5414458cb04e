import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from quick_compile import jit
from vgpt_jax.quantizers.binary import bit_entropies, bits_to_ids, ids_to_bits

ENTROPIES = jit(bit_entropies, static_argnums=1)
GRADIENTS = jit(jax.jacrev(bit_entropies), static_argnums=1)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def of_all_codes(logits, group_bits):
    """The two entropies and their gradients in float64, from the assignments to all codes of every group."""
    logits = torch.tensor(np.asarray(logits, np.float64), requires_grad=True)
    sample = codebook = 0.0
    for group in logits.split(group_bits, dim=-1):
        n = group.shape[-1]
        signs = torch.tensor([[1.0 if code >> (n - 1 - bit) & 1 else -1.0 for bit in range(n)] for code in range(2**n)])
        assignment = torch.softmax(group @ signs.double().T / 2, dim=-1)  # [M, 2^n]
        sample = sample + torch.special.entr(assignment).sum(dim=-1).mean()
        codebook = codebook + torch.special.entr(assignment.mean(dim=0)).sum()
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0].numpy() for value in (sample, codebook)]
    return [sample.item(), codebook.item()], gradients


def largest_array(jaxpr) -> int:
    """Elements of the largest array that a computation makes, those within its calls included."""
    sizes = [variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars]
    inner = [largest_array(x.jaxpr) for e in jaxpr.eqns for x in e.params.values() if hasattr(x, "jaxpr")]
    return max(sizes + inner, default=0)


def test_ids_of_bits_by_hand():
    bits = jnp.array([[False, False, True], [True, False, False], [True, True, True]])
    np.testing.assert_array_equal(bits_to_ids(bits), [1, 4, 7])
    np.testing.assert_array_equal(ids_to_bits(jnp.array([1, 4, 7]), 3), bits)


@pytest.mark.parametrize("num_bits", [1, 8, 30])
def test_ids_and_bits_are_inverses(num_bits):
    ids = np.random.default_rng(0).integers(0, 2**num_bits, (4, 50)).astype(np.int32)
    ids[0, :2] = 0, 2**num_bits - 1
    bits = jax.jit(ids_to_bits, static_argnums=1)(ids, num_bits)
    expected = ids[..., None].astype(np.int64) // 2 ** np.arange(num_bits)[::-1] % 2 == 1
    np.testing.assert_array_equal(bits, expected)
    back = jax.jit(bits_to_ids)(bits)
    np.testing.assert_array_equal(back, ids)
    assert bits.dtype == bool and back.dtype == jnp.int32


@pytest.mark.parametrize("group_bits", [1, 3, 7, 24])
@pytest.mark.parametrize(("scale", "shift"), [(0.3, 0.0), (3.0, 0.0), (0.3, 6.0)])  # the last: most codes are rare
def test_entropies_and_gradients_are_those_of_all_codes(group_bits, scale, shift):
    logits = scale * (normal(0, 60, 7) + normal(1, 7)) + np.float32(shift)
    expected, expected_gradients = of_all_codes(logits, group_bits)
    np.testing.assert_allclose(ENTROPIES(logits, group_bits), expected, rtol=1e-5)
    gradients = GRADIENTS(logits, group_bits)
    np.testing.assert_allclose(gradients[0], expected_gradients[0], atol=1e-6)
    np.testing.assert_allclose(gradients[1], expected_gradients[1], atol=1e-6)


def test_any_leading_shape():
    logits = normal(0, 3, 4, 5, 7)
    np.testing.assert_allclose(ENTROPIES(logits, 3), ENTROPIES(logits.reshape(60, 7), 3), rtol=1e-6)


def test_groups_leave_the_sample_entropy_and_raise_the_codebook_entropy():
    logits = 3.0 * normal(0, 200, 4) @ normal(1, 4, 12)  # 12 bits of 4 numbers: they depend on each other
    samples, codebooks = np.array([ENTROPIES(logits, group_bits) for group_bits in (12, 4, 1)]).T
    np.testing.assert_array_equal(samples, samples[0])
    assert (np.diff(codebooks) > 0.1).all()  # each grouping is finer than the one before
    assert 0 < samples[0] < codebooks[0] and codebooks[-1] < 12 * np.log(2)


def test_groups_are_exact_where_groups_are_independent():
    all_codes = ids_to_bits(jnp.arange(64), 6)
    logits = jnp.where(all_codes, 50.0, -50.0)
    for group_bits in (6, 4, 1):
        np.testing.assert_allclose(ENTROPIES(logits, group_bits), [0.0, 6 * np.log(2)], rtol=1e-6, atol=1e-6)


def test_extreme_logits_are_finite():
    certain = np.full((60, 7), 1e4, np.float32) * np.sign(normal(0, 7))  # one code takes everything
    unsure, mixed = np.zeros((60, 7), np.float32), np.float32([1e4, -1e4, 90.0, -90.0, 0.0, 20.0, -40.0])
    np.testing.assert_array_equal(ENTROPIES(certain, 3), [0.0, 0.0])
    np.testing.assert_allclose(ENTROPIES(unsure, 3), [7 * np.log(2)] * 2, rtol=1e-5)
    for logits in (certain, unsure, np.tile(mixed, (60, 1))):
        for gradient in GRADIENTS(logits, 3):
            assert np.isfinite(gradient).all()


def test_small_entropies_keep_their_digits():
    # softplus(l) - l sigmoid(l) would be 0 or 1e-6 here
    np.testing.assert_allclose(ENTROPIES(np.float32([[20.0]]), 1)[0], 21.0 * np.exp(-20.0), rtol=1e-5)


def test_assignments_to_all_codes_are_never_made():
    logits = jnp.zeros((512, 18))
    forward_and_back = jax.make_jaxpr(jax.value_and_grad(lambda x: sum(bit_entropies(x, 18))))(logits)
    assert largest_array(forward_and_back.jaxpr) == 2**18  # the latents' halves: 512 * 2^9; the assignments: 512 * 2^18
    forward_and_back = jax.make_jaxpr(jax.value_and_grad(lambda x: sum(bit_entropies(x, 9))))(logits)
    assert largest_array(forward_and_back.jaxpr) <= 512 * 2 * 2**5
