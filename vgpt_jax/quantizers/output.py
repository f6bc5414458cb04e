"""What every quantizer returns."""

from typing import Any

from flax import struct
from jax import Array


@struct.dataclass
class QuantizerOutput:
    """One forward pass through a quantizer.

    Attributes:
      z_q: ``[..., D]`` float32, the quantized latents. Its value is the stored code; its gradient is the quantizer's
        estimate, as a rule that of the identity (straight-through, arXiv 1308.3432).
      token_ids: int32 in ``[0, K)``, of the latents' shape without D; composed quantizers: `Quantizer.token_shape`.
      z_e: ``[..., D]`` float32, the latents that were quantized: what codebook surgery draws new codes from.
      losses: every loss by its name, unweighted, float32 scalars.
      loss: the sum of ``losses``, each times its weight: what a training step adds to its own losses.
      parts: the outputs of the quantizers that a composed one is made of, for their surgery.
    """

    z_q: Array
    token_ids: Array
    z_e: Array
    losses: dict[str, Array]
    loss: Array
    parts: tuple[Any, ...] = ()
