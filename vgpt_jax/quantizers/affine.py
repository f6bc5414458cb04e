"""Affine reparametrization: codes that move together, so that a codebook follows its latents as a whole."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.quantizers.quantizer import Buffer

LATENTS_DECAY, CODEBOOK_DECAY = 0.99, 0.9
"""Decay of the running statistics of the latents and of the codebook."""


class LearnedAffine(nnx.Module):
    """``codes * (1 + scale) + shift`` with parameters ``[D]`` shared by all codes, so that every latent moves all of them.

    Reference: Huh et al. 2023, arXiv 2305.08842, section 3.1 (eq. 5), with learned parameters.
    """

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.zeros((dim,)))
        self.shift = nnx.Param(jnp.zeros((dim,)))

    def __call__(self, codes: Array) -> Array:
        """Stored codes ``[..., D]`` to those that are searched and returned."""
        return codes * (1.0 + self.scale[...]) + self.shift[...]

    def inverse(self, latents: Array) -> Array:
        """Latents ``[..., D]`` to the space of the stored codes, in which surgery is done. No gradient."""
        scale, shift = (jax.lax.stop_gradient(p[...]) for p in (self.scale, self.shift))
        factor = 1.0 + scale
        return (latents - shift) / jnp.where(jnp.abs(factor) < 1e-3, 1e-3, factor)

    def update(self, latents: Array, codes: Array, first: Array) -> None:
        """Nothing: the parameters learn from the losses."""


class StatisticsAffine(nnx.Module):
    """``(codes - codebook_mean) * latents_std / codebook_std + latents_mean`` with running statistics ``[D]``.

    The running mean and variance of the latents take the place of the codebook's own, so that a shift or a new scale of
    the latents carries all codes with it. The statistics of a batch are used from the next step on.

    Reference: Huh et al. 2023, arXiv 2305.08842, section 3.1, with moving averages in place of parameters.
    """

    def __init__(self, dim: int):
        self.latents_mean, self.codebook_mean = Buffer(jnp.zeros((dim,))), Buffer(jnp.zeros((dim,)))
        self.latents_variance, self.codebook_variance = Buffer(jnp.ones((dim,))), Buffer(jnp.ones((dim,)))

    def __call__(self, codes: Array) -> Array:
        """Stored codes ``[..., D]`` to those that are searched and returned."""
        return (codes - self.codebook_mean[...]) / self._ratio() + self.latents_mean[...]

    def inverse(self, latents: Array) -> Array:
        """Latents ``[..., D]`` to the space of the stored codes, in which surgery is done."""
        return (latents - self.latents_mean[...]) * self._ratio() + self.codebook_mean[...]

    def update(self, latents: Array, codes: Array, first: Array) -> None:
        """Counts latents ``[M, D]`` and stored codes ``[K, D]`` into the statistics; replaces these if ``first``."""
        for mean, variance, values, decay in (
            (self.latents_mean, self.latents_variance, latents, LATENTS_DECAY),
            (self.codebook_mean, self.codebook_variance, codes, CODEBOOK_DECAY),
        ):
            kept = jnp.where(first, 0.0, decay)
            mean[...] = kept * mean[...] + (1 - kept) * jnp.mean(values, axis=0)
            variance[...] = kept * variance[...] + (1 - kept) * jnp.var(values, axis=0)

    def _ratio(self) -> Array:
        """Standard deviation of the codebook over that of the latents, ``[D]``."""
        codebook, latents = (
            jnp.sqrt(jnp.maximum(v[...], 1e-5)) for v in (self.codebook_variance, self.latents_variance)
        )
        return codebook / latents


AFFINE = {"none": None, "learned": LearnedAffine, "statistics": StatisticsAffine}
