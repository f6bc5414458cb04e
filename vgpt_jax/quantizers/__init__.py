"""Quantizers: latents in, `QuantizerOutput` out. Nothing in this room knows of images, losses or training loops."""

from vgpt_jax.quantizers.output import QuantizerOutput
from vgpt_jax.quantizers.vector_quantize import VectorQuantize

QUANTIZERS = {"vector_quantize": VectorQuantize}

__all__ = ["QUANTIZERS", "QuantizerOutput", "VectorQuantize"]
