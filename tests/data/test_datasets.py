"""One door to all data sets: which of them a config's ``data`` section means."""

import tarfile

import numpy as np
import pytest
from PIL import Image

from configs import default
from vgpt_jax.data.datasets import load_sources, make_transform, make_views
from vgpt_jax.data.image_folder import FolderSource
from vgpt_jax.data.shards import ShardSource
from vgpt_jax.data.tfds_source import TfdsSource
from vgpt_jax.errors import UserError


@pytest.fixture
def data(tmp_path):
    config = default.get_config().data
    config.cache_dir = str(tmp_path / "cache")
    return config


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def test_a_folder_and_its_archive_are_the_same_set(data, folder, tmp_path):
    with tarfile.open(tmp_path / "pictures.tar", "w") as archive:
        archive.add(folder, "pictures")
    data.update(name="image_folder", held_out_percent=40)
    found = []
    for where, kind in ((folder, FolderSource), (tmp_path / "pictures.tar", ShardSource)):
        data.folder = str(where)
        parts = load_sources(data)
        assert all(isinstance(part, kind) for part in parts)
        examples = [[part[i] for i in range(len(part))] for part in parts]
        found.append([[(e["image"].tobytes(), e["label"]) for e in part] for part in examples])
    assert sorted(found[0][0]) == sorted(found[1][0]) and sorted(found[0][1]) == sorted(found[1][1])


def test_any_other_name_is_one_of_tensorflow_datasets(data, dogs):
    data.update(name="stanford_dogs", data_dir=str(dogs.data_dir), split="official", bounding_box="none")
    parts = load_sources(data)
    assert all(isinstance(part, TfdsSource) and part.bounding_box == "none" for part in parts)
    assert [len(part) for part in parts] == [240, 120]
    data.name = "emojis"
    with pytest.raises(UserError, match="data.name is 'emojis', but must be 'emoji', 'image_folder' or one of"):
        load_sources(data)


def test_transform_and_views_are_those_of_the_section(data):
    data.update(image_size=8, resize_size=10, crop="random_resized", crop_scale=(0.5, 0.6), crop_ratio=(1.0, 2.0))
    transform = make_transform(data)
    assert (transform.crop, transform.crop_scale, transform.crop_ratio) == ("random_resized", (0.5, 0.6), (1.0, 2.0))
    data.update(cache_views="random", cache_random_views=3)
    training, held_out = make_views(data, seed=5)
    assert (training.num, training.settings["seed"], held_out.num, held_out.settings["views"]) == (3, 5, 1, "none")
