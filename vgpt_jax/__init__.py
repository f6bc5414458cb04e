"""vgpt_jax: image generation by visual tokens, in JAX.

pixels -> tokenizer (encoder, quantizer, decoder) -> a grid of token ids -> a causal transformer conditioned on a class
-> sampled ids -> the tokenizer's decoder -> pictures -> a classifier that keeps the best of n.

The letters that shapes are written in, everywhere in this package:

    B  batch                    N  tokens of a picture, h*w, in raster order
    H W  image, in pixels       T  positions of a sequence (the condition and the tokens before the last: N)
    h w  token grid             V  vocabulary of the transformer: codes, classes, begin, padding
    C  channels                 K  codes in the codebook
    D  width of a vector        P  width of the space that the code search is projected to

Images are NHWC: uint8 in 0..255 before ``data/transforms.py``, float32 in the tokenizer's value range after it.
Names below are imported when they are first used, so that ``import vgpt_jax`` costs nothing.
"""

from importlib import import_module

_HOME_OF = {
    "BSQ": "vgpt_jax.quantizers.bsq",
    "ClassConditionedRejectionSampler": "vgpt_jax.sampling.rerank",
    "CondVisualGPT": "vgpt_jax.sampling.cond_visual_gpt",
    "ConvClassifier": "vgpt_jax.models.classifier",
    "DiVeQ": "vgpt_jax.quantizers.diveq",
    "FSQ": "vgpt_jax.quantizers.fsq",
    "GPT": "vgpt_jax.models.gpt",
    "GroupedQuantize": "vgpt_jax.quantizers.grouped",
    "IBQ": "vgpt_jax.quantizers.ibq",
    "LFQ": "vgpt_jax.quantizers.lfq",
    "MultiScaleQuantize": "vgpt_jax.quantizers.multi_scale",
    "PatchGAN": "vgpt_jax.models.patchgan",
    "QuantizerOutput": "vgpt_jax.quantizers.output",
    "ResidualQuantize": "vgpt_jax.quantizers.residual",
    "SimVQ": "vgpt_jax.quantizers.simvq",
    "StyleGANDiscriminator": "vgpt_jax.models.stylegan_discriminator",
    "Tokenizer": "vgpt_jax.models.tokenizer",
    "UserError": "vgpt_jax.errors",
    "VectorQuantize": "vgpt_jax.quantizers.vector_quantize",
}

__all__ = sorted(_HOME_OF)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"vgpt_jax has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
