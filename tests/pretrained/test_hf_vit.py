"""Against Hugging Face's ViT with the same weights, through the files that it writes."""

import json
import os
import sys

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file

from vgpt_jax.errors import UserError
from vgpt_jax.models.preprocessed import Preprocessed
from vgpt_jax.pretrained.hf_vit import find_in_hub_cache, read_hf_vit

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 12,
    "patch_size": 4,
    "id2label": {0: "n02085620-chihuahua", 1: "cat", 2: "fish"},
}


@pytest.fixture(scope="module")
def transformers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", None)  # one that does not fit torch would break the import of models
        yield pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def make_vit(transformers):
    """Makes a ViT of random weights, large enough that attention is far from uniform, and its logits for random pictures."""

    def make(**changes):
        torch.manual_seed(0)
        vit = transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES | changes)).eval()
        for name, parameter in vit.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("layernorm" in name and "weight" in name), std=0.2)
        return vit

    return make


@pytest.fixture(scope="module")
def saved(make_vit, tmp_path_factory):
    """A ViT, and a folder where it is saved. Not to be written to."""
    folder, vit = tmp_path_factory.mktemp("vit"), make_vit()
    vit.save_pretrained(folder)
    return vit, folder


@pytest.fixture
def copy_of(saved, tmp_path):
    """A copy of the folder, with changes to its config."""

    def make(**changes):
        for file in saved[1].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        return tmp_path

    return make


def assert_same_logits(vit, model):
    size = vit.config.image_size
    pixels = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = vit(torch.from_numpy(pixels).permute(0, 3, 1, 2)).logits.numpy()
    graph, state = nnx.split(model)
    np.testing.assert_allclose(jax.jit(lambda s, x: nnx.merge(graph, s)(x))(state, pixels), expected, atol=1e-4)
    assert np.ptp(expected[0] - expected[1]) > 0.1  # they depend on the picture


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 6},
        {"num_attention_heads": 4, "image_size": 8, "patch_size": 2, "qkv_bias": False, "hidden_act": "gelu_new"},
    ],
    ids=["one head", "without biases"],
)
def test_logits_of_several_sizes(changes, make_vit, tmp_path):
    vit = make_vit(**changes)
    vit.save_pretrained(tmp_path)
    (converted,) = read_hf_vit([tmp_path])
    assert_same_logits(vit, converted.model)


def test_a_folder_with_safetensors(saved):
    vit, folder = saved
    (converted,) = read_hf_vit([folder])
    assert_same_logits(vit, converted.model)
    assert converted.kind == "vit"
    expected = {"image_size": 12, "patch_size": 4, "d_model": 24, "num_layers": 2, "num_heads": 3, "mlp_width": 40}
    rest = {"num_classes": 3, "norm_epsilon": 1e-12, "qkv_bias": True, "activation": "gelu"}
    assert converted.arguments == expected | rest
    metadata = json.loads(json.dumps(converted.metadata))
    assert metadata["class_names"] == ["n02085620-chihuahua", "cat", "fish"]
    assert metadata["source"] == {"format": "hf_vit", "files": ["model.safetensors"]}
    Preprocessed(converted.model, **metadata["preprocessing"])


def test_pytorch_files_with_either_names_and_a_pooler(saved, copy_of):
    vit, _ = saved
    folder = copy_of()
    (converted,) = read_hf_vit([folder])
    old_names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for tensors in (vit.state_dict(), old_names):
        tensors = dict(tensors) | {"vit.pooler.dense.weight": torch.ones(2, 2), "vit.pooler.dense.bias": torch.ones(2)}
        torch.save(tensors, folder / "pytorch_model.bin")
        for paths in ([folder], [folder / "config.json", folder / "pytorch_model.bin"]):
            (again,) = read_hf_vit(paths)
            ours, expected = (jax.tree.leaves(nnx.state(c.model)) for c in (again, converted))
            for x, y in zip(ours, expected, strict=True):
                np.testing.assert_array_equal(x, y)


def preprocessing(folder, **settings):
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return next(read_hf_vit([folder])).metadata["preprocessing"]


def test_preprocessing(copy_of, tmp_path):
    folder = copy_of()
    assert next(read_hf_vit([folder])).metadata["preprocessing"] == {
        "image_size": 12,
        "resize_size": 12,
        "method": "bilinear",
        "scale": [2.0, 2.0, 2.0],
        "shift": [-1.0, -1.0, -1.0],
        "min_max": False,
    }
    found = preprocessing(folder, size=12, resample=3, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.25, 1])
    assert found["method"] == "bicubic"
    np.testing.assert_allclose(found["scale"], [2, 4, 1])
    np.testing.assert_allclose(found["shift"], [-0.2, -0.8, -0.3])
    square = {"height": 12, "width": 12}
    found = preprocessing(folder, size={"shortest_edge": 14}, do_center_crop=True, crop_size=square, do_normalize=False)
    assert (found["resize_size"], found["scale"], found["shift"]) == (14, [1.0] * 3, [0.0] * 3)
    assert preprocessing(folder, size=square, do_rescale=False, do_normalize=False)["scale"] == [255.0] * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 16}, "makes pictures of 16 px, but the network takes 12 px"),
        ({"size": 12, "resample": 5}, "resample is 5, but must be one of 0, 1, 2, 3"),
        ({"size": {"height": 12, "width": 10}}, "only squares"),
        ({"size": 12, "image_mean": [0.5]}, "image_mean is .0.5., but must be a number for each"),
        ({"size": 12, "do_rescale": 1}, "do_rescale is 1, but"),
    ],
)
def test_preprocessing_that_does_not_fit(settings, message, copy_of):
    with pytest.raises(UserError, match=message):
        preprocessing(copy_of(), **settings)


def test_what_is_another_network_or_does_not_fit_is_refused(copy_of, saved, tmp_path):
    def refused(match, paths=(tmp_path,), **options):
        with pytest.raises(UserError, match=match):
            next(read_hf_vit(list(paths), **options))

    copy_of(architectures=["BeitForImageClassification"])
    refused("config.json is of .'BeitForImageClassification'., but what is read is ViTForImageClassification")
    copy_of(num_hidden_layers=2000)
    refused("its settings say num_hidden_layers is 2000, but there are 2 vit.encoder.layer.")
    copy_of(intermediate_size=32)
    refused(
        "layer.0.intermediate.dense.weight give .24, 40. for our .* of .24, 32.*layer.1.intermediate.dense.weight give"
    )
    copy_of(id2label={"0": "cat", "2": "dog"})
    refused("not a name for each of 0, 1, 2")
    copy_of(hidden_act="mish")
    refused("vit.activation is 'mish', but must be one of gelu")
    copy_of(image_size=[12, 16])
    refused("image_size is .12, 16., but only squares")
    folder = copy_of()
    refused("image_size is 16, but this ViT takes pictures of 12 px only", image_size=16)
    refused("a ViT is one folder, but 2 are given", [folder, saved[1]])
    refused("there is no file or folder .*/none", [folder / "none"])
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-8])
    refused("model.safetensors is damaged")
    (folder / "model.safetensors").unlink()
    refused("has no model.safetensors or pytorch_model.bin")
    (folder / "config.json").write_text("{")
    refused("config.json cannot be read as JSON")
    (folder / "config.json").unlink()
    refused("there is no file .*config.json")


def test_the_hubs_cache(copy_of, monkeypatch, tmp_path_factory):
    name, root = "wesleyacheng/dog-breeds-multiclass-image-classification-with-vit", tmp_path_factory.mktemp("home")
    for variable in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(root))
    assert find_in_hub_cache(name) is None
    folder = root / ".cache/huggingface/hub/models--wesleyacheng--dog-breeds-multiclass-image-classification-with-vit"
    for age, revision in enumerate(("aaa", "bbb", "ccc")):
        (folder / "snapshots" / revision).mkdir(parents=True)
        for file in copy_of().iterdir() if revision != "ccc" else ():
            (folder / "snapshots" / revision / file.name).write_bytes(file.read_bytes())
        os.utime(folder / "snapshots" / revision, (age, age))
    assert find_in_hub_cache(name) == folder / "snapshots/bbb"  # the newest that has its config
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("aaa\n")
    found = find_in_hub_cache(name)
    assert found == folder / "snapshots/aaa"
    assert next(read_hf_vit([found])).metadata["preprocessing"]["min_max"]  # as visual-gpt gives it its pictures
    monkeypatch.setenv("HF_HOME", str(root / ".cache/huggingface"))
    monkeypatch.setenv("HOME", "/nowhere")
    assert find_in_hub_cache(name) == found
    monkeypatch.setenv("HF_HUB_CACHE", str(root / ".cache/huggingface/hub"))
    monkeypatch.delenv("HF_HOME")
    assert find_in_hub_cache(name) == found
    assert find_in_hub_cache("someone/else") is None
