"""The encoder and decoder of MaskGIT's tokenizer (Chang et al. 2022, arXiv 2202.04200, section 3.1): VQ-GAN without attention.

Differs from `models.vqgan` in what the published weights need: no attention, convolutions without biases inside, averages of
2x2 squares on the way down, a 1x1 convolution at the end of the encoder, as many residual blocks in the decoder as in the
encoder, and a shortcut of its own kind.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import UserError, check_range
from vgpt_jax.models.layers import block_output, lecun_normal
from vgpt_jax.models.vqgan import Upsample, check_halvings, conv1x1, conv3x3, group_norm


def bare_conv(in_channels: int, out_channels: int, side: int, dtype, rngs: nnx.Rngs) -> nnx.Conv:
    """A convolution without bias, of a square kernel, to pictures of the same size."""
    options = {"padding": side // 2, "use_bias": False, "kernel_init": lecun_normal}
    return nnx.Conv(in_channels, out_channels, (side, side), **options, dtype=dtype, rngs=rngs)


class MaskGITBlock(nnx.Module):
    """``x + y``, where ``y = conv(swish(norm(conv(swish(norm(x))))))``; ``shortcut(y) + y`` where the channels change.

    So the published network is: there, nothing of ``x`` itself passes by.
    """

    def __init__(self, in_channels: int, out_channels: int, dtype, rngs: nnx.Rngs):
        self.norm1 = group_norm(in_channels, rngs)
        self.conv1 = bare_conv(in_channels, out_channels, 3, dtype, rngs)
        self.norm2 = group_norm(out_channels, rngs)
        self.conv2 = bare_conv(out_channels, out_channels, 3, dtype, rngs)
        self.shortcut = bare_conv(out_channels, out_channels, 1, dtype, rngs) if in_channels != out_channels else None

    def __call__(self, x: Array) -> Array:
        y = self.conv2(jax.nn.swish(self.norm2(self.conv1(jax.nn.swish(self.norm1(x))))))
        return block_output(y + (x if self.shortcut is None else self.shortcut(y)))


def blocks(widths: Sequence[int], dtype, rngs: nnx.Rngs) -> nnx.List:
    """A residual block from each width to the next."""
    return nnx.List([MaskGITBlock(i, o, dtype, rngs) for i, o in zip(widths[:-1], widths[1:], strict=True)])


def halved(x: Array) -> Array:
    """The mean of each 2x2 square, ``[B, H, W, C] -> [B, H/2, W/2, C]``."""
    batch, height, width, channels = x.shape
    return jnp.mean(x.reshape(batch, height // 2, 2, width // 2, 2, channels), axis=(2, 4))


class MaskGITEncoder(nnx.Module):
    """Images to latents.

    Args:
      image_size: H and W in pixels; can be halved as often as there are levels less one.
      z_channels: channels of the latents.
      ch: channels at full resolution; the cost of a step grows with its square.
      ch_mult: channels of each level as a multiple of ``ch``; one level more halves the token grid again.
      num_res_blocks: residual blocks of each level, and once more at the lowest resolution.
      dtype: of the computation; parameters and normalisation are float32.
      rngs: ``params``.

    Raises:
      UserError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        image_size: int,
        z_channels: int = 256,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not ch_mult:
            raise UserError("maskgit_vqgan.ch_mult is empty: give at least one level")
        sizes = {"z_channels": z_channels, "ch": ch, "ch_mult": min(ch_mult), "num_res_blocks": num_res_blocks}
        for name, size in sizes.items():
            check_range(f"maskgit_vqgan.{name}", size, least=1)
        check_halvings(image_size, ch_mult)
        self.downsampling = 2 ** (len(ch_mult) - 1)
        widths = [ch * m for m in ch_mult]
        self.conv_in = bare_conv(3, ch, 3, dtype, rngs)
        self.levels = nnx.List(
            [blocks([i] + [o] * num_res_blocks, dtype, rngs) for i, o in zip([ch, *widths[:-1]], widths, strict=True)]
        )
        self.middle = blocks([widths[-1]] * (num_res_blocks + 1), dtype, rngs)
        self.norm_out = group_norm(widths[-1], rngs)
        self.conv_out = conv1x1(widths[-1], z_channels, dtype, rngs)

    def __call__(self, images: Array, dropout_key: Array | None = None) -> Array:
        """``[B, H, W, 3]`` to ``[B, h, w, z_channels]``. There is no dropout: ``dropout_key`` is not read."""
        x = self.conv_in(images)
        for i, level in enumerate(self.levels):
            x = halved(x) if i else x
            for block in level:
                x = block(x)
        for block in self.middle:
            x = block(x)
        return self.conv_out(jax.nn.swish(self.norm_out(x)))


class MaskGITDecoder(nnx.Module):
    """Latents to images: the encoder mirrored. Arguments as `MaskGITEncoder`'s."""

    def __init__(
        self,
        *,
        image_size: int,
        z_channels: int = 256,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        widths = [ch * m for m in reversed(ch_mult)]  # from the lowest resolution up
        self.conv_in = conv3x3(z_channels, widths[0], dtype, rngs)
        self.middle = blocks([widths[0]] * (num_res_blocks + 1), dtype, rngs)
        self.levels = nnx.List(
            [
                blocks([i] + [o] * num_res_blocks, dtype, rngs)
                for i, o in zip([widths[0], *widths[:-1]], widths, strict=True)
            ]
        )
        self.upsamples = nnx.List([Upsample(width, dtype, rngs) for width in widths[:-1]])
        self.norm_out = group_norm(widths[-1], rngs)
        self.conv_out = conv3x3(widths[-1], 3, dtype, rngs)

    def __call__(self, latents: Array, dropout_key: Array | None = None) -> Array:
        """``[B, h, w, z_channels]`` to ``[B, H, W, 3]``, not clipped. ``dropout_key`` is not read."""
        return self.last_layer(self.features(latents, dropout_key))

    def features(self, latents: Array, dropout_key: Array | None = None) -> Array:
        """What the last layer makes the image of: ``[B, h, w, z_channels]`` to ``[B, H, W, ch * ch_mult[0]]``."""
        x = self.conv_in(latents)
        for block in self.middle:
            x = block(x)
        for i, level in enumerate(self.levels):
            x = self.upsamples[i - 1](x) if i else x
            for block in level:
                x = block(x)
        return jax.nn.swish(self.norm_out(x))

    @property
    def last_layer(self) -> nnx.Module:
        """From `features` to the image; its kernel sets the adaptive weight of the adversarial loss."""
        return self.conv_out
