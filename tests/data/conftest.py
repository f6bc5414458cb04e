"""Stanford Dogs in miniature, prepared once a session by the real builder."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

spec = importlib.util.spec_from_file_location("miniature_dogs", Path(__file__).with_name("miniature_dogs.py"))
miniature_dogs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(miniature_dogs)


@pytest.fixture(scope="session")
def dogs(tmp_path_factory):
    """``archives``, the published files in miniature; ``data_dir``, where they are prepared; ``made``, their module."""
    from vgpt_jax.data.tfds_prepare import prepare

    folder = tmp_path_factory.mktemp("dogs")
    archives = miniature_dogs.make_miniature_dogs(folder / "archives", train_per_class=2, test_per_class=1)
    directory = prepare("stanford_dogs", data_dir=str(folder / "data"), manual_dir=str(archives))
    return SimpleNamespace(archives=archives, data_dir=folder / "data", directory=directory, made=miniature_dogs)
