"""Binary spherical quantization: a latent's signs are its code, on the unit sphere."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import check_range
from vgpt_jax.quantizers.binary import bit_entropies, bits_to_ids, ids_to_bits
from vgpt_jax.quantizers.output import QuantizerOutput
from vgpt_jax.quantizers.quantizer import Quantizer, straight_through
from vgpt_jax.quantizers.search import l2_normalize


class BSQ(Quantizer):
    """Replaces each latent by its signs over sqrt(D): K = 2^D codes on the unit sphere, without a codebook or a search.

    Latents are divided by their norm first, ``u = z / |z|``. So the error of the straight-through estimator is bounded,
    ``|u - z_q| < sqrt(2)``, whatever the encoder does, and no commitment is needed to keep it small. The norm of a latent
    is not coded; it gets no gradient, for the gradient of ``z_q`` passes through the division. No parameters and no state.

    Args:
      num_bits: D, 1 to 30. Each bit doubles the codes.
      entropy_weight: weight of ``sample entropy - diversity_gamma * codebook entropy``. 0 leaves it out.
      diversity_gamma: what the codebook entropy counts; above 1 it favours use over sureness.
      commitment_weight: weight of ``mean |u - sg(z_q)|^2``, of the normalized latents: it turns a latent towards its code.
      inverse_temperature: sharpness of the soft assignment ``q(c | u) = softmax(inverse_temperature * c.u)``, under which
        the bits are independent, with log-odds of ``2 * inverse_temperature * u / sqrt(D)``. Those of a typical latent,
        whose u are near ``+-1 / sqrt(D)``, are ``+-2 * inverse_temperature / D``. When they are small, the entropy loss is
        about minus an eighth of their variance over the batch, added up over bits, and weak; when they are large, it moves
        only latents near the border between two codes.
      entropy_group_bits: the codebook entropy is taken over groups of that many bits, joint within a group and added up, 1
        to 24 (`LFQ`). 1 is the paper's approximation, every bit by itself.
      rngs: not drawn from; all quantizers are built alike.

    Raises:
      UserError: an argument is out of its range; the message names it and the range.

    Reference: Zhao et al. 2024, arXiv 2406.07548, section 4.1 (the soft assignment, its factors, and the approximation of
    the codebook entropy, eq. 8). The authors' code has twice the log-odds for the same inverse temperature; its 1 is 2 here.
    As in `LFQ`, the first dimension is the most significant bit of an id.
    """

    def __init__(
        self,
        *,
        num_bits: int = 10,
        entropy_weight: float = 0.1,
        diversity_gamma: float = 1.0,
        commitment_weight: float = 0.0,
        inverse_temperature: float = 100.0,
        entropy_group_bits: int = 1,
        rngs: nnx.Rngs,
    ):
        check_range("bsq.num_bits", num_bits, least=1, most=30)
        check_range("bsq.entropy_weight", entropy_weight, least=0)
        check_range("bsq.diversity_gamma", diversity_gamma, least=0)
        check_range("bsq.commitment_weight", commitment_weight, least=0)
        check_range("bsq.inverse_temperature", inverse_temperature, above=0)
        check_range("bsq.entropy_group_bits", entropy_group_bits, least=1, most=24)

        self.num_codewords = 2**num_bits
        self.embedding_dim = num_bits
        self.entropy_weight = entropy_weight
        self.diversity_gamma = diversity_gamma
        self.commitment_weight = commitment_weight
        self.inverse_temperature = inverse_temperature
        self.entropy_group_bits = entropy_group_bits

    def __call__(self, z_e: Array, key: Array | None = None) -> QuantizerOutput:
        """Quantizes latents.

        Args:
          z_e: ``[..., D]`` of any float dtype; computed on in float32.
          key: not read; nothing is drawn.

        Returns:
          `QuantizerOutput` with the losses "commitment" (mean squared difference) and "entropy" (nats, may be negative).
          Its ``z_e`` are the latents that were quantized: the normalized ones, u.
        """
        token_ids = self.quantize(z_e)
        codes = self.dequantize(token_ids)
        u = l2_normalize(z_e.astype(jnp.float32))

        losses = {"commitment": jnp.mean((u - codes) ** 2)}
        if self.entropy_weight:
            logits = 2.0 * self.inverse_temperature / self.embedding_dim**0.5 * u
            sample_entropy, codebook_entropy = bit_entropies(logits, self.entropy_group_bits)
            losses["entropy"] = sample_entropy - self.diversity_gamma * codebook_entropy
        return QuantizerOutput(
            z_q=straight_through(u, codes),
            token_ids=token_ids,
            z_e=u,
            losses=losses,
            loss=sum(getattr(self, f"{name}_weight") * value for name, value in losses.items()),
        )

    def quantize(self, z_e: Array) -> Array:
        """The ids ``[...]`` int32 of the signs of latents ``[..., D]``; a 0 counts as negative."""
        self.check_width(z_e)
        return bits_to_ids(z_e > 0)

    def dequantize(self, token_ids: Array) -> Array:
        """The codes ``[..., D]`` float32, of norm 1, of ids ``[...]`` in ``[0, K)``."""
        scale = jnp.float32(self.embedding_dim**-0.5)
        return jnp.where(ids_to_bits(token_ids, self.embedding_dim), scale, -scale)
