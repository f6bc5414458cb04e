"""Binary spherical quantization: a latent's signs are its code, on the unit sphere."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import check_range
from vgpt_jax.quantizers.binary import SignQuantizer
from vgpt_jax.quantizers.output import QuantizerOutput
from vgpt_jax.quantizers.search import l2_normalize


class BSQ(SignQuantizer):
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
        check_range("bsq.num_bits", num_bits, least=1, most=30)  # before its root is taken
        super().__init__(
            "bsq",
            num_bits=num_bits,
            codebook_scale=num_bits**-0.5,
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
          Its ``z_e`` are the latents that were quantized: the normalized ones, u.
        """
        self.check_width(z_e)
        u = l2_normalize(z_e.astype(jnp.float32))
        return self.output(u, 2.0 * self.inverse_temperature * self.codebook_scale * u)
