"""Codebook surgery: what is done to the codes besides gradient descent. Pure functions, fixed shapes, masks.

A training step calls these after the optimizer's update, in an order that is written in the step. Statistics are taken
over the arrays given, so under ``jit`` with a sharded batch they are those of the global batch.
"""

import jax
import jax.numpy as jnp
from jax import Array


def init_from_latents(key: Array, codes: Array, latents: Array, *, when: Array) -> Array:
    """Draws every code from the batch's latents, if ``when``.

    Args:
      key: PRNG key.
      codes: ``[K, D]`` float32.
      latents: ``[M, D]`` float32. They are drawn without replacement; where ``M < K`` some are drawn again, with a
        hundredth of their norm added as noise, since two equal codes are one.
      when: bool scalar; otherwise ``codes`` come back unchanged.
    """
    num_codes, num_latents = codes.shape[0], latents.shape[0]
    choice_key, noise_key = jax.random.split(key)
    chosen = jax.random.permutation(choice_key, max(num_codes, num_latents))[:num_codes] % num_latents
    drawn = latents[chosen]
    if num_latents < num_codes:
        drawn = add_relative_noise(noise_key, drawn, 0.01)
    return jnp.where(when, drawn, codes)


def count_down(countdown: Array, token_ids: Array, *, replace_freq: int, when: Array) -> Array:
    """One step of the LRU countdowns: ``replace_freq`` for a code that this batch used, one less for the others.

    Args:
      countdown: ``[K]`` int32, the steps each code has left.
      token_ids: int32 of any shape, the codes that were used.
      when: bool scalar; otherwise ``countdown`` comes back unchanged.
    """
    used = jnp.zeros(countdown.shape, bool).at[token_ids.reshape(-1)].set(True)
    return jnp.where(when, jnp.where(used, replace_freq, countdown - 1), countdown)


def replace_stale(
    key: Array, codes: Array, countdown: Array, latents: Array, *, replace_freq: int, noise: float
) -> tuple[Array, Array]:
    """Replaces exactly the codes whose countdown has ended by random latents plus noise, and restarts their countdown.

    Args:
      key: PRNG key.
      codes: ``[K, D]`` float32.
      countdown: ``[K]`` int32; a code is stale at zero.
      latents: ``[M, D]`` float32, where new codes come from.
      replace_freq: steps that a new code gets.
      noise: norm of the noise as a fraction of the latent's.

    Returns:
      Codes and countdowns.

    Reference: Huh et al. 2023, arXiv 2305.08842, section 4 (replacement policy).
    """
    choice_key, noise_key = jax.random.split(key)
    chosen = jax.random.randint(choice_key, (codes.shape[0],), 0, latents.shape[0])
    fresh = add_relative_noise(noise_key, latents[chosen], noise)
    stale = countdown <= 0
    return jnp.where(stale[:, None], fresh, codes), jnp.where(stale, replace_freq, countdown)


def add_relative_noise(key: Array, vectors: Array, fraction: float) -> Array:
    """Adds to each vector ``[..., D]`` isotropic Gaussian noise whose expected squared norm is (fraction * norm)^2."""
    scale = fraction * jnp.linalg.norm(vectors, axis=-1, keepdims=True) / vectors.shape[-1] ** 0.5
    return vectors + scale * jax.random.normal(key, vectors.shape, vectors.dtype)
