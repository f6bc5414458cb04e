"""The tokenizer: an encoder, a quantizer and a decoder, with the linear maps of code factorization between them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import Array

from vgpt_jax.errors import UserError, choose
from vgpt_jax.models.layers import DTYPES
from vgpt_jax.models.vqgan import VQGANDecoder, VQGANEncoder
from vgpt_jax.models.vqvae import VQVAEDecoder, VQVAEEncoder
from vgpt_jax.quantizers import QUANTIZERS, QuantizerOutput

ARCHITECTURES = {"vqgan": (VQGANEncoder, VQGANDecoder), "vqvae": (VQVAEEncoder, VQVAEDecoder)}


@struct.dataclass
class TokenizerOutput:
    """Attributes: ``reconstruction`` ``[B, H, W, 3]`` float32, not clipped; ``quantized`` with ids ``[B, h, w]``."""

    reconstruction: Array
    quantized: QuantizerOutput


class Tokenizer(nnx.Module):
    """Pictures to a grid of token ids and back.

    Args:
      image_size: H and W in pixels.
      architecture: "vqgan" or "vqvae": which encoder and decoder.
      architecture_args: their arguments, the same for both (``VQGANEncoder``, ``VQVAEEncoder``).
      quantizer: "vector_quantize".
      quantizer_args: its arguments (``VectorQuantize``).
      code_factorization: bias-free linear maps from the latents' channels to the codes' width and back (arXiv
        2110.04627, section 3.2). Without it the two must be equal.
      dtype: "float32" or "bfloat16", of encoder and decoder; the quantizer is float32 always.
      rngs: ``params``.

    Raises:
      UserError: an unknown name, or widths that do not fit.
    """

    def __init__(
        self,
        *,
        image_size: int,
        architecture: str = "vqgan",
        architecture_args: dict[str, Any],
        quantizer: str = "vector_quantize",
        quantizer_args: dict[str, Any],
        code_factorization: bool = True,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        encoder, decoder = choose("tokenizer.architecture", architecture, ARCHITECTURES)
        compute_dtype = choose("tokenizer.dtype", dtype, DTYPES)
        self.encoder = encoder(image_size=image_size, dtype=compute_dtype, rngs=rngs, **architecture_args)
        self.decoder = decoder(image_size=image_size, dtype=compute_dtype, rngs=rngs, **architecture_args)
        self.quantizer = choose("tokenizer.quantizer", quantizer, QUANTIZERS)(rngs=rngs, **quantizer_args)

        z_channels, width = self.encoder.conv_out.out_features, self.quantizer.embedding_dim
        if code_factorization:
            self.pre_quant = nnx.Linear(z_channels, width, use_bias=False, dtype=jnp.float32, rngs=rngs)
            self.post_quant = nnx.Linear(width, z_channels, use_bias=False, dtype=jnp.float32, rngs=rngs)
        elif z_channels != width:
            raise UserError(
                f"the latents have {z_channels} channels and the codes are {width} wide: make them equal, or set "
                "tokenizer.code_factorization"
            )
        else:
            self.pre_quant = self.post_quant = None
        self.image_size = image_size
        self.grid = (image_size // self.encoder.downsampling,) * 2

    @property
    def num_codes(self) -> int:
        """K."""
        return self.quantizer.num_codewords

    def __call__(self, images: Array, dropout_key: Array | None = None) -> TokenizerOutput:
        """Reconstructs images ``[B, H, W, 3]``, float32 in the value range that they are trained in."""
        encoder_key, decoder_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        quantized = self.quantizer(self.latents(images, encoder_key))
        return TokenizerOutput(self.decode_latents(quantized.z_q, decoder_key), quantized)

    def latents(self, images: Array, dropout_key: Array | None = None) -> Array:
        """Images ``[B, H, W, 3]`` to what the quantizer is given, ``[B, h, w, D]`` float32."""
        z = self.encoder(images, dropout_key).astype(jnp.float32)
        return z if self.pre_quant is None else self.pre_quant(z)

    def decode_latents(self, z_q: Array, dropout_key: Array | None = None) -> Array:
        """Quantized latents ``[B, h, w, D]`` to images ``[B, H, W, 3]`` float32, not clipped."""
        z = z_q if self.post_quant is None else self.post_quant(z_q)
        return self.decoder(z, dropout_key).astype(jnp.float32)

    def encode(self, images: Array) -> Array:
        """Images ``[B, H, W, 3]`` to token ids ``[B, h, w]`` int32."""
        return self.quantizer.quantize(self.latents(images))

    def decode(self, token_ids: Array) -> Array:
        """Token ids ``[B, h, w]`` int32 to images ``[B, H, W, 3]`` float32, not clipped."""
        return self.decode_latents(self.quantizer.dequantize(token_ids))
