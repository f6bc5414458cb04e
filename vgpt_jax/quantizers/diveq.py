"""Directional reparametrisation: the quantization error as a random vector whose length the task's gradient shortens."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import check_range, choose
from vgpt_jax.quantizers.output import QuantizerOutput
from vgpt_jax.quantizers.quantizer import Buffer, Quantizer, straight_through
from vgpt_jax.quantizers.search import l2_normalize, squared_distances
from vgpt_jax.quantizers.surgery import count_down, init_from_latents, replace_stale

INIT_METHODS = {"kaiming": False, "latent_random": True}  # whether the first step's latents become the codes


def directional_reparam(z_e: Array, codes: Array, noise: Array | float) -> Array:
    """A step from each latent as long as the way to its code and nearly in its direction: ``z + |c - z| sg(unit(c - z + n))``.

    The length has a gradient to both ends, so the codes learn from whatever loss follows; the direction counts as constant.
    Without noise the value is the code, but for rounding.

    Args:
      z_e: ``[..., D]`` float32.
      codes: ``[..., D]`` float32, one for each latent.
      noise: n, of the same shape, or 0.

    Returns:
      ``[..., D]`` float32. Where a latent is its code the length is 0 and has no gradient, so the latent keeps its own.

    Reference: Vali et al. 2025, arXiv 2509.26469 (openreview KRVnpTbx7R), DiVeQ.
    """
    error = codes - z_e
    square = jnp.sum(error**2, axis=-1, keepdims=True)
    apart = square > 0
    length = jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)  # a root at 0 has no finite gradient
    return z_e + length * jax.lax.stop_gradient(l2_normalize(error + noise))


class DiVeQ(Quantizer):
    """Replaces each latent by the nearest of K codes, which learn from the task's loss alone.

    In training ``z_q`` is `directional_reparam`: as far from the latent as the code is, but in a direction with noise. So
    encoder and codebook get the gradient of the very loss that is to fall, and there is neither a commitment nor a codebook
    loss to weigh. In evaluation (``key=None``) and in `dequantize` it is the nearest code itself.

    It needs replacement: only the chosen codes get gradients, and no loss draws the others to the latents, so a code that
    is not chosen never moves. Leave ``replace_freq`` on unless something else keeps all codes in use.

    Args:
      num_codewords: K. More codes reconstruct better and are harder to keep in use and to predict.
      embedding_dim: D, the width of a code.
      noise_variance: variance of each component of the noise, in squared units of the latents. What counts is
        ``sqrt(noise_variance * D)`` against the distance to the code: far below it changes nothing, far above the direction
        is at random.
      init_method: "kaiming" (He et al. uniform), or "latent_random" (drawn from the latents of the first training step).
      replace_freq: a code that was not used for that many training steps is replaced by a random latent of the batch.
        0 replaces none.
      replace_noise: norm of the noise that a replaced code gets, as a fraction of the latent's norm.
      rngs: ``params`` for the codebook.

    Raises:
      UserError: an argument is out of its range; the message names it and the range.

    Reference: Vali et al. 2025, arXiv 2509.26469 (openreview KRVnpTbx7R), DiVeQ. Variance and steps to replacement are the
    defaults of the authors' package; it replaces by used codes, here it is by latents (Huh et al. 2023, arXiv 2305.08842).
    """

    def __init__(
        self,
        *,
        num_codewords: int = 1024,
        embedding_dim: int = 64,
        noise_variance: float = 0.001,
        init_method: str = "latent_random",
        replace_freq: int = 100,
        replace_noise: float = 0.01,
        rngs: nnx.Rngs,
    ):
        check_range("diveq.num_codewords", num_codewords, least=2)
        check_range("diveq.embedding_dim", embedding_dim, least=1)
        check_range("diveq.noise_variance", noise_variance, least=0)
        check_range("diveq.replace_freq", replace_freq, least=0)
        check_range("diveq.replace_noise", replace_noise, least=0)
        self._from_latents = choose("diveq.init_method", init_method, INIT_METHODS)
        self.num_codewords = num_codewords
        self.embedding_dim = embedding_dim
        self.noise_variance = noise_variance
        self.replace_freq = replace_freq
        self.replace_noise = replace_noise

        he_uniform = jax.nn.initializers.he_uniform(in_axis=-1, out_axis=0)
        self.codebook = nnx.Param(he_uniform(rngs.params(), (num_codewords, embedding_dim)))
        self.steps = Buffer(jnp.zeros((), jnp.int32))  # training steps seen, counted by `surgery`
        self.countdown = Buffer(jnp.full((num_codewords,), replace_freq, jnp.int32))

    def __call__(self, z_e: Array, key: Array | None = None) -> QuantizerOutput:
        """Quantizes latents.

        Args:
          z_e: ``[..., D]`` of any float dtype; computed on in float32.
          key: PRNG key of the noise. None: no noise, and ``z_q`` is the code to the bit.

        Returns:
          `QuantizerOutput` without losses.
        """
        token_ids = self.quantize(z_e)
        z_e = jnp.asarray(z_e, jnp.float32)
        codes = self.dequantize(token_ids)
        if key is None:
            z_q = straight_through(directional_reparam(z_e, codes, 0.0), codes)
        else:
            z_q = directional_reparam(z_e, codes, self.noise_variance**0.5 * jax.random.normal(key, z_e.shape))
        return QuantizerOutput(z_q=z_q, token_ids=token_ids, z_e=z_e, losses={}, loss=jnp.zeros(()))

    def quantize(self, z_e: Array) -> Array:
        """The ids ``[...]`` int32 of the codes nearest to latents ``[..., D]``; a tie goes to the lowest id."""
        self.check_width(z_e)
        z = jnp.asarray(z_e, jnp.float32).reshape(-1, self.embedding_dim)
        distances = squared_distances(z, self.codebook[...])
        return jnp.argmin(distances, axis=-1).astype(jnp.int32).reshape(z_e.shape[:-1])

    def dequantize(self, token_ids: Array) -> Array:
        """The stored codes ``[..., D]`` float32 of ids ``[...]`` in ``[0, K)``."""
        return self.codebook[...][token_ids]

    def surgery(self, output: QuantizerOutput, key: Array) -> None:
        """What follows the optimizer's update of a training step: counts it, initialises codes, replaces stale ones.

        Updates this module's variables in place; under ``jit`` it belongs between ``nnx.merge`` and ``nnx.state``.

        Args:
          output: of this step's forward pass; its token ids and latents are those of the global batch.
          key: PRNG key of this step.
        """
        init_key, replace_key = jax.random.split(key)
        latents = output.z_e.reshape(-1, self.embedding_dim)
        codes, steps = self.codebook[...], self.steps[...] + 1
        drawn = (steps == 1) & self._from_latents
        codes = init_from_latents(init_key, codes, latents, when=drawn)
        if self.replace_freq:
            counts = ~drawn  # the ids of the step that draws are of the codes before
            countdown = count_down(self.countdown[...], output.token_ids, replace_freq=self.replace_freq, when=counts)
            codes, self.countdown[...] = replace_stale(
                replace_key, codes, countdown, latents, replace_freq=self.replace_freq, noise=self.replace_noise
            )
        self.codebook[...] = codes
        self.steps[...] = steps
