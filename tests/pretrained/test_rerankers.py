"""Classifiers by name, from folders and from the hub's cache."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.imagenet import imagenet_class_names
from vgpt_jax.models.preprocessed import Preprocessed
from vgpt_jax.models.vit import ViT
from vgpt_jax.pretrained import rerankers
from vgpt_jax.pretrained.converted import Converted
from vgpt_jax.pretrained.rerankers import DOGS_HUB_NAME, load_reranker
from vgpt_jax.training.saved_model import save_model

VIT = {
    "image_size": 16,
    "patch_size": 8,
    "d_model": 16,
    "num_layers": 1,
    "num_heads": 2,
    "mlp_width": 32,
    "num_classes": 3,
}
PREPROCESSING = {"image_size": 16, "resize_size": 16, "scale": [2.0] * 3, "shift": [-1.0] * 3}
LABELS = ("maltese_dog", "samoyed", "pug")


@pytest.fixture(scope="module")
def vit(random_module) -> ViT:
    return random_module(lambda: ViT(**VIT, rngs=nnx.Rngs(0)), 1.0)


@pytest.fixture
def read(vit, monkeypatch) -> list:
    """Stands for the reader of Hugging Face's folders; what it was asked for."""
    asked = []

    def read_hf_vit(paths):
        asked.extend(paths)
        yield Converted("vit", vit, VIT, {"class_names": list(LABELS), "preprocessing": PREPROCESSING})

    monkeypatch.setattr(rerankers, "read_hf_vit", read_hf_vit)
    return asked


def test_a_workdirs_own_is_for_its_tokenizers_images(random_workdir):
    own = load_reranker("own", random_workdir)
    assert own.labels == ("Cats", "Big Dogs", "Small Dogs")
    assert own.value_range is None
    for folder in (random_workdir, random_workdir / "classifier", random_workdir / "classifier" / "model"):
        assert load_reranker(str(folder), random_workdir / "elsewhere").labels == own.labels


@pytest.mark.parametrize("name", ["efficientnet", "efficientnet-lite0", "efficientnet_lite0"])
def test_efficientnet_is_installed_and_knows_imagenets_classes(name, tmp_path):
    found = load_reranker(name, tmp_path)
    assert found.labels == imagenet_class_names()
    assert found.value_range == (0.0, 1.0)


def test_a_converted_vit_has_its_door(vit, tmp_path):
    save_model(tmp_path / "vit" / "model", "vit", vit, VIT, class_names=LABELS, preprocessing=PREPROCESSING)
    found = load_reranker(str(tmp_path / "vit"), tmp_path)
    assert isinstance(found.classifier, Preprocessed)
    assert (found.labels, found.value_range) == (LABELS, (0.0, 1.0))
    images = jnp.asarray(np.random.default_rng(0).random((2, 16, 16, 3)), jnp.float32)
    np.testing.assert_allclose(found.classifier(images), vit(images * 2 - 1), atol=1e-5)


def test_visual_gpts_own_comes_from_the_hubs_cache_or_is_fetched(read, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(rerankers, "fetch_known", lambda name: [tmp_path / name])
    assert load_reranker("dogs", tmp_path).labels == LABELS
    assert read == [tmp_path / "dog-breeds-vit"]
    snapshot = tmp_path / f"models--{DOGS_HUB_NAME.replace('/', '--')}" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({}))
    for choice in ("dogs", "dog-breeds-vit", DOGS_HUB_NAME, str(snapshot)):
        read.clear()
        assert load_reranker(choice, tmp_path).labels == LABELS
        assert read == [snapshot]


@pytest.mark.parametrize("choice", ["efficientnt", "someone/some-vit", "/nowhere/at/all"])
def test_what_is_not_there_lists_what_is(choice, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=f"--classifier is '{choice}', but must be own, efficientnet, dogs, none, a folder"
    ):
        load_reranker(choice, tmp_path)
