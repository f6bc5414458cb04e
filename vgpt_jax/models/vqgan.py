"""The encoder and decoder of VQ-GAN (Esser et al. 2021, arXiv 2012.09841, table 7), as published with taming-transformers.

Residual blocks of GroupNorm, swish and 3x3 convolutions; attention at chosen resolutions; strided convolutions with
asymmetric padding on the way down, nearest-neighbour upsampling and a convolution on the way up.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from vgpt_jax.errors import UserError, check_range
from vgpt_jax.models.layers import block_output, dropout, lecun_normal


def group_norm(channels: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """GroupNorm over 32 groups, or over as many of them as divide ``channels``. Statistics are float32."""
    return nnx.GroupNorm(channels, num_groups=math.gcd(32, channels), epsilon=1e-6, dtype=jnp.float32, rngs=rngs)


def conv3x3(in_channels: int, out_channels: int, dtype, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(in_channels, out_channels, (3, 3), padding=1, kernel_init=lecun_normal, dtype=dtype, rngs=rngs)


def conv1x1(in_channels: int, out_channels: int, dtype, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(in_channels, out_channels, (1, 1), kernel_init=lecun_normal, dtype=dtype, rngs=rngs)


class ResidualBlock(nnx.Module):
    """``x + conv(swish(norm(conv(swish(norm(x))))))``, with a 1x1 shortcut where the channels change."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float, dtype, rngs: nnx.Rngs):
        self.norm1 = group_norm(in_channels, rngs)
        self.conv1 = conv3x3(in_channels, out_channels, dtype, rngs)
        self.norm2 = group_norm(out_channels, rngs)
        self.conv2 = conv3x3(out_channels, out_channels, dtype, rngs)
        self.shortcut = conv1x1(in_channels, out_channels, dtype, rngs) if in_channels != out_channels else None
        self.dropout = dropout

    def __call__(self, x: Array, dropout_key: Array | None = None) -> Array:
        y = self.conv1(jax.nn.swish(self.norm1(x)))
        y = self.conv2(dropout(jax.nn.swish(self.norm2(y)), self.dropout, dropout_key))
        return block_output(y + (x if self.shortcut is None else self.shortcut(x)))


class AttentionBlock(nnx.Module):
    """Single-head self-attention over all positions, with a residual connection."""

    def __init__(self, channels: int, dtype, rngs: nnx.Rngs):
        self.norm = group_norm(channels, rngs)
        self.query = conv1x1(channels, channels, dtype, rngs)
        self.key = conv1x1(channels, channels, dtype, rngs)
        self.value = conv1x1(channels, channels, dtype, rngs)
        self.out = conv1x1(channels, channels, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        y = self.norm(x)
        query, key, value = (m(y).reshape(batch, height * width, channels) for m in (self.query, self.key, self.value))
        scores = jnp.einsum("bqc,bkc->bqk", query, key, preferred_element_type=jnp.float32) / channels**0.5
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        y = jnp.einsum("bqk,bkc->bqc", weights, value).reshape(x.shape)
        return block_output(x + self.out(y))


class Downsample(nnx.Module):
    """A 3x3 convolution of stride 2, padded by a row below and a column on the right: ``[B, H, W, C] -> [B, H/2, W/2, C]``."""

    def __init__(self, channels: int, dtype, rngs: nnx.Rngs):
        options = {"strides": 2, "padding": ((0, 1), (0, 1)), "kernel_init": lecun_normal}
        self.conv = nnx.Conv(channels, channels, (3, 3), **options, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour upsampling and a 3x3 convolution: ``[B, H, W, C] -> [B, 2H, 2W, C]``.

    Neighbours in the upsampled image are equal, so at each of the four positions inside an old pixel the 3x3 kernel is a 2x2
    kernel over old pixels, whose entries are sums of its own: the same result for four ninths of the arithmetic.
    """

    def __init__(self, channels: int, dtype, rngs: nnx.Rngs):
        self.conv = conv3x3(channels, channels, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        kernels = jnp.einsum("atk,bsl,klio->abtsio", PHASES, PHASES, self.conv.kernel[...], precision="highest")
        x, kernels = x.astype(self.conv.dtype), kernels.astype(self.conv.dtype)

        def at(a: int, b: int) -> Array:  # the new pixels of one position, [B, H, W, C]
            padding = ((1 - a, a), (1 - b, b))
            return jax.lax.conv_general_dilated(x, kernels[a, b], (1, 1), padding, dimension_numbers=LAYOUT)

        y = jnp.stack([jnp.stack([at(a, b) for b in (0, 1)], axis=3) for a in (0, 1)], axis=2)  # [B, H, 2, W, 2, C]
        return y.reshape(batch, 2 * height, 2 * width, channels) + self.conv.bias[...].astype(self.conv.dtype)


LAYOUT = ("NHWC", "HWIO", "NHWC")
PHASES = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)
"""Which of a kernel's three rows fall on each of two old pixels: ``[position inside the pixel, old pixel, row]``."""


class Level(nnx.Module):
    """The blocks of one resolution: residual blocks, each followed by attention if asked, then a change of resolution."""

    def __init__(self, channels: Sequence[int], attention: bool, resample, dropout: float, dtype, rngs: nnx.Rngs):
        pairs = list(zip(channels[:-1], channels[1:], strict=True))
        self.blocks = nnx.List([ResidualBlock(i, o, dropout, dtype, rngs) for i, o in pairs])
        self.attentions = nnx.List([AttentionBlock(o, dtype, rngs) for _, o in pairs] if attention else [])
        self.resample = resample(channels[-1], dtype, rngs) if resample else None

    def __call__(self, x: Array, dropout_key: Array | None) -> Array:
        for i, block in enumerate(self.blocks):
            x = block(x, fold(dropout_key, i))
            if self.attentions:
                x = self.attentions[i](x)
        return x if self.resample is None else self.resample(x)


class Middle(nnx.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, channels: int, dropout: float, dtype, rngs: nnx.Rngs):
        self.block1 = ResidualBlock(channels, channels, dropout, dtype, rngs)
        self.attention = AttentionBlock(channels, dtype, rngs)
        self.block2 = ResidualBlock(channels, channels, dropout, dtype, rngs)

    def __call__(self, x: Array, dropout_key: Array | None) -> Array:
        x = self.attention(self.block1(x, fold(dropout_key, 0)))
        return self.block2(x, fold(dropout_key, 1))


def fold(key: Array | None, index: int) -> Array | None:
    return None if key is None else jax.random.fold_in(key, index)


def check_sizes(*, z_channels: int, ch: int, ch_mult: Sequence[int], num_res_blocks: int, dropout: float) -> None:
    """Raises `UserError` for sizes that make no network."""
    if not ch_mult:
        raise UserError("vqgan.ch_mult is empty: give at least one level")
    for name, size in (
        ("z_channels", z_channels),
        ("ch", ch),
        ("num_res_blocks", num_res_blocks),
        ("ch_mult", min(ch_mult)),
    ):
        check_range(f"vqgan.{name}", size, least=1)
    check_range("vqgan.dropout", dropout, least=0, most=0.99)


def check_halvings(image_size: int, ch_mult: Sequence[int]) -> None:
    """Raises `UserError` where ``image_size`` cannot be halved on the way from each level to the next."""
    times = len(ch_mult) - 1
    if image_size % 2**times:
        raise UserError(f"image_size {image_size} cannot be halved {times} times (ch_mult has {len(ch_mult)} levels)")


def attended(image_size: int, ch_mult: Sequence[int], attn_resolutions: Sequence[int]) -> list[bool]:
    """Which levels have attention.

    Raises:
      UserError: a resolution of ``attn_resolutions`` is none of the levels', or ``image_size`` cannot be halved so often.
    """
    check_halvings(image_size, ch_mult)
    resolutions = [image_size // 2**i for i in range(len(ch_mult))]
    absent = sorted(set(attn_resolutions) - set(resolutions))
    if absent:
        raise UserError(f"attn_resolutions has {absent}, but the levels of a {image_size} px image are {resolutions}")
    return [resolution in attn_resolutions for resolution in resolutions]


class VQGANEncoder(nnx.Module):
    """Images to latents.

    Args:
      image_size: H and W in pixels; decides with ``attn_resolutions`` where attention is.
      z_channels: channels of the latents.
      ch: channels at full resolution; the cost of a step grows with its square.
      ch_mult: channels of each level as a multiple of ``ch``; one level more halves the token grid again.
      num_res_blocks: residual blocks of each level.
      attn_resolutions: resolutions in pixels at which every block is followed by attention.
      dropout: rate inside residual blocks, while training.
      dtype: of the computation; parameters and normalisation are float32.
      rngs: ``params``.
    """

    def __init__(
        self,
        *,
        image_size: int,
        z_channels: int = 256,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (),
        dropout: float = 0.0,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes(z_channels=z_channels, ch=ch, ch_mult=ch_mult, num_res_blocks=num_res_blocks, dropout=dropout)
        attention = attended(image_size, ch_mult, attn_resolutions)
        widths = [ch] + [ch * m for m in ch_mult]
        last = len(ch_mult) - 1
        self.downsampling = 2**last
        self.conv_in = conv3x3(3, ch, dtype, rngs)
        self.levels = nnx.List(
            [
                Level(
                    [widths[i]] + [widths[i + 1]] * num_res_blocks,
                    attention[i],
                    Downsample if i < last else None,
                    dropout,
                    dtype,
                    rngs,
                )
                for i in range(len(ch_mult))
            ]
        )
        self.middle = Middle(widths[-1], dropout, dtype, rngs)
        self.norm_out = group_norm(widths[-1], rngs)
        self.conv_out = conv3x3(widths[-1], z_channels, dtype, rngs)

    def __call__(self, images: Array, dropout_key: Array | None = None) -> Array:
        """``[B, H, W, 3]`` to ``[B, h, w, z_channels]``; dropout is on where ``dropout_key`` is given."""
        x = self.conv_in(images)
        for i, level in enumerate(self.levels):
            x = level(x, fold(dropout_key, i))
        x = self.middle(x, fold(dropout_key, len(self.levels)))
        return self.conv_out(jax.nn.swish(self.norm_out(x)))


class VQGANDecoder(nnx.Module):
    """Latents to images: the encoder mirrored, with one residual block more a level. Arguments as `VQGANEncoder`'s."""

    def __init__(
        self,
        *,
        image_size: int,
        z_channels: int = 256,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (),
        dropout: float = 0.0,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        attention = attended(image_size, ch_mult, attn_resolutions)
        widths = [ch * m for m in ch_mult] + [ch * ch_mult[-1]]
        self.conv_in = conv3x3(z_channels, widths[-1], dtype, rngs)
        self.middle = Middle(widths[-1], dropout, dtype, rngs)
        self.levels = nnx.List(
            [  # from the lowest resolution up
                Level(
                    [widths[i + 1]] + [widths[i]] * (num_res_blocks + 1),
                    attention[i],
                    Upsample if i else None,
                    dropout,
                    dtype,
                    rngs,
                )
                for i in reversed(range(len(ch_mult)))
            ]
        )
        self.norm_out = group_norm(widths[0], rngs)
        self.conv_out = conv3x3(widths[0], 3, dtype, rngs)

    def __call__(self, latents: Array, dropout_key: Array | None = None) -> Array:
        """``[B, h, w, z_channels]`` to ``[B, H, W, 3]``, not clipped; dropout is on where ``dropout_key`` is given."""
        return self.last_layer(self.features(latents, dropout_key))

    def features(self, latents: Array, dropout_key: Array | None = None) -> Array:
        """What the last layer makes the image of: ``[B, h, w, z_channels]`` to ``[B, H, W, ch]``."""
        x = self.middle(self.conv_in(latents), fold(dropout_key, len(self.levels)))
        for i, level in enumerate(self.levels):
            x = level(x, fold(dropout_key, i))
        return jax.nn.swish(self.norm_out(x))

    @property
    def last_layer(self) -> nnx.Module:
        """From `features` to the image; its kernel sets the adaptive weight of the adversarial loss."""
        return self.conv_out
