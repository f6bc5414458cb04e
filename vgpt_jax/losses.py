"""Losses as pure functions of arrays, float32."""

import jax
import jax.numpy as jnp
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
    hit = -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    if not label_smoothing:
        return hit
    return (1.0 - label_smoothing) * hit - label_smoothing * jnp.mean(log_probs, axis=-1)
