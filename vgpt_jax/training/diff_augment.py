"""Differentiable augmentation of what a discriminator sees, real and fake alike (Zhao et al. 2020, arXiv 2006.10738).

The augmentations and their strengths are those published (section 4, appendix A): for images in [-1, 1], to which others
are converted and back. So what is shifted in and what is cut out is mid-grey in every value range.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from vgpt_jax.errors import check_range, choose


def color(uniforms: Array, x: Array) -> Array:
    """Brightness, then saturation, then contrast of images ``[B, H, W, 3]`` in [-1, 1]; the result is not clipped.

    Args:
      uniforms: ``[B, 3]`` in [0, 1): adds -0.5..0.5; scales the distance to the pixel's mean over channels by 0..2, then
        that to the image's mean by 0.5..1.5.
      x: the images.
    """
    brightness, saturation, contrast = uniforms.T[:, :, None, None, None]
    x = x + (brightness - 0.5)
    grey = jnp.mean(x, axis=-1, keepdims=True)
    x = grey + 2.0 * saturation * (x - grey)
    mean = jnp.mean(x, axis=(1, 2, 3), keepdims=True)
    return mean + (contrast + 0.5) * (x - mean)


def translation(uniforms: Array, x: Array) -> Array:
    """Shifts images ``[B, H, W, 3]`` by up to an eighth of their size either way, and zeros in.

    Args:
      uniforms: ``[B, 2]`` in [0, 1): from up to down, from left to right; every whole number of pixels is equally likely.
      x: the images.
    """
    most = [round_half_up(size / 8) for size in x.shape[1:3]]
    padded = jnp.pad(x, ((0, 0), (most[0],) * 2, (most[1],) * 2, (0, 0)))
    # Where the result starts in the padded image: at 0 it has moved down or right by the most.
    starts = jnp.stack([2 * most[i] - whole_number(uniforms[:, i], 2 * most[i] + 1) for i in range(2)], axis=-1)
    return jax.vmap(lambda image, start: jax.lax.dynamic_slice(image, (*start, 0), x.shape[1:]))(padded, starts)


def cutout(uniforms: Array, x: Array) -> Array:
    """Sets to zero a rectangle of half the height and half the width of images ``[B, H, W, 3]``, which the border may cut.

    Args:
      uniforms: ``[B, 2]`` in [0, 1): the row and the column of its centre.
      x: the images.
    """
    inside = []
    for i, size in enumerate(x.shape[1:3]):
        length = round_half_up(size / 2)
        start = whole_number(uniforms[:, i], size + 1 - length % 2) - length // 2
        distance = jnp.arange(size) - start[:, None]
        inside.append((distance >= 0) & (distance < length))
    rows, columns = inside
    return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], 0.0, x)


# What is done, and which of an example's seven random numbers it takes.
POLICIES = {"color": (color, slice(0, 3)), "translation": (translation, slice(3, 5)), "cutout": (cutout, slice(5, 7))}


def diff_augment(key: Array, images: Array, policy: Sequence[str], value_range: Sequence[float]) -> Array:
    """Augments each image by random numbers of its own; gradients pass through to the images.

    The numbers follow from the key and the position in the batch alone: not from the number of devices that share the
    batch, nor from which augmentations are on. Real and fake images want a key each.

    Args:
      key: PRNG key.
      images: ``[B, H, W, 3]`` of any float dtype; computed on in float32.
      policy: any of "color", "translation" and "cutout", applied in the order given; published is this one.
      value_range: the least and the greatest value of the images.

    Returns:
      ``[B, H, W, 3]`` float32, not clipped to the range.

    Raises:
      UserError: an unknown augmentation, or a value range whose greatest value is not the greater.
    """
    augmentations = [choose("an entry of adversarial.diff_augment", name, POLICIES) for name in policy]
    low, high = value_range
    check_range("the greatest value of value_range", high, above=low)
    middle, half = (low + high) / 2, (high - low) / 2
    uniforms = jax.random.uniform(key, (images.shape[0], 7))
    x = (images.astype(jnp.float32) - middle) / half
    for augment, draws in augmentations:
        x = augment(uniforms[:, draws], x)
    return x * half + middle


def whole_number(uniform: Array, count: int) -> Array:
    """[0, 1) to 0..count - 1, int32."""
    return jnp.floor(uniform * count).astype(jnp.int32)


def round_half_up(number: float) -> int:
    return int(number + 0.5)
