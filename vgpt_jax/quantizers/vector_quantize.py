"""The codebook of VQ-VAE, with the options of visual-gpt."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import UserError, check_range
from vgpt_jax.quantizers.output import QuantizerOutput
from vgpt_jax.quantizers.search import l2_normalize, squared_distances, uniformity_penalty
from vgpt_jax.quantizers.surgery import count_down, init_from_latents, replace_stale

INIT_METHODS = ("kaiming", "latent_random", "fixed")


class Buffer(nnx.Variable):
    """State of a quantizer that is saved with the model and that no gradient reaches."""


class VectorQuantize(nnx.Module):
    """Replaces each latent by the nearest of K codes.

    The search is for the nearest code in Euclidean distance, after normalising and projecting if asked, in that order;
    what is returned is always the stored code. `__call__` only searches and computes losses. What else happens to the
    codebook (initialisation after the warm start, replacement of unused codes) is `surgery`, which a training step calls
    after its optimizer's update.

    Args:
      num_codewords: K. More codes reconstruct better and are harder to keep in use and to predict.
      embedding_dim: D, the width of a code. Small ones (4 to 16) keep large codebooks in use (arXiv 2110.04627).
      cos_dist: search by cosine: latents and codes are divided by their norms for the search.
      proj_dim: P; latents and codes are multiplied by a ``[D, P]`` matrix each for the search. None: no projection.
      random_proj: the two matrices stay as they were drawn, and are one and the same. Otherwise they are parameters; as
        the search itself has no gradient, they learn from the penalty alone. Without ``proj_dim`` there are none.
      penalty_weight: weight of the loss that pushes the use of codes towards uniform. 0 leaves it out.
      pretrain_steps: warm start: for that many training steps the quantizer is the identity, its losses are 0.
      init_method: "kaiming" (He et al. uniform), "latent_random" (drawn from the latents of the batch that ends the warm
        start, or of the first one where there is none; He's until then), "fixed" (random points on the unit sphere that no
        gradient moves; ``replace_freq`` still replaces them).
      replace_freq: a code that was not used for that many training steps is replaced by a random latent of the batch.
        0 replaces none.
      replace_noise: norm of the noise that a replaced code gets, as a fraction of the latent's norm.
      commitment_weight: weight of ``mean |z_e - sg(z_q)|^2``, which keeps the encoder near its codes.
      codebook_weight: weight of ``mean |sg(z_e) - z_q|^2``, which moves the codes to their latents.
      penalty_temperature: sharpness of the soft assignment in the penalty (`uniformity_penalty`).
      rngs: ``params`` for the codebook and the projections.

    Raises:
      UserError: an argument is out of its range; the message names it and the range.

    Reference: van den Oord et al. 2017, arXiv 1711.00937; code factorization and cosine search: Yu et al. 2021, arXiv
    2110.04627; replacement: Huh et al. 2023, arXiv 2305.08842.

    Differs from visual-gpt: the losses are taken before the straight-through estimator, so the codebook learns; the
    penalty raises the entropy instead of lowering it; replacement and fixed codes work without a warm start.
    """

    def __init__(
        self,
        num_codewords: int = 1024,
        embedding_dim: int = 256,
        cos_dist: bool = False,
        proj_dim: int | None = None,
        random_proj: bool = False,
        penalty_weight: float = 0.25,
        pretrain_steps: int = 5000,
        init_method: str = "latent_random",
        *,
        replace_freq: int = 0,
        replace_noise: float = 0.01,
        commitment_weight: float = 1.0,
        codebook_weight: float = 1.0,
        penalty_temperature: float = 0.05,
        rngs: nnx.Rngs,
    ):
        for name, value, least in (
            ("num_codewords", num_codewords, 2),
            ("embedding_dim", embedding_dim, 1),
            ("proj_dim", 1 if proj_dim is None else proj_dim, 1),
            ("pretrain_steps", pretrain_steps, 0),
            ("replace_freq", replace_freq, 0),
            ("replace_noise", replace_noise, 0),
            ("commitment_weight", commitment_weight, 0),
            ("codebook_weight", codebook_weight, 0),
            ("penalty_weight", penalty_weight, 0),
        ):
            check_range(f"vector_quantize.{name}", value, least=least)
        if init_method not in INIT_METHODS:
            raise UserError(
                f"VectorQuantize: init_method is {init_method!r}, but must be one of {', '.join(INIT_METHODS)}"
            )
        check_range("vector_quantize.penalty_temperature", penalty_temperature, above=0)

        self.num_codewords = num_codewords
        self.embedding_dim = embedding_dim
        self.cos_dist = cos_dist
        self.pretrain_steps = pretrain_steps
        self.init_method = init_method
        self.replace_freq = replace_freq
        self.replace_noise = replace_noise
        self.commitment_weight = commitment_weight
        self.codebook_weight = codebook_weight
        self.penalty_weight = penalty_weight
        self.penalty_temperature = penalty_temperature

        if init_method == "fixed":
            self.codebook = Buffer(l2_normalize(jax.random.normal(rngs.params(), (num_codewords, embedding_dim))))
        else:
            he_uniform = jax.nn.initializers.he_uniform(in_axis=-1, out_axis=0)
            self.codebook = nnx.Param(he_uniform(rngs.params(), (num_codewords, embedding_dim)))

        if proj_dim is None:
            self.z_proj = self.code_proj = None
        else:
            matrix = jax.random.normal(rngs.params(), (embedding_dim, proj_dim)) / proj_dim**0.5
            if random_proj:
                self.z_proj = self.code_proj = Buffer(matrix)
            else:
                self.z_proj, self.code_proj = nnx.Param(matrix), nnx.Param(jnp.copy(matrix))

        self.steps = Buffer(jnp.zeros((), jnp.int32))  # training steps seen, counted by `surgery`
        self.countdown = Buffer(jnp.full((num_codewords,), replace_freq, jnp.int32))

    def __call__(self, z_e: Array) -> QuantizerOutput:
        """Quantizes latents.

        Args:
          z_e: ``[..., D]`` of any float dtype; computed on in float32.

        Returns:
          `QuantizerOutput` with the losses "commitment" and "codebook" (mean squared differences) and "penalty" (nats).
          During the warm start ``z_q`` is ``z_e`` and every loss is 0.
        """
        z_e = z_e.astype(jnp.float32)
        distances = self._distances(z_e)
        token_ids = jnp.argmin(distances, axis=-1).astype(jnp.int32).reshape(z_e.shape[:-1])
        codes = self.dequantize(token_ids)

        warming = self.is_warming_up()
        sg = jax.lax.stop_gradient
        losses = {"commitment": jnp.mean((z_e - sg(codes)) ** 2), "codebook": jnp.mean((sg(z_e) - codes) ** 2)}
        weights = {"commitment": self.commitment_weight, "codebook": self.codebook_weight}
        if self.penalty_weight:
            losses["penalty"] = uniformity_penalty(distances, self.penalty_temperature)
            weights["penalty"] = self.penalty_weight
        losses = {name: jnp.where(warming, 0.0, value) for name, value in losses.items()}

        value = sg(jnp.where(warming, z_e, codes))
        return QuantizerOutput(
            z_q=value + (z_e - sg(z_e)),  # the second term is exactly 0, and carries the gradient
            token_ids=token_ids,
            z_e=z_e,
            losses=losses,
            loss=sum(weights[name] * losses[name] for name in losses),
        )

    def quantize(self, z_e: Array) -> Array:
        """The ids ``[...]`` int32 of the codes nearest to latents ``[..., D]``; a tie goes to the lowest id."""
        distances = self._distances(z_e.astype(jnp.float32))
        return jnp.argmin(distances, axis=-1).astype(jnp.int32).reshape(z_e.shape[:-1])

    def dequantize(self, code: Array) -> Array:
        """The stored codes ``[..., D]`` float32 of ids ``[...]`` in ``[0, K)``."""
        return self.codebook[...][code]

    def is_warming_up(self) -> Array:
        """Whether the quantizer is still the identity, a bool scalar."""
        return self.steps[...] < self.pretrain_steps

    def surgery(self, output: QuantizerOutput, key: Array) -> None:
        """What follows the optimizer's update of a training step: counts it, initialises codes, replaces stale ones.

        Updates this module's variables in place; under ``jit`` it belongs between ``nnx.merge`` and ``nnx.state``.

        Args:
          output: of this step's forward pass; its token ids and latents are those of the global batch.
          key: PRNG key of this step.
        """
        init_key, replace_key = jax.random.split(key)
        latents = output.z_e.reshape(-1, self.embedding_dim)
        warming = self.is_warming_up()
        codes, steps = self.codebook[...], self.steps[...] + 1

        counts = jnp.logical_not(warming)
        if self.init_method == "latent_random":
            drawn = steps == max(self.pretrain_steps, 1)
            codes = init_from_latents(init_key, codes, latents, when=drawn)
            counts = counts & ~drawn  # this step's ids are of the codes before
        if self.replace_freq:
            countdown = count_down(self.countdown[...], output.token_ids, replace_freq=self.replace_freq, when=counts)
            codes, countdown = replace_stale(
                replace_key, codes, countdown, latents, replace_freq=self.replace_freq, noise=self.replace_noise
            )
            self.countdown[...] = countdown
        self.codebook[...] = codes
        self.steps[...] = steps

    def _distances(self, z_e: Array) -> Array:
        """Squared distances ``[M, K]`` in the space that is searched, of latents ``[..., D]`` with M vectors."""
        if z_e.shape[-1] != self.embedding_dim:
            raise UserError(
                f"VectorQuantize: latents are {z_e.shape[-1]} wide, but embedding_dim is {self.embedding_dim}"
            )
        z, codes = z_e.reshape(-1, self.embedding_dim), self.codebook[...]
        if self.cos_dist:
            z, codes = l2_normalize(z), l2_normalize(codes)
        if self.z_proj is not None:
            z = jnp.matmul(z, self.z_proj[...], precision=jax.lax.Precision.HIGHEST)
            codes = jnp.matmul(codes, self.code_proj[...], precision=jax.lax.Precision.HIGHEST)
        return squared_distances(z, codes)
