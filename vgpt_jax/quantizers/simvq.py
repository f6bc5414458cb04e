"""A frozen random codebook behind one learned linear map: a gradient for one code moves them all."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import check_range, choose
from vgpt_jax.quantizers.output import QuantizerOutput
from vgpt_jax.quantizers.quantizer import Buffer, Quantizer, straight_through
from vgpt_jax.quantizers.rotation import rotate_to
from vgpt_jax.quantizers.search import squared_distances

ESTIMATORS = {"straight_through": straight_through, "rotation": rotate_to}


class SimVQ(Quantizer):
    """Replaces each latent by the nearest row, in Euclidean distance, of a random codebook times a learned matrix.

    The codes are ``C W``: C ``[K, D]`` is drawn once and never learns, W ``[D, D]`` is the only parameter. Where a codebook
    that learns moves the codes that were chosen and leaves the others to die, here every gradient turns and stretches the
    whole space, and the unused codes with it. So nothing has to be replaced, and ``K`` can be large.

    Only the codebook loss has a gradient to W: both estimators pass that of ``z_q`` to the latents alone.

    Args:
      num_codewords: K. More codes reconstruct better and are harder to predict.
      embedding_dim: D, the width of a code.
      commitment_weight: weight of ``mean |z_e - sg(z_q)|^2``, which keeps the encoder near its codes. To weigh it less than
        the codebook loss is what makes the method work.
      codebook_weight: weight of ``mean |sg(z_e) - z_q|^2``, which moves W. At 0 nothing is learned.
      estimator: gradient to the latents: "straight_through", as in the paper, or "rotation" (the rotation trick, arXiv
        2410.06424).
      rngs: ``params`` for the codebook and the map.

    Raises:
      UserError: an argument is out of its range; the message names it and the range.

    Reference: Zhu et al. 2024, arXiv 2411.02038. The initial values (C normal with variance ``1 / D``, W uniform in
    ``+-D**-0.5``) and the weights are those of the authors' code; its map has a bias too, which the paper's has not.
    """

    def __init__(
        self,
        *,
        num_codewords: int = 8192,
        embedding_dim: int = 64,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        estimator: str = "straight_through",
        rngs: nnx.Rngs,
    ):
        check_range("simvq.num_codewords", num_codewords, least=2)
        check_range("simvq.embedding_dim", embedding_dim, least=1)
        check_range("simvq.commitment_weight", commitment_weight, least=0)
        check_range("simvq.codebook_weight", codebook_weight, least=0)
        self._estimate = choose("simvq.estimator", estimator, ESTIMATORS)
        self.num_codewords = num_codewords
        self.embedding_dim = embedding_dim
        self.commitment_weight = commitment_weight
        self.codebook_weight = codebook_weight

        scale = embedding_dim**-0.5
        self.codebook = Buffer(scale * jax.random.normal(rngs.params(), (num_codewords, embedding_dim)))
        matrix = jax.random.uniform(rngs.params(), (embedding_dim, embedding_dim), minval=-scale, maxval=scale)
        self.codebook_map = nnx.Param(matrix)

    def __call__(self, z_e: Array, key: Array | None = None) -> QuantizerOutput:
        """Quantizes latents.

        Args:
          z_e: ``[..., D]`` of any float dtype; computed on in float32.
          key: not read; nothing is drawn.

        Returns:
          `QuantizerOutput` with the losses "commitment" and "codebook" (mean squared differences).
        """
        self.check_width(z_e)
        z_e = jnp.asarray(z_e, jnp.float32)
        all_codes = self.codes()
        token_ids = self._search(z_e, all_codes)
        codes = all_codes[token_ids]
        sg = jax.lax.stop_gradient
        losses = {"commitment": jnp.mean((z_e - sg(codes)) ** 2), "codebook": jnp.mean((sg(z_e) - codes) ** 2)}
        return QuantizerOutput(
            z_q=self._estimate(z_e, codes),
            token_ids=token_ids,
            z_e=z_e,
            losses=losses,
            loss=self.commitment_weight * losses["commitment"] + self.codebook_weight * losses["codebook"],
        )

    def quantize(self, z_e: Array) -> Array:
        """The ids ``[...]`` int32 of the codes nearest to latents ``[..., D]``; a tie goes to the lowest id."""
        self.check_width(z_e)
        return self._search(jnp.asarray(z_e, jnp.float32), self.codes())

    def dequantize(self, token_ids: Array) -> Array:
        """The codes ``[..., D]`` float32 of ids ``[...]`` in ``[0, K)``."""
        # All codes are mapped, then some are taken, as in `__call__`: a product of another shape may round differently.
        return self.codes()[token_ids]

    def codes(self) -> Array:
        """All codes ``[K, D]`` float32: the frozen codebook times the learned map."""
        return jnp.matmul(self.codebook[...], self.codebook_map[...], precision=jax.lax.Precision.HIGHEST)

    def _search(self, z_e: Array, codes: Array) -> Array:
        """Ids ``[...]`` int32 of the codes ``[K, D]`` nearest to latents ``[..., D]``."""
        distances = squared_distances(z_e.reshape(-1, self.embedding_dim), codes)
        return jnp.argmin(distances, axis=-1).astype(jnp.int32).reshape(z_e.shape[:-1])
