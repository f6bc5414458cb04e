"""Codebook surgery: what is done to the codes besides gradient descent. Pure functions, fixed shapes, masks.

A training step calls these after the optimizer's update, in an order that is written in the step. Statistics are taken
over the arrays given, so under ``jit`` with a sharded batch they are those of the global batch.
"""

import jax
import jax.numpy as jnp
from jax import Array

from vgpt_jax.quantizers.search import l2_normalize, squared_distances


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
    used = jnp.zeros(countdown.shape, bool).at[token_ids.reshape(-1)].max(True)
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


def assigned_means(latents: Array, token_ids: Array, num_codes: int) -> tuple[Array, Array]:
    """How many latents each code has, ``[K]`` float32, and their mean, ``[K, D]``; 0 where there are none.

    Args:
      latents: ``[M, D]`` float32.
      token_ids: ``[M]`` int32.
      num_codes: K.
    """
    counts = jnp.zeros(num_codes).at[token_ids].add(1.0)
    sums = jnp.zeros((num_codes, latents.shape[-1])).at[token_ids].add(latents)
    return counts, sums / jnp.maximum(counts, 1.0)[:, None]


def step_to_means(codes: Array, latents: Array, token_ids: Array, *, rate: float) -> tuple[Array, Array]:
    """Moves every code that has latents towards their mean by ``rate`` of the way; 1 is a step of Lloyd's k-means.

    That is gradient descent on ``sum |z - c|^2 / 2`` with each code's step divided by the number of its latents.

    Returns:
      Codes ``[K, D]`` and the number of latents of each, ``[K]`` float32.
    """
    counts, means = assigned_means(latents, token_ids, codes.shape[0])
    return jnp.where((counts > 0)[:, None], codes + rate * (means - codes), codes), counts


def kmeans(means: Array, latents: Array, *, iterations: int, spherical: bool = False) -> tuple[Array, Array]:
    """Lloyd's k-means from given means. A cluster without latents keeps its mean.

    Args:
      means: ``[K, D]`` float32, where it starts.
      latents: ``[M, D]`` float32.
      iterations: how often means are moved, at least 1.
      spherical: means are divided by their norms after every move; for latents on the unit sphere.

    Returns:
      Means ``[K, D]``, and how many latents each had in the last iteration, ``[K]`` float32.
    """
    counts = jnp.zeros(means.shape[0])
    for _ in range(iterations):
        token_ids = jnp.argmin(squared_distances(latents, means), axis=-1)
        means, counts = step_to_means(means, latents, token_ids, rate=1.0)
        if spherical:
            means = jnp.where((counts > 0)[:, None], l2_normalize(means), means)
    return means, counts


def ema_update(
    counts: Array, sums: Array, latents: Array, token_ids: Array, *, decay: float, epsilon: float
) -> tuple[Array, Array, Array]:
    """One step of a codebook that is the moving average of its latents.

    Args:
      counts: ``[K]`` float32, moving average of how many latents each code has a step.
      sums: ``[K, D]`` float32, moving average of their sums.
      latents: ``[M, D]`` float32.
      token_ids: ``[M]`` int32.
      decay: of both averages.
      epsilon: Laplace smoothing: what is added to each count, whose total stays as it is.

    Returns:
      Codes ``[K, D]``, counts and sums.

    Reference: van den Oord et al. 2017, arXiv 1711.00937, appendix A.1; smoothing as in Razavi et al. 2019, arXiv 1906.00446.
    """
    batch_counts, batch_means = assigned_means(latents, token_ids, counts.shape[0])
    counts = decay * counts + (1.0 - decay) * batch_counts
    sums = decay * sums + (1.0 - decay) * batch_means * batch_counts[:, None]
    total = jnp.sum(counts)
    smoothed = (counts + epsilon) / (total + counts.shape[0] * epsilon) * total
    return sums / smoothed[:, None], counts, sums


def add_relative_noise(key: Array, vectors: Array, fraction: float) -> Array:
    """Adds to each vector ``[..., D]`` isotropic Gaussian noise whose expected squared norm is (fraction * norm)^2."""
    scale = fraction * jnp.linalg.norm(vectors, axis=-1, keepdims=True) / vectors.shape[-1] ** 0.5
    return vectors + scale * jax.random.normal(key, vectors.shape, vectors.dtype)
