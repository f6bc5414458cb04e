"""From a picture of any size, uint8, to what the networks see: float32 in the value range. NumPy, one example at a time."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from vgpt_jax.errors import UserError, check_range

CROPS = ("center", "random", "random_resized")
ATTEMPTS = 10
"""Draws of a window of `random_window` before it is taken from the centre, as in Inception's published preprocessing."""


def resize_short_side(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes ``[H, W, 3]`` uint8 so that its short side is ``size`` pixels (bicubic, antialiased)."""
    height, width = image.shape[:2]
    if min(height, width) == size:
        return image
    scale = size / min(height, width)
    return _resize(image, max(size, round(height * scale)), max(size, round(width * scale)))


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def crop(image: np.ndarray, size: int, rng: np.random.Generator | None) -> np.ndarray:
    """Cuts ``[size, size, 3]`` out of an image: at random, or of the centre where ``rng`` is None."""
    rows, columns = image.shape[0] - size, image.shape[1] - size
    top, left = (rows // 2, columns // 2) if rng is None else (rng.integers(rows + 1), rng.integers(columns + 1))
    return image[top : top + size, left : left + size]


def random_window(
    height: int, width: int, rng: np.random.Generator, scale: Sequence[float], ratio: Sequence[float]
) -> tuple[int, int, int, int]:
    """A part of a picture, as Inception (Szegedy et al. 2014, arXiv 1409.4842, section 6) cuts it out.

    Its share of the area is uniform in ``scale`` and the logarithm of width / height uniform in that of ``ratio``, as far as it
    fits into the picture. Where none of ten draws does, it is the greatest in the centre whose shape is in ``ratio``.

    Returns:
      top, left, height, width, pixels.
    """
    for _ in range(ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        shape = np.exp(rng.uniform(*np.log(ratio)))
        h, w = round(np.sqrt(area / shape)), round(np.sqrt(area * shape))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = min(height, max(1, round(width / ratio[0]))), min(width, max(1, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def to_value_range(image: np.ndarray, value_range: Sequence[float]) -> np.ndarray:
    """uint8 0..255 to float32 in ``value_range``."""
    low, high = value_range
    return (image.astype(np.float32) * np.float32((high - low) / 255.0) + np.float32(low)).astype(np.float32)


def to_uint8(images: np.ndarray, value_range: Sequence[float]) -> np.ndarray:
    """Float images in ``value_range`` to uint8 0..255, clipped and rounded."""
    low, high = value_range
    return np.round(np.clip((np.asarray(images) - low) / (high - low), 0.0, 1.0) * 255.0).astype(np.uint8)


class ImageTransform:
    """Resize, crop, flip, scale: ``{"image": uint8 [H, W, 3], "label"}`` to ``{"image": float32 [S, S, 3], "label"}``.

    Args:
      image_size: S, pixels.
      resize_size: the short side is resized to this before the crop; 0: ``image_size``.
      crop: in training "center", "random", or "random_resized" (`random_window` of the picture as it comes, resized to S x S).
      crop_scale: least and greatest share of the area, of "random_resized".
      crop_ratio: least and greatest width / height, of "random_resized".
      flip: random horizontal flips, in training.
      value_range: least and greatest value of the result.

    Raises:
      UserError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        image_size: int,
        resize_size: int = 0,
        crop: str = "center",
        crop_scale: Sequence[float] = (0.8, 1.0),
        crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: bool = True,
        value_range: Sequence[float] = (0.0, 1.0),
    ):
        check_range("data.image_size", image_size, least=1)
        if resize_size and resize_size < image_size:
            raise UserError(f"data.resize_size is {resize_size}, but must be 0 or at least image_size = {image_size}")
        if crop not in CROPS:
            raise UserError(f"data.crop is {crop!r}, but must be one of {', '.join(CROPS)}")
        for name, pair, most in (("crop_scale", crop_scale, 1.0), ("crop_ratio", crop_ratio, None)):
            if len(pair) != 2:
                raise UserError(f"data.{name} is {tuple(pair)}, but must be two numbers, the lesser first")
            check_range(f"the first number of data.{name}", pair[0], above=0)
            check_range(f"the second number of data.{name}", pair[1], least=pair[0], most=most)
        if len(value_range) != 2 or not value_range[0] < value_range[1]:
            raise UserError(f"data.value_range is {tuple(value_range)}, but must be two numbers, the lesser first")
        self.image_size = image_size
        self.resize_size = resize_size or image_size
        self.crop = crop
        self.crop_scale, self.crop_ratio = tuple(crop_scale), tuple(crop_ratio)
        self.flip = flip
        self.value_range = tuple(value_range)

    def train(self, example: dict, rng: np.random.Generator) -> dict:
        """One example with its random crop and flip."""
        image = example["image"]
        if self.crop == "random_resized":
            top, left, height, width = random_window(*image.shape[:2], rng, self.crop_scale, self.crop_ratio)
            image = _resize(image[top : top + height, left : left + width], self.image_size, self.image_size)
        else:
            image = resize_short_side(image, self.resize_size)
            image = crop(image, self.image_size, rng if self.crop == "random" else None)
        if self.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        return {"image": to_value_range(image, self.value_range), "label": np.int32(example["label"])}

    def evaluate(self, example: dict) -> dict:
        """One example without randomness: the centre crop, not flipped."""
        image = crop(resize_short_side(example["image"], self.resize_size), self.image_size, None)
        return {"image": to_value_range(image, self.value_range), "label": np.int32(example["label"])}
