"""The discriminator of StyleGAN2 (Karras et al. 2020, arXiv 1912.04958, section 4.1 and figure 7c), in the form in which
MaskGIT (Chang et al. 2022, arXiv 2202.04200) and ViT-VQGAN (Yu et al. 2021, arXiv 2110.04627) train their tokenizers: plain
residual convolutions over halving resolutions that judge an image as a whole.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import UserError, check_range

LEAST_RESOLUTION = 4  # halving stops there


def blur_downsample(x: Array, taps: Sequence[float]) -> Array:
    """Filters rows and columns with ``taps`` and keeps every other: ``[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C]``.

    Zeros are around the image. The taps are scaled to a sum of 1, so a constant stays what it is, but at the border. Two of
    them, (1, 1), are the mean of 2x2 pixels.
    """
    # Sums of strided slices, one axis after the other: the grouped convolution takes 10 times as long on CPU and its
    # gradient 125 times (two cores, [8, 64, 64, 64]: 1.4 and 1.6 ms against 14 and 200).
    total, before = sum(taps), (len(taps) - 1) // 2
    for axis in (1, 2):
        last = 2 * ((x.shape[axis] - 1) // 2)  # where the first tap of the last output is, in the padded image
        padding = [(0, 0)] * 4
        padding[axis] = (before, max(last + len(taps) - before - x.shape[axis], 0))
        padded = jnp.pad(x, padding)
        slices = (jax.lax.slice_in_dim(padded, i, i + last + 1, 2, axis) for i in range(len(taps)))
        x = sum(tap / total * part for tap, part in zip(taps, slices, strict=True))
    return x


def minibatch_std(x: Array, group_size: int) -> Array:
    """How much the examples of a group differ, one number a group (Karras et al. 2018, arXiv 1710.10196, section 3).

    Args:
      x: ``[B, h, w, C]`` of any float dtype.
      group_size: a group is that many neighbours in the batch, or the greatest lesser number that divides B. What belongs
        together depends on B and on the order of the batch alone, on no number of devices.

    Returns:
      ``[B]`` float32: the standard deviation over the group of each channel at each position, averaged over both.
    """
    batch = x.shape[0]
    size = next(n for n in range(min(group_size, batch), 0, -1) if batch % n == 0)
    grouped = x.astype(jnp.float32).reshape(batch // size, size, -1)
    variance = jnp.var(grouped, axis=1)
    # The small number keeps the square root's gradient finite where all examples are equal.
    return jnp.repeat(jnp.mean(jnp.sqrt(variance + 1e-8), axis=-1), size)


def conv(in_channels: int, out_channels: int, size: int, dtype, rngs: nnx.Rngs, use_bias: bool = True) -> nnx.Conv:
    init = jax.nn.initializers.xavier_uniform()
    return nnx.Conv(
        in_channels, out_channels, (size, size), use_bias=use_bias, dtype=dtype, kernel_init=init, rngs=rngs
    )


def activate(x: Array) -> Array:
    return jax.nn.leaky_relu(x, 0.2)


class DownBlock(nnx.Module):
    """A 3x3 convolution, blur and halving, a 3x3 convolution; beside it blur and halving and a 1x1 convolution.

    The halving precedes the second convolution, as in MaskGIT; StyleGAN2 strides in the convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, blur: tuple[float, ...], dtype, rngs: nnx.Rngs):
        self.conv1 = conv(in_channels, in_channels, 3, dtype, rngs)
        self.conv2 = conv(in_channels, out_channels, 3, dtype, rngs)
        self.shortcut = conv(in_channels, out_channels, 1, dtype, rngs, use_bias=False)
        self.blur = blur

    def __call__(self, x: Array) -> Array:
        y = blur_downsample(activate(self.conv1(x)), self.blur)
        y = activate(self.conv2(y))
        return (y + self.shortcut(blur_downsample(x, self.blur))) / 2**0.5


class StyleGANDiscriminator(nnx.Module):
    """Images to one logit each.

    A 3x3 convolution, residual blocks that halve the resolution until it is at most 4 pixels, the minibatch's standard
    deviation as one channel more, a 3x3 convolution, two dense layers. LeakyReLU of slope 0.2, no normalisation.

    Args:
      image_size: H and W in pixels, from 8. Powers of two end at 4x4; any other size is halved rounding up, so 48 ends at 3x3.
      ch: channels at full resolution, doubled with every halving. At 256 px, 64 is the published size and 128 the large one.
      max_ch: no layer has more.
      blur: taps of the filter before every halving; (1, 3, 3, 1) as published, (1, 2, 1) is sharper, (1, 1) only averages.
      stddev_group: the examples over which `minibatch_std` is taken; 4 as published. The logits of an image depend on its
        group, so real and fake images are to be judged in batches of their own. 1 leaves images alone.
      dtype: of the computation; parameters, the minibatch's standard deviation, the last layer and logits are float32.
      rngs: ``params``.

    Raises:
      UserError: an argument is out of its range.

    Differs from StyleGAN2: Xavier initialisation in place of the equalized learning rate, as in MaskGIT; groups of
    `minibatch_std` are neighbours, so that a sharded batch keeps them on one device.
    """

    def __init__(
        self,
        *,
        image_size: int,
        ch: int = 64,
        max_ch: int = 512,
        blur: Sequence[float] = (1, 3, 3, 1),
        stddev_group: int = 4,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_range("stylegan_discriminator.image_size", image_size, least=2 * LEAST_RESOLUTION)
        check_range("stylegan_discriminator.ch", ch, least=1)
        check_range("stylegan_discriminator.max_ch", max_ch, least=ch)
        check_range("stylegan_discriminator.stddev_group", stddev_group, least=1)
        check_range("the sum of stylegan_discriminator.blur", sum(blur), above=0)

        widths, resolution = [ch], image_size
        while resolution > LEAST_RESOLUTION:
            widths.append(min(2 * widths[-1], max_ch))
            resolution = -(-resolution // 2)
        last, blur = widths[-1], tuple(blur)
        init = jax.nn.initializers.xavier_uniform()
        self.conv_in = conv(3, ch, 3, dtype, rngs)
        self.blocks = nnx.List(
            [DownBlock(i, o, blur, dtype, rngs) for i, o in zip(widths[:-1], widths[1:], strict=True)]
        )
        self.conv_out = conv(last + 1, last, 3, dtype, rngs)
        self.dense = nnx.Linear(resolution**2 * last, last, dtype=dtype, kernel_init=init, rngs=rngs)
        self.head = nnx.Linear(last, 1, dtype=jnp.float32, kernel_init=init, rngs=rngs)
        self.image_size = image_size
        self.stddev_group = stddev_group

    def __call__(self, images: Array) -> Array:
        """Images ``[B, H, W, 3]`` in the value range that they are trained in to logits ``[B, 1]`` float32, greater for what
        looks real.

        Raises:
          UserError: the images are not of ``image_size``.
        """
        if images.shape[1:3] != (self.image_size, self.image_size):
            raise UserError(
                f"StyleGANDiscriminator: images are {images.shape[1:3]}, but stylegan_discriminator.image_size is "
                f"{self.image_size}"
            )
        x = activate(self.conv_in(images))
        for block in self.blocks:
            x = block(x)
        deviation = minibatch_std(x, self.stddev_group).astype(x.dtype)
        deviation = jnp.broadcast_to(deviation[:, None, None, None], (*x.shape[:3], 1))
        x = activate(self.conv_out(jnp.concatenate([x, deviation], axis=-1)))
        x = activate(self.dense(x.reshape(x.shape[0], -1)))  # [B, C]
        return self.head(x)

    def update_spectral_norm(self) -> None:
        """Nothing: there is no spectral normalisation here, but a training step calls this on every discriminator."""
