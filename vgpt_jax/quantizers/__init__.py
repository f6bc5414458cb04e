"""Quantizers: latents in, `QuantizerOutput` out. Nothing in this room knows of images, losses or training loops.

`Quantizer` is the interface; ``single.py`` names those that give one token a position, and `QUANTIZERS` these and those
that are composed of them.
"""

from vgpt_jax.quantizers.grouped import GroupedQuantize
from vgpt_jax.quantizers.multi_scale import MultiScaleQuantize
from vgpt_jax.quantizers.output import QuantizerOutput
from vgpt_jax.quantizers.quantizer import Quantizer
from vgpt_jax.quantizers.residual import ResidualQuantize
from vgpt_jax.quantizers.single import SINGLE_QUANTIZERS

QUANTIZERS = SINGLE_QUANTIZERS | {
    "grouped_quantize": GroupedQuantize,
    "residual_quantize": ResidualQuantize,
    "multi_scale_quantize": MultiScaleQuantize,
}

__all__ = ["QUANTIZERS", "Quantizer", "QuantizerOutput"]
