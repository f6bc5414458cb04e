"""What every quantizer returns."""

from flax import struct
from jax import Array


@struct.dataclass
class QuantizerOutput:
    """One forward pass through a quantizer.

    Attributes:
      z_q: ``[..., D]`` float32, the quantized latents. Its value is the stored code, to the bit; its gradient goes to the
        latents as if quantization were the identity (straight-through, arXiv 1308.3432).
      token_ids: ``[...]`` int32 in ``[0, K)``.
      z_e: ``[..., D]`` float32, the latents that were quantized: what codebook surgery draws new codes from.
      losses: every loss by its name, unweighted, float32 scalars.
      loss: the sum of ``losses``, each times its weight: what a training step adds to its own losses.
    """

    z_q: Array
    token_ids: Array
    z_e: Array
    losses: dict[str, Array]
    loss: Array
