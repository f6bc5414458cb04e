"""Lookup-free quantization: a latent's signs are its code."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.quantizers.binary import SignQuantizer
from vgpt_jax.quantizers.output import QuantizerOutput


class LFQ(SignQuantizer):
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
        super().__init__(
            "lfq",
            num_bits=num_bits,
            codebook_scale=codebook_scale,
            entropy_weight=entropy_weight,
            diversity_gamma=diversity_gamma,
            commitment_weight=commitment_weight,
            inverse_temperature=inverse_temperature,
            entropy_group_bits=entropy_group_bits,
        )

    def __call__(self, z_e: Array, key: Array | None = None) -> QuantizerOutput:
        """Quantizes latents.

        Args:
          z_e: ``[..., D]`` of any float dtype; computed on in float32.
          key: not read; nothing is drawn.

        Returns:
          `QuantizerOutput` with the losses "commitment" (mean squared difference) and "entropy" (nats, may be negative).
        """
        z = z_e.astype(jnp.float32)
        # |z - c|^2 differs by 4 scale z between the two values of a bit
        return self.output(z, 4.0 * self.inverse_temperature * self.codebook_scale * z)
