"""A classifier with its door: what was done to the pictures that it was trained on is done to those that it is given."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import UserError, check_range, choose

METHODS = {"nearest": "nearest", "bilinear": "linear", "bicubic": "cubic", "lanczos": "lanczos3"}
"""Pillow's name in lower case: what `jax.image.resize` calls the same kernel."""


class Preprocessed(nnx.Module):
    """Pictures in 0..1, of any size, to the logits of a network that wants them of one size and in a range of its own.

    Args:
      network: from ``[B, image_size, image_size, 3]`` to logits ``[B, classes]``.
      image_size: pixels.
      resize_size: the short side is resized to this before the centre is cut out. Equal to ``image_size``: nothing is cut, and
        pictures that are not square are squashed.
      method: "nearest", "bilinear", "bicubic" or "lanczos", each as Pillow has it: the kernel grows with the factor by which a
        picture shrinks.
      scale: of values in 0..1, for each colour, to the network's range.
      shift: added to them then.
      min_max: every picture is first scaled to 0..1 by its own least and greatest value, as visual-gpt does before its
        classifier; a picture of a single value becomes 0.

    Raises:
      UserError: an argument is out of its range.
    """

    def __init__(
        self,
        network: nnx.Module,
        *,
        image_size: int,
        resize_size: int,
        method: str = "bilinear",
        scale: Sequence[float] = (1.0, 1.0, 1.0),
        shift: Sequence[float] = (0.0, 0.0, 0.0),
        min_max: bool = False,
    ):
        check_range("preprocessing.image_size", image_size, least=1)
        check_range("preprocessing.resize_size", resize_size, least=image_size)
        for name, values in (("scale", scale), ("shift", shift)):
            if len(values) != 3:
                raise UserError(f"preprocessing.{name} is {list(values)}, but must be a number for each of 3 colours")
        self.network = network
        self.image_size, self.resize_size = image_size, resize_size
        self.method = choose("preprocessing.method", method, METHODS)
        self.scale, self.shift = tuple(map(float, scale)), tuple(map(float, shift))
        self.min_max = min_max

    def __call__(self, images: Array) -> Array:
        """Images ``[B, H, W, 3]`` in 0..1 to logits ``[B, classes]``."""
        return self.network(self.pixels(images))

    def pixels(self, images: Array) -> Array:
        """What the network is given: ``[B, H, W, 3]`` in 0..1 to ``[B, image_size, image_size, 3]`` float32.

        Pillow resizes in bytes, along rows and then along columns. This does not round to them, but cuts off what bicubic and
        Lanczos overshoot where bytes do.
        """
        x = images.astype(jnp.float32)
        if self.min_max:
            low = jnp.min(x, axis=(1, 2, 3), keepdims=True)
            extent = jnp.max(x, axis=(1, 2, 3), keepdims=True) - low
            x = (x - low) / jnp.where(extent > 0, extent, 1.0)
        height, width = self._resized(*x.shape[1:3])
        for shape in ((len(x), x.shape[1], width, 3), (len(x), height, width, 3)):
            x = jnp.clip(jax.image.resize(x, shape, self.method, antialias=True), 0.0, 1.0)
        top, left = (height - self.image_size) // 2, (width - self.image_size) // 2
        x = x[:, top : top + self.image_size, left : left + self.image_size]
        return x * jnp.array(self.scale) + jnp.array(self.shift)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.resize_size == self.image_size:
            return self.image_size, self.image_size
        short = min(height, width)
        return round(height * self.resize_size / short), round(width * self.resize_size / short)
