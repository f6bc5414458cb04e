"""The data sets by name."""

from typing import Any

from vgpt_jax.data.emoji import load_emoji
from vgpt_jax.data.image_folder import load_image_folder
from vgpt_jax.data.transforms import ImageTransform
from vgpt_jax.errors import choose


def _emoji(data) -> tuple[Any, Any]:
    return load_emoji(
        image_size=data.resize_size or data.image_size,
        label=data.emoji_label,
        skin_tones=data.emoji_skin_tones,
        held_out_percent=data.held_out_percent,
        cache_dir=data.cache_dir,
    )


def _image_folder(data) -> tuple[Any, Any]:
    return load_image_folder(
        data.folder, held_out_percent=data.held_out_percent, on_corrupt=data.on_corrupt, cache_dir=data.cache_dir
    )


DATASETS = {"emoji": _emoji, "image_folder": _image_folder}


def load_sources(data) -> tuple[Any, Any]:
    """The training and the held-out source of a config's ``data`` section.

    Raises:
      UserError: an unknown name, or what the data set itself says.
    """
    return choose("data.name", data.name, DATASETS)(data)


def make_transform(data) -> ImageTransform:
    """The transform of a config's ``data`` section."""
    return ImageTransform(
        image_size=data.image_size,
        resize_size=data.resize_size,
        crop=data.crop,
        flip=data.flip,
        value_range=data.value_range,
    )
