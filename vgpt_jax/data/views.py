"""The views of a picture that the token cache holds: always the same for the same picture, unlike those of training."""

import numpy as np

from vgpt_jax.data.transforms import ImageTransform, crop, resize_short_side, to_value_range
from vgpt_jax.errors import UserError, check_range, choose

CROPS_OF = {"none": 1, "flip": 1, "ten_crop": 5}
"""Crops of a picture for every ``data.cache_views`` but "random"."""


class CacheViews:
    """``(example, index) -> float32 [views, S, S, 3]`` in the value range, without randomness.

    Args:
      name: "none": the centre crop. "flip": the centre crop, and flipped. "ten_crop": the centre and the four corners of the
        resized picture, and all five flipped. "random": draws of ``transform.train``, seeded by ``seed`` and the picture's index.
        Nothing is flipped where the transform does not flip in training.
      transform: sizes, value range, flips.
      num_random: number of views of "random".
      seed: of "random".

    Attributes: ``num``, the number of views; ``settings``, all that they depend on, as JSON can hold it.

    Raises:
      UserError: an unknown name, ``num_random`` below 1, or no room for five crops.
    """

    def __init__(self, name: str, transform: ImageTransform, *, num_random: int = 8, seed: int = 0):
        self.name, self.transform, self.seed = name, transform, seed
        self.settings = {
            "views": name,
            "image_size": transform.image_size,
            "resize_size": transform.resize_size,
            "flip": transform.flip,
            "value_range": list(transform.value_range),
        }
        if name == "random":
            check_range("data.cache_random_views", num_random, least=1)
            self.num = num_random
            self.settings |= {
                "num": num_random,
                "seed": seed,
                "crop": transform.crop,
                "crop_scale": list(transform.crop_scale),
                "crop_ratio": list(transform.crop_ratio),
            }
        else:
            crops = choose("data.cache_views", name, CROPS_OF | {"random": 0})
            self.num = crops * (2 if transform.flip and name != "none" else 1)
        if name == "ten_crop" and transform.resize_size == transform.image_size:
            raise UserError(
                f"data.cache_views is 'ten_crop', but data.resize_size leaves no room for it: make it greater than "
                f"image_size = {transform.image_size}, by a tenth for instance"
            )

    def __call__(self, example: dict, index: int) -> np.ndarray:
        size = self.transform.image_size
        if self.name == "random":
            rng = np.random.default_rng([self.seed, index])
            return np.stack([self.transform.train(example, rng)["image"] for _ in range(self.num)])
        image = resize_short_side(example["image"], self.transform.resize_size)
        crops = [crop(image, size, None)]
        if self.name == "ten_crop":
            crops += [image[:size, :size], image[:size, -size:], image[-size:, :size], image[-size:, -size:]]
        if self.num > len(crops):
            crops += [c[:, ::-1] for c in crops]
        return to_value_range(np.stack(crops), self.transform.value_range)
