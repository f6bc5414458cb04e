import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vgpt_jax.quantizers.entropy import entropy_loss

ENTROPIES = jax.jit(entropy_loss)
GRADIENTS = jax.jit(jax.jacrev(lambda logits, temperature: jnp.stack(entropy_loss(logits, temperature))))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def numpy_entropies(logits, temperature):
    """The docstring's formula, in float64."""
    scores = np.asarray(logits, np.float64) / temperature
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)

    def entropy(p):
        return -np.sum(p * np.log(np.maximum(p, 1e-300)), axis=-1)

    sample, codebook = entropy(p).mean(), entropy(p.mean(axis=0))
    return sample - codebook, sample, codebook


@pytest.mark.parametrize("temperature", [0.01, 0.5, 1.0, 20.0])
def test_entropies_match_numpy(temperature):
    logits = normal(0, 40, 9)
    np.testing.assert_allclose(ENTROPIES(logits, temperature), numpy_entropies(logits, temperature), atol=1e-5)


def test_entropies_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.5, 1e-30], [1e-30, 0.5, 0.5]]))
    codebook = 1.5 * np.log(2.0)  # of a quarter, a half, a quarter
    np.testing.assert_allclose(ENTROPIES(logits, 1.0), [np.log(2.0) - codebook, np.log(2.0), codebook], atol=1e-6)


@pytest.mark.parametrize(
    ("logits", "sample", "codebook"),
    [
        (1e6 * np.eye(8), 0.0, np.log(8.0)),
        (np.tile(1e6 * np.eye(8)[3], (5, 1)), 0.0, 0.0),
        (np.zeros((5, 8)), np.log(8.0), np.log(8.0)),
        (np.full((5, 8), -1e30), np.log(8.0), np.log(8.0)),
    ],
    ids=["sure and balanced", "sure of one code", "unsure", "far below zero"],
)
def test_extremes_are_exact_and_have_finite_gradients(logits, sample, codebook):
    logits = jnp.asarray(logits, jnp.float32)
    np.testing.assert_allclose(ENTROPIES(logits, 0.01), [sample - codebook, sample, codebook], atol=1e-6)
    assert np.isfinite(GRADIENTS(logits, 0.01)).all()


def test_an_offset_of_the_logits_costs_no_digits():
    logits = np.round(normal(0, 40, 9) * 64) / 64  # so that the sum is exact
    np.testing.assert_allclose(ENTROPIES(logits - 4096.0, 0.01), ENTROPIES(logits, 0.01), atol=1e-6)


def test_gradients_match_autograd():
    logits = normal(1, 12, 6)
    leaf = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    log_p = torch.log_softmax(leaf / 0.3, dim=-1)
    sample = -(log_p.exp() * log_p).sum(dim=-1).mean()
    codebook = torch.distributions.Categorical(probs=log_p.exp().mean(dim=0)).entropy()
    expected = [torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (sample - codebook, sample, codebook)]
    for got, wanted in zip(GRADIENTS(logits, 0.3), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_minimising_it_makes_choices_sure_and_use_even():
    logits = normal(2, 64, 8)
    logits[:, 0] += 2.0  # one code is the choice of most
    before = ENTROPIES(logits, 1.0)
    for _ in range(60):
        logits = logits - 20.0 * GRADIENTS(logits, 1.0)[0]
    after = ENTROPIES(logits, 1.0)
    assert after[1] < 0.3 * before[1]
    assert after[2] > before[2] + 0.1
    assert after[0] < -1.5  # the least is -log 8 = -2.08


def test_bfloat16_is_computed_on_in_float32():
    logits = jnp.asarray(normal(0, 40, 9), jnp.bfloat16)
    entropies = ENTROPIES(logits, 0.1)
    assert all(x.dtype == jnp.float32 for x in entropies)
    np.testing.assert_array_equal(entropies, ENTROPIES(logits.astype(jnp.float32), 0.1))


def test_eight_devices_compute_what_one_does():
    logits = normal(3, 64, 9)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(logits, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_allclose(ENTROPIES(sharded, 0.1), ENTROPIES(logits, 0.1), atol=1e-5)
    np.testing.assert_allclose(GRADIENTS(sharded, 0.1), GRADIENTS(logits, 0.1), atol=1e-5)
