"""The data sets by name."""

from typing import Any

from vgpt_jax.data.emoji import load_emoji
from vgpt_jax.data.image_folder import load_image_folder
from vgpt_jax.data.shards import find_shards, load_shards
from vgpt_jax.data.tfds_source import load_tfds
from vgpt_jax.data.transforms import ImageTransform
from vgpt_jax.data.views import CacheViews


def _emoji(data) -> tuple[Any, Any]:
    return load_emoji(
        image_size=data.resize_size or data.image_size,
        label=data.emoji_label,
        skin_tones=data.emoji_skin_tones,
        held_out_percent=data.held_out_percent,
        cache_dir=data.cache_dir,
    )


def _image_folder(data) -> tuple[Any, Any]:
    options = {
        "held_out_percent": data.held_out_percent,
        "on_corrupt": data.on_corrupt,
        "cache_dir": data.cache_dir,
    }
    shards = find_shards(data.folder)
    return load_shards(shards, **options) if shards else load_image_folder(data.folder, **options)


DATASETS = {"emoji": _emoji, "image_folder": _image_folder}
"""Every other name is one of tensorflow-datasets."""


def load_sources(data) -> tuple[Any, Any]:
    """The training and the held-out source of a config's ``data`` section.

    Raises:
      UserError: an unknown name, or what the data set itself says.
    """
    if data.name in DATASETS:
        return DATASETS[data.name](data)
    return load_tfds(
        data.name,
        split=data.split,
        held_out_percent=data.held_out_percent,
        bounding_box=data.bounding_box,
        data_dir=data.data_dir,
        manual_dir=data.manual_dir,
        other_names=tuple(DATASETS),
    )


def make_transform(data) -> ImageTransform:
    """The transform of a config's ``data`` section."""
    return ImageTransform(
        image_size=data.image_size,
        resize_size=data.resize_size,
        crop=data.crop,
        crop_scale=data.crop_scale,
        crop_ratio=data.crop_ratio,
        flip=data.flip,
        value_range=data.value_range,
    )


def make_views(data, seed: int) -> tuple[CacheViews, CacheViews]:
    """The views of a training and of a held-out picture in the token cache, of a config's ``data`` section."""
    transform = make_transform(data)
    training = CacheViews(data.cache_views, transform, num_random=data.cache_random_views, seed=seed)
    return training, CacheViews("none", transform)
