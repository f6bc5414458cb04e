"""From a picture of any size, uint8, to what the networks see: float32 in the value range. NumPy, one example at a time."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from vgpt_jax.errors import UserError, check_range

CROPS = ("center", "random")


def resize_short_side(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes ``[H, W, 3]`` uint8 so that its short side is ``size`` pixels (bicubic, antialiased)."""
    height, width = image.shape[:2]
    if min(height, width) == size:
        return image
    scale = size / min(height, width)
    target = (max(size, round(width * scale)), max(size, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(target, Image.Resampling.BICUBIC))


def crop(image: np.ndarray, size: int, rng: np.random.Generator | None) -> np.ndarray:
    """Cuts ``[size, size, 3]`` out of an image: at random, or of the centre where ``rng`` is None."""
    rows, columns = image.shape[0] - size, image.shape[1] - size
    top, left = (rows // 2, columns // 2) if rng is None else (rng.integers(rows + 1), rng.integers(columns + 1))
    return image[top : top + size, left : left + size]


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
      crop: "center" or "random", in training.
      flip: random horizontal flips, in training.
      value_range: least and greatest value of the result.

    Raises:
      UserError: an argument is out of its range.
    """

    def __init__(
        self, *, image_size: int, resize_size: int = 0, crop: str = "center", flip: bool = True, value_range=(0.0, 1.0)
    ):
        check_range("data.image_size", image_size, least=1)
        if resize_size and resize_size < image_size:
            raise UserError(f"data.resize_size is {resize_size}, but must be 0 or at least image_size = {image_size}")
        if crop not in CROPS:
            raise UserError(f"data.crop is {crop!r}, but must be one of {', '.join(CROPS)}")
        if len(value_range) != 2 or not value_range[0] < value_range[1]:
            raise UserError(f"data.value_range is {tuple(value_range)}, but must be two numbers, the lesser first")
        self.image_size = image_size
        self.resize_size = resize_size or image_size
        self.random_crop = crop == "random"
        self.flip = flip
        self.value_range = tuple(value_range)

    def train(self, example: dict, rng: np.random.Generator) -> dict:
        """One example with its random crop and flip."""
        image = resize_short_side(example["image"], self.resize_size)
        image = crop(image, self.image_size, rng if self.random_crop else None)
        if self.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        return {"image": to_value_range(image, self.value_range), "label": np.int32(example["label"])}

    def evaluate(self, example: dict) -> dict:
        """One example without randomness: the centre crop, not flipped."""
        image = crop(resize_short_side(example["image"], self.resize_size), self.image_size, None)
        return {"image": to_value_range(image, self.value_range), "label": np.int32(example["label"])}
