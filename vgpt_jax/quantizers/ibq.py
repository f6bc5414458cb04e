"""Index backpropagation: the one-hot index has the gradient of a softmax, so every code learns at every step."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import check_range
from vgpt_jax.quantizers.entropy import entropy_loss
from vgpt_jax.quantizers.output import QuantizerOutput
from vgpt_jax.quantizers.quantizer import Quantizer


class IBQ(Quantizer):
    """Replaces each latent by the code with the greatest inner product, differentiably in all codes.

    With ``p = softmax(C z)`` and the one-hot index ``i`` of its maximum, ``z_q = C^T (i - sg(p) + p)``: the value is the
    chosen code, the gradient that of the soft assignment. It goes to the chosen code, and through p to the latents and to
    every code, so codes that are never chosen still move with the latents and can be taken up again. There is no
    temperature in p: the length of latents and codes sets its sharpness. When both are short all codes get nearly the same
    gradient, when both are long only the chosen one does.

    A training step holds arrays of ``[M, K]`` for M latents: that is its price.

    Args:
      num_codewords: K. More codes reconstruct better and are harder to predict.
      embedding_dim: D, the width of a code. The paper has 256.
      index_weight: weight of ``mean |z_q - z_e|^2``, the first term of the double quantization loss; both sides have their
        gradients, that of ``z_q`` through the index.
      codebook_weight: weight of ``mean |sg(z_e) - c|^2``, which moves the chosen codes c to their latents.
      commitment_weight: beta, weight of ``mean |z_e - sg(c)|^2``, which keeps the encoder near its codes.
      entropy_weight: weight of the entropy penalty (`entropy_loss` of the inner products): sure choices, all codes in use.
        0 leaves it out.
      entropy_temperature: what the inner products are divided by in the penalty. Small follows the chosen code, large
        blurs over all.
      rngs: ``params`` for the codebook, which is drawn from the unit normal distribution.

    Raises:
      UserError: an argument is out of its range; the message names it and the range.

    Reference: Shi et al. 2024, arXiv 2412.02692, section 3 (double quantization loss: eq. 10). Weights, temperature and
    initial values are those of the authors' code, except that there beta stands at the codebook term instead.
    """

    def __init__(
        self,
        *,
        num_codewords: int = 16384,
        embedding_dim: int = 256,
        index_weight: float = 1.0,
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.05,
        entropy_temperature: float = 0.01,
        rngs: nnx.Rngs,
    ):
        check_range("ibq.num_codewords", num_codewords, least=2)
        check_range("ibq.embedding_dim", embedding_dim, least=1)
        check_range("ibq.index_weight", index_weight, least=0)
        check_range("ibq.codebook_weight", codebook_weight, least=0)
        check_range("ibq.commitment_weight", commitment_weight, least=0)
        check_range("ibq.entropy_weight", entropy_weight, least=0)
        check_range("ibq.entropy_temperature", entropy_temperature, above=0)
        self.num_codewords = num_codewords
        self.embedding_dim = embedding_dim
        self.index_weight = index_weight
        self.codebook_weight = codebook_weight
        self.commitment_weight = commitment_weight
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.codebook = nnx.Param(jax.random.normal(rngs.params(), (num_codewords, embedding_dim)))

    def __call__(self, z_e: Array, key: Array | None = None) -> QuantizerOutput:
        """Quantizes latents.

        Args:
          z_e: ``[..., D]`` of any float dtype; computed on in float32.
          key: not read; nothing is drawn.

        Returns:
          `QuantizerOutput` with the losses "index", "codebook" and "commitment" (mean squared differences) and, where it
          has a weight, "entropy" (nats).
        """
        self.check_width(z_e)
        z_e = jnp.asarray(z_e, jnp.float32)
        logits = self._logits(z_e)
        token_ids = self._choose(logits, z_e.shape[:-1])
        codes = self.dequantize(token_ids)

        # C^T i is the row that is taken. Of C^T (p - sg(p)) only the gradient counts, and that to p alone, as the weights
        # of C in it are 0; so the product may be of the default precision.
        sg = jax.lax.stop_gradient
        soft = jnp.matmul(jax.nn.softmax(logits, axis=-1), sg(self.codebook[...])).reshape(z_e.shape)
        z_q = codes + (soft - sg(soft))

        losses = {
            "index": jnp.mean((z_q - z_e) ** 2),
            "codebook": jnp.mean((sg(z_e) - codes) ** 2),
            "commitment": jnp.mean((z_e - sg(codes)) ** 2),
        }
        if self.entropy_weight:
            losses["entropy"] = entropy_loss(logits, self.entropy_temperature)[0]
        return QuantizerOutput(
            z_q=z_q,
            token_ids=token_ids,
            z_e=z_e,
            losses=losses,
            loss=sum(getattr(self, f"{name}_weight") * value for name, value in losses.items()),
        )

    def quantize(self, z_e: Array) -> Array:
        """The ids ``[...]`` int32 of the codes with the greatest inner product; a tie goes to the lowest id."""
        self.check_width(z_e)
        return self._choose(self._logits(jnp.asarray(z_e, jnp.float32)), z_e.shape[:-1])

    def dequantize(self, token_ids: Array) -> Array:
        """The stored codes ``[..., D]`` float32 of ids ``[...]`` in ``[0, K)``."""
        return self.codebook[...][token_ids]

    def _logits(self, z_e: Array) -> Array:
        """Inner products ``[M, K]`` of latents ``[..., D]``, M in all, with all codes."""
        z = z_e.reshape(-1, self.embedding_dim)
        return jnp.einsum("md,kd->mk", z, self.codebook[...], precision=jax.lax.Precision.HIGHEST)

    def _choose(self, logits: Array, shape: tuple[int, ...]) -> Array:
        """Ids of the greatest logits ``[M, K]``, int32 of ``shape``."""
        return jnp.argmax(logits, axis=-1).astype(jnp.int32).reshape(shape)
