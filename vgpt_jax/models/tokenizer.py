"""The tokenizer: an encoder, a quantizer and a decoder, with the linear maps of code factorization between them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import Array

from vgpt_jax.errors import UserError, choose
from vgpt_jax.models.layers import DTYPES, in_float32
from vgpt_jax.models.maskgit_vqgan import MaskGITDecoder, MaskGITEncoder
from vgpt_jax.models.vqgan import VQGANDecoder, VQGANEncoder
from vgpt_jax.models.vqvae import VQVAEDecoder, VQVAEEncoder
from vgpt_jax.quantizers import QUANTIZERS, QuantizerOutput

ARCHITECTURES = {
    "vqgan": (VQGANEncoder, VQGANDecoder),
    "vqvae": (VQVAEEncoder, VQVAEDecoder),
    "maskgit_vqgan": (MaskGITEncoder, MaskGITDecoder),
}


@struct.dataclass
class TokenizerOutput:
    """What a forward pass gives.

    Attributes:
      reconstruction: ``[B, H, W, 3]`` float32, not clipped.
      quantized: with ids ``[B, *token_shape]``.
      features: what the decoder's last layer made the reconstruction of.
    """

    reconstruction: Array
    quantized: QuantizerOutput
    features: Array


class Tokenizer(nnx.Module):
    """Pictures to a grid of token ids and back.

    Args:
      image_size: H and W in pixels.
      architecture: "vqgan", "vqvae" or "maskgit_vqgan": which encoder and decoder.
      architecture_args: their arguments, the same for both (``VQGANEncoder``, ``VQVAEEncoder``, ``MaskGITEncoder``).
      quantizer: a name in ``QUANTIZERS``.
      quantizer_args: its arguments.
      code_factorization: linear maps from the latents' channels to the codes' width and back (arXiv 2110.04627, section
        3.2). Without it the two must be equal.
      factorization_bias: of those maps. VQ-GAN and LlamaGen have biases (their 1x1 convolutions around the quantizer),
        visual-gpt has none.
      dtype: "float32" or "bfloat16", of encoder and decoder in `__call__`; parameters, the quantizer and `encode` are
        float32 always.
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
        factorization_bias: bool = False,
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
            arguments = {"use_bias": factorization_bias, "dtype": jnp.float32, "rngs": rngs}
            self.pre_quant = nnx.Linear(z_channels, width, **arguments)
            self.post_quant = nnx.Linear(width, z_channels, **arguments)
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

    @property
    def token_shape(self) -> tuple[int, ...]:
        """The shape of the token ids of one picture: ``(h, w)``, or what a composed quantizer makes of it."""
        return self.quantizer.token_shape(self.grid)

    @property
    def num_tokens(self) -> int:
        """N, the token ids of a picture."""
        return math.prod(self.token_shape)

    def __call__(self, images: Array, key: Array | None = None) -> TokenizerOutput:
        """Reconstructs images ``[B, H, W, 3]``, float32 in the value range that they are trained in.

        Args:
          images: the batch.
          key: PRNG key of a training step, for dropout and for the quantizers that draw; None: neither.
        """
        encoder_key, quantizer_key, decoder_key = (None,) * 3 if key is None else jax.random.split(key, 3)
        quantized = self.quantizer(self.latents(images, encoder_key), quantizer_key)
        features = self.decoder.features(self._to_decoder(quantized.z_q), decoder_key)
        return TokenizerOutput(self.decoder.last_layer(features).astype(jnp.float32), quantized, features)

    def latents(self, images: Array, dropout_key: Array | None = None) -> Array:
        """Images ``[B, H, W, 3]`` to what the quantizer is given, ``[B, h, w, D]`` float32."""
        z = self.encoder(images, dropout_key).astype(jnp.float32)
        return z if self.pre_quant is None else self.pre_quant(z)

    def decode_latents(self, z_q: Array) -> Array:
        """Quantized latents ``[B, h, w, D]`` to images ``[B, H, W, 3]`` float32, not clipped."""
        return self.decoder(self._to_decoder(z_q)).astype(jnp.float32)

    def encode(self, images: Array) -> Array:
        """Images ``[B, H, W, 3]`` to token ids ``[B, *token_shape]`` int32.

        Always float32, at full precision whatever the device's default: in bfloat16 the latents are a part in a hundred
        off, and those halfway between two codes change sides.
        """
        with jax.default_matmul_precision("float32"):
            z = in_float32(self.encoder)(images)
            return self.quantizer.quantize(z if self.pre_quant is None else self.pre_quant(z))

    def decode(self, token_ids: Array) -> Array:
        """Token ids ``[B, *token_shape]`` int32 to images ``[B, H, W, 3]`` float32, not clipped."""
        return self.decode_latents(self.quantizer.dequantize(token_ids))

    def _to_decoder(self, z_q: Array) -> Array:
        return z_q if self.post_quant is None else self.post_quant(z_q)
