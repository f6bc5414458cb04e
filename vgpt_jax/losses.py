"""Losses as pure functions of arrays, float32."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array


def l1(prediction: Array, target: Array) -> Array:
    """Mean absolute difference over everything."""
    return jnp.mean(jnp.abs(prediction.astype(jnp.float32) - target))


def l2(prediction: Array, target: Array) -> Array:
    """Mean squared difference over everything."""
    return jnp.mean((prediction.astype(jnp.float32) - target) ** 2)


RECONSTRUCTION_LOSSES = {"l1": l1, "l2": l2}


def cross_entropy(logits: Array, labels: Array, label_smoothing: float = 0.0) -> Array:
    """Cross-entropy of each position, in nats.

    Args:
      logits: ``[..., V]`` of any float dtype; the softmax is float32.
      labels: ``[...]`` int32 in ``[0, V)``.
      label_smoothing: the share of the target's mass that is spread over all V.

    Returns:
      ``[...]`` float32.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    is_label = jnp.arange(logits.shape[-1]) == labels[..., None]  # not a gather, whose gradient would be a scatter
    hit = -jnp.sum(jnp.where(is_label, log_probs, 0.0), axis=-1)
    if not label_smoothing:
        return hit
    return (1.0 - label_smoothing) * hit - label_smoothing * jnp.mean(log_probs, axis=-1)


# Adversarial losses. The discriminator's is of logits of real and of fake images, the generator's of those of fake ones
# alone; logits are of any shape and float dtype, greater for what looks real. Every mean is over all logits; all return
# float32 scalars.


def hinge_discriminator(real_logits: Array, fake_logits: Array) -> Array:
    """``(mean relu(1 - real) + mean relu(1 + fake)) / 2`` (Lim and Ye 2017, arXiv 1705.02894, with VQ-GAN's half)."""
    real, fake = real_logits.astype(jnp.float32), fake_logits.astype(jnp.float32)
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))


def vanilla_discriminator(real_logits: Array, fake_logits: Array) -> Array:
    """Half the cross-entropy of real against fake (Goodfellow et al. 2014, arXiv 1406.2661, equation 1), in nats."""
    return 0.5 * non_saturating_discriminator(real_logits, fake_logits)


def non_saturating_discriminator(real_logits: Array, fake_logits: Array) -> Array:
    """``mean softplus(-real) + mean softplus(fake)``: the cross-entropy of real against fake, in nats."""
    real, fake = real_logits.astype(jnp.float32), fake_logits.astype(jnp.float32)
    return jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))


def linear_generator(fake_logits: Array) -> Array:
    """``-mean fake``."""
    return -jnp.mean(fake_logits.astype(jnp.float32))


def non_saturating_generator(fake_logits: Array) -> Array:
    """``mean softplus(-fake)`` (arXiv 1406.2661, section 3), in nats."""
    return jnp.mean(jax.nn.softplus(-fake_logits.astype(jnp.float32)))


# name -> (discriminator's, generator's). "hinge" and "vanilla" are VQ-GAN's, "non_saturating" is StyleGAN2's.
ADVERSARIAL_LOSSES = {
    "hinge": (hinge_discriminator, linear_generator),
    "vanilla": (vanilla_discriminator, linear_generator),
    "non_saturating": (non_saturating_discriminator, non_saturating_generator),
}


def lecam(real_logits: Array, fake_logits: Array, real_average: Array, fake_average: Array) -> Array:
    """The LeCam regulariser of a discriminator, which keeps its logits near the average ones of the other kind.

    ``mean relu(real - fake_average)^2 + mean relu(real_average - fake)^2``, a float32 scalar.

    Args:
      real_logits, fake_logits: any shape and float dtype.
      real_average, fake_average: float32 scalars, moved by `moving_average`; no gradient reaches them.

    Reference: Tseng et al. 2021, arXiv 2104.03310, section 3.2; the relus are of the code published with it.
    """
    real_average, fake_average = jax.lax.stop_gradient((real_average, fake_average))
    real = jax.nn.relu(real_logits.astype(jnp.float32) - fake_average)
    fake = jax.nn.relu(real_average - fake_logits.astype(jnp.float32))
    return jnp.mean(real**2) + jnp.mean(fake**2)


def moving_average(average: Array, logits: Array, decay: float) -> Array:
    """``decay * average + (1 - decay) * mean logits``, float32; the averages of `lecam` (there with a decay of 0.99)."""
    return decay * average + (1.0 - decay) * jax.lax.stop_gradient(jnp.mean(logits.astype(jnp.float32)))


def r1_penalty(logits_of: Callable[[Array], Array], images: Array) -> Array:
    """The mean over real images of the squared norm of the gradient of an image's logits, without the paper's factor 1/2.

    Args:
      logits_of: images ``[B, ...]`` to logits ``[B, ...]``; an image's are summed. Where they depend on other images of the
        batch (BatchNorm, the minibatch's standard deviation), the gradient is of the whole batch's sum.
      images: real ones, of any float dtype.

    Returns:
      A float32 scalar, differentiable with respect to what ``logits_of`` closes over.

    Reference: Mescheder et al. 2018, arXiv 1801.04406, equation 9.
    """
    gradient = jax.grad(lambda x: jnp.sum(logits_of(x).astype(jnp.float32)))(images).astype(jnp.float32)
    return jnp.sum(gradient**2) / images.shape[0]


def adaptive_weight(reconstruction_gradient: Any, adversarial_gradient: Any, maximum: float) -> Array:
    """The weight at which the adversarial loss moves the decoder's last layer as much as the reconstruction loss does.

    ``clip(|reconstruction_gradient| / (|adversarial_gradient| + 1e-4), 0, maximum)``, a float32 scalar without gradient.

    Args:
      reconstruction_gradient, adversarial_gradient: of the two losses with respect to that layer, an array or a pytree of
        them, of any float dtype; norms are global and float32.
      maximum: greatest weight (VQ-GAN: 1e4).

    Reference: Esser et al. 2021, arXiv 2012.09841, equation 7; its delta of 1e-6 is 1e-4 in the code published with it.
    """
    reconstruction, adversarial = (
        optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), gradient))
        for gradient in jax.lax.stop_gradient((reconstruction_gradient, adversarial_gradient))
    )
    return jnp.clip(reconstruction / (adversarial + 1e-4), 0.0, maximum)
