"""Lookup-free quantization: a latent's signs are its code."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import check_range
from vgpt_jax.quantizers.binary import bit_entropies, bits_to_ids, ids_to_bits
from vgpt_jax.quantizers.output import QuantizerOutput
from vgpt_jax.quantizers.quantizer import Quantizer, straight_through


class LFQ(Quantizer):
    """Replaces each latent by its signs: K = 2^D codes, the corners of a cube, without a codebook or a search.

    No parameters and no state. What keeps all codes in use is the entropy loss: every latent sure of its code (a low sample
    entropy), all codes alike often (a high codebook entropy), under the soft assignment
    ``q(c | z) = softmax(-inverse_temperature * |z - c|^2)`` to all codes.

    Args:
      num_bits: D, 1 to 30. Each bit doubles the codes.
      codebook_scale: codes are ``+-codebook_scale`` in every dimension.
      entropy_weight: weight of ``sample entropy - diversity_gamma * codebook entropy``. 0 leaves it out.
      diversity_gamma: what the codebook entropy counts; above 1 it favours use over sureness.
      commitment_weight: weight of ``mean |z_e - sg(z_q)|^2``, which keeps latents near the corners.
      inverse_temperature: sharpness of the soft assignment. A bit's log-odds are
        ``4 * inverse_temperature * codebook_scale * z``, and the entropy loss moves only latents whose log-odds are not far
        from 0: at 100 and scale 1 those within some 0.02 of the border between two codes, at 1 most of a unit normal.
      entropy_group_bits: the codebook entropy is taken over groups of that many bits, joint within a group and added up, 1
        to 24. At least D is the entropy of the paper over all 2^D codes; fewer are an upper bound of it that knows less of
        how bits depend on each other, and cost less: M latents and groups of g bits ``M 2^g`` multiply-adds a group. The
        sample entropy is the same for all.
      rngs: not drawn from; all quantizers are built alike.

    Raises:
      UserError: an argument is out of its range; the message names it and the range.

    Reference: Yu et al. 2023, arXiv 2310.05737, section 3.1 (signs, eq. 3; entropy, eq. 5). The first dimension is the most
    significant bit of an id; there it is the least, which only renames the codes.
    """

    def __init__(
        self,
        *,
        num_bits: int = 10,
        codebook_scale: float = 1.0,
        entropy_weight: float = 0.1,
        diversity_gamma: float = 1.0,
        commitment_weight: float = 0.25,
        inverse_temperature: float = 100.0,
        entropy_group_bits: int = 9,
        rngs: nnx.Rngs,
    ):
        check_range("lfq.num_bits", num_bits, least=1, most=30)
        check_range("lfq.codebook_scale", codebook_scale, above=0)
        check_range("lfq.entropy_weight", entropy_weight, least=0)
        check_range("lfq.diversity_gamma", diversity_gamma, least=0)
        check_range("lfq.commitment_weight", commitment_weight, least=0)
        check_range("lfq.inverse_temperature", inverse_temperature, above=0)
        check_range("lfq.entropy_group_bits", entropy_group_bits, least=1, most=24)

        self.num_codewords = 2**num_bits
        self.embedding_dim = num_bits
        self.codebook_scale = codebook_scale
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
        """
        z_e = z_e.astype(jnp.float32)
        token_ids = self.quantize(z_e)
        codes = self.dequantize(token_ids)

        losses = {"commitment": jnp.mean((z_e - codes) ** 2)}
        if self.entropy_weight:
            # |z - c|^2 differs by 4 scale z between the two values of a bit
            logits = 4.0 * self.inverse_temperature * self.codebook_scale * z_e
            sample_entropy, codebook_entropy = bit_entropies(logits, self.entropy_group_bits)
            losses["entropy"] = sample_entropy - self.diversity_gamma * codebook_entropy
        return QuantizerOutput(
            z_q=straight_through(z_e, codes),
            token_ids=token_ids,
            z_e=z_e,
            losses=losses,
            loss=sum(getattr(self, f"{name}_weight") * value for name, value in losses.items()),
        )

    def quantize(self, z_e: Array) -> Array:
        """The ids ``[...]`` int32 of the signs of latents ``[..., D]``; a 0 counts as negative."""
        self.check_width(z_e)
        return bits_to_ids(z_e > 0)

    def dequantize(self, token_ids: Array) -> Array:
        """The codes ``[..., D]`` float32 of ids ``[...]`` in ``[0, K)``."""
        scale = jnp.float32(self.codebook_scale)
        return jnp.where(ids_to_bits(token_ids, self.embedding_dim), scale, -scale)
