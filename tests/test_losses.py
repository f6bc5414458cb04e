import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vgpt_jax.losses import RECONSTRUCTION_LOSSES, cross_entropy, l1, l2

CROSS_ENTROPY = jax.jit(cross_entropy, static_argnums=2)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_reconstruction_losses_by_hand():
    prediction, target = jnp.array([[1.0, -2.0], [0.5, 3.0]]), jnp.array([[0.0, 1.0], [0.5, 5.0]])
    assert jax.jit(l1)(prediction, target) == 1.5
    assert jax.jit(l2)(prediction, target) == 3.5


@pytest.mark.parametrize(
    ("name", "reference"), [("l1", torch.nn.functional.l1_loss), ("l2", torch.nn.functional.mse_loss)]
)
def test_reconstruction_losses_match_torch(name, reference):
    prediction, target = normal(0, 2, 5, 5, 3), normal(1, 2, 5, 5, 3)
    theirs = torch.from_numpy(prediction).requires_grad_()
    loss = reference(theirs, torch.from_numpy(target))
    loss.backward()
    value, gradient = jax.jit(jax.value_and_grad(RECONSTRUCTION_LOSSES[name]))(prediction, target)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("leading", [(7,), (2, 3)], ids=str)
def test_cross_entropy_matches_torch(leading, label_smoothing):
    logits = 3.0 * normal(0, *leading, 11)
    labels = np.random.default_rng(1).integers(0, 11, leading)
    theirs = torch.from_numpy(logits).requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        theirs.reshape(-1, 11),
        torch.from_numpy(labels).reshape(-1),
        label_smoothing=label_smoothing,
        reduction="none",
    )
    expected.sum().backward()
    np.testing.assert_allclose(
        CROSS_ENTROPY(logits, labels, label_smoothing), expected.detach().reshape(leading), rtol=1e-5
    )
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(cross_entropy(x, labels, label_smoothing))))(logits)
    np.testing.assert_allclose(gradient, theirs.grad, atol=1e-5)


def test_cross_entropy_of_bfloat16_logits_is_float32():
    logits, labels = jnp.asarray(normal(0, 4, 300), jnp.bfloat16), jnp.arange(4)
    loss = CROSS_ENTROPY(logits, labels)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, CROSS_ENTROPY(logits.astype(jnp.float32), labels), rtol=1e-6)


def test_cross_entropy_survives_large_logits():
    logits = jnp.array([[1e4, 0.0], [1e4, 0.0]])
    np.testing.assert_allclose(CROSS_ENTROPY(logits, jnp.array([0, 1])), [0.0, 1e4])
