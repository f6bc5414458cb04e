import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vgpt_jax.losses import (
    ADVERSARIAL_LOSSES,
    RECONSTRUCTION_LOSSES,
    adaptive_weight,
    cross_entropy,
    l1,
    l2,
    lecam,
    moving_average,
    r1_penalty,
)

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


# Adversarial losses

softplus, relu = torch.nn.functional.softplus, torch.relu
ADVERSARIAL_BY_TORCH = {
    "hinge": (lambda r, f: 0.5 * (relu(1 - r).mean() + relu(1 + f).mean()), lambda f: -f.mean()),
    "vanilla": (lambda r, f: 0.5 * (softplus(-r).mean() + softplus(f).mean()), lambda f: -f.mean()),
    "non_saturating": (lambda r, f: softplus(-r).mean() + softplus(f).mean(), lambda f: softplus(-f).mean()),
}


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_adversarial_losses_match_torch(name):
    real, fake = 2.0 * normal(0, 2, 5, 5, 1), 2.0 * normal(1, 3, 1)
    theirs = [torch.from_numpy(x).requires_grad_() for x in (real, fake)]
    discriminator, generator = ADVERSARIAL_LOSSES[name]
    theirs_discriminator, theirs_generator = ADVERSARIAL_BY_TORCH[name]

    expected = theirs_discriminator(*theirs)
    expected_gradients = torch.autograd.grad(expected, theirs)
    value, gradients = jax.jit(jax.value_and_grad(discriminator, argnums=(0, 1)))(real, fake)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    for ours, reference in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-6)

    expected = theirs_generator(theirs[1])
    value, gradient = jax.jit(jax.value_and_grad(generator))(fake)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, torch.autograd.grad(expected, theirs[1])[0], atol=1e-6)


def test_hinge_by_hand():
    discriminator, generator = ADVERSARIAL_LOSSES["hinge"]
    real, fake = jnp.array([2.0, 0.5, -1.0]), jnp.array([-3.0, 1.0])
    assert jax.jit(discriminator)(real, fake) == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 2) / 2))
    assert jax.jit(generator)(fake) == 1.0


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_adversarial_losses_of_extreme_bfloat16_logits_are_finite_float32(name):
    extreme = jnp.array([-1e30, 0.0, 1e30], jnp.bfloat16)
    discriminator, generator = ADVERSARIAL_LOSSES[name]
    for loss, logits in ((discriminator, (extreme, extreme)), (generator, (extreme,))):
        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(logits)))))(*logits)
        assert value.dtype == jnp.float32
        assert value.shape == ()
        assert np.isfinite(value)
        assert all(np.isfinite(gradient.astype(jnp.float32)).all() for gradient in gradients)


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_the_two_sides_pull_fake_logits_apart(name):
    discriminator, generator = ADVERSARIAL_LOSSES[name]
    real, fake = jnp.array([0.3, -0.4]), jnp.array([0.2, -0.1])
    for_real, for_fake = jax.jit(jax.grad(discriminator, argnums=(0, 1)))(real, fake)
    assert (for_real < 0).all()
    assert (for_fake > 0).all()
    assert (jax.jit(jax.grad(generator))(fake) < 0).all()


# LeCam


def test_lecam_by_hand():
    real, fake = jnp.array([[1.0], [-2.0], [0.5]]), jnp.array([0.0, 3.0])
    # real - fake_average: 1.5, -1.5, 1.0; real_average - fake: 2.0, -1.0
    value, gradients = jax.jit(jax.value_and_grad(lecam, argnums=(0, 1, 2, 3)))(real, fake, 2.0, -0.5)
    assert value == pytest.approx((1.5**2 + 1.0**2) / 3 + 2.0**2 / 2)
    np.testing.assert_allclose(gradients[0], [[2 * 1.5 / 3], [0.0], [2 * 1.0 / 3]], rtol=1e-6)
    np.testing.assert_allclose(gradients[1], [-2 * 2.0 / 2, 0.0], rtol=1e-6)
    assert gradients[2:] == (0.0, 0.0)


def test_lecam_of_bfloat16_logits_is_float32():
    real, fake = (jnp.asarray(normal(seed, 300), jnp.bfloat16) for seed in (0, 1))
    value = jax.jit(lecam)(real, fake, 0.25, -0.5)
    assert value.dtype == jnp.float32
    real, fake = (np.asarray(x, np.float64) for x in (real, fake))
    expected = np.mean(np.maximum(real + 0.5, 0) ** 2) + np.mean(np.maximum(0.25 - fake, 0) ** 2)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_moving_average_by_hand():
    logits = jnp.array([[1.0, 2.0], [3.0, 6.0]], jnp.bfloat16)
    value, gradient = jax.jit(jax.value_and_grad(moving_average, argnums=1), static_argnums=2)(10.0, logits, 0.75)
    assert value.dtype == jnp.float32
    assert value == 8.25
    assert (gradient == 0).all()


# Gradient penalty


def test_r1_of_a_quadratic_by_hand():
    # The logits of an image x are w (x_0^2, x_1), so its gradient is w (2 x_0, 1) and R1 = w^2 mean(4 x_0^2 + 1).
    images = jnp.array([[1.0, 5.0], [-2.0, 0.5], [0.5, 3.0]])

    def penalty(w):
        return r1_penalty(lambda x: w * jnp.stack([x[:, 0] ** 2, x[:, 1]], axis=-1), images)

    value, gradient = jax.jit(jax.value_and_grad(penalty))(1.5)
    expected = np.mean([4 * 1 + 1, 4 * 4 + 1, 4 * 0.25 + 1])
    np.testing.assert_allclose(value, 1.5**2 * expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * 1.5 * expected, rtol=1e-6)


def test_r1_of_a_network_matches_torch():
    images, hidden, out = normal(0, 4, 6), normal(1, 6, 8), normal(2, 8, 3)
    theirs = [torch.from_numpy(w).requires_grad_() for w in (hidden, out)]
    x = torch.from_numpy(images).requires_grad_()
    logits = torch.tanh(x @ theirs[0]) @ theirs[1]
    (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    expected = slope.pow(2).sum(dim=1).mean()
    expected_gradients = torch.autograd.grad(expected, theirs)

    def penalty(hidden, out):
        return r1_penalty(lambda x: jnp.tanh(x @ hidden) @ out, images)

    value, gradients = jax.jit(jax.value_and_grad(penalty, argnums=(0, 1)))(hidden, out)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    for ours, reference in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-5)


def test_r1_of_bfloat16_logits_is_float32():
    value = jax.jit(lambda x: r1_penalty(lambda x: 3.0 * x, x))(jnp.ones((4, 2), jnp.bfloat16))
    assert value.dtype == jnp.float32
    assert value == 18.0


# Adaptive weight


def test_adaptive_weight_by_hand():
    weigh = jax.jit(adaptive_weight)
    assert weigh(jnp.array([3.0, 4.0]), jnp.array([[0.0, 1.9999]]), 10.0) == pytest.approx(2.5)
    assert weigh({"kernel": jnp.array([3.0]), "bias": jnp.array([4.0])}, jnp.array(0.4999), 1e4) == pytest.approx(10.0)
    assert weigh(jnp.array([3.0, 4.0]), jnp.zeros(2), 7.0) == 7.0
    assert weigh(jnp.zeros(2), jnp.zeros(2), 7.0) == 0.0


def test_adaptive_weight_has_no_gradient_and_is_float32():
    gradients = (jnp.asarray(normal(0, 1000), jnp.bfloat16), jnp.asarray(normal(1, 1000), jnp.bfloat16))
    weight, slopes = jax.jit(jax.value_and_grad(adaptive_weight, argnums=(0, 1)), static_argnums=2)(*gradients, 1e4)
    assert weight.dtype == jnp.float32
    expected, adversarial = (np.linalg.norm(np.asarray(g, np.float64)) for g in gradients)
    np.testing.assert_allclose(weight, expected / (adversarial + 1e-4), rtol=1e-5)
    assert all((slope == 0).all() for slope in slopes)
