"""Against PyTorch, which writes the files here: what is read, and what is refused."""

import argparse
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch

from vgpt_jax import UserError
from vgpt_jax.pretrained.stored_tensor import StoredTensor
from vgpt_jax.pretrained.torch_file import open_torch_file

GOLDEN = Path(__file__).parents[1] / "golden" / "visual_gpt_cosine"


def test_every_dtype(written):
    plain = [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    ]
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in plain}
    tensors["bool"] = torch.tensor([True, False, True])
    tensors["complex64"] = torch.tensor([1 + 2j, -3j])
    tensors["complex128"] = torch.tensor([1 + 2j, -3j], dtype=torch.complex128)
    tensors |= {name: torch.tensor([1, 2, 60000]).to(getattr(torch, name)) for name in ("uint16", "uint32", "uint64")}
    found = open_torch_file(written(tensors))
    for name, tensor in tensors.items():
        assert found[name].dtype == np.asarray(found[name]).dtype == tensor.numpy().dtype
        np.testing.assert_array_equal(found[name], tensor.numpy())


def test_the_dtypes_that_numpy_lacks(written):
    values = torch.tensor([0.0, -1.5, 0.25, 3.0])
    names = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
    found = open_torch_file(written({name: values.to(getattr(torch, name)) for name in names}))
    for name in names:
        assert found[name].dtype == np.dtype(getattr(ml_dtypes, name))
        np.testing.assert_array_equal(np.asarray(found[name], np.float32), values.numpy())


def test_strides_offsets_and_shared_storages(written):
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {
        "base": base,
        "permuted": base.permute(2, 0, 1),
        "sliced": base[1, ::2, 1::2],
        "expanded": base[0, :1, :1].expand(5, 3),
        "scalar": base[1, 2, 3],
        "empty": base[:, :0],
    }
    found = open_torch_file(written(tensors))
    for name, tensor in tensors.items():
        assert isinstance(found[name], StoredTensor)
        assert found[name].shape == np.asarray(found[name]).shape == tensor.shape
        np.testing.assert_array_equal(found[name], tensor.numpy())
    assert not np.asarray(found["base"]).flags.writeable
    assert np.asarray(found["base"], np.float64).dtype == np.float64


def test_containers_and_what_is_not_a_tensor(written):
    parameter, annotated = torch.nn.Parameter(torch.ones(2)), torch.zeros(2)
    annotated.note = "kept apart by torch.save"
    thing = {
        "nested": [(torch.ones(1), {"deep": torch.zeros(1)}), "text", 3, 2.5, None, True, b"\x00\xff", {1, 2}, 1j],
        "parameters": [parameter, annotated],
        "norm": torch.nn.BatchNorm1d(2).state_dict(),
        "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(steps=5)),
        "numpy": [np.float32(1.5), np.int64(-7), np.bool_(True)],
        "torch": [torch.Size([2, 3]), torch.device("cuda:1"), torch.device("cpu"), torch.float16],
    }
    found = open_torch_file(written(thing))
    (one, deep), *rest = found["nested"]
    np.testing.assert_array_equal(one, [1.0])
    np.testing.assert_array_equal(deep["deep"], [0.0])
    assert rest == ["text", 3, 2.5, None, True, b"\x00\xff", {1, 2}, 1j]
    np.testing.assert_array_equal(found["parameters"], [[1.0, 1.0], [0.0, 0.0]])
    assert isinstance(found["norm"], OrderedDict)
    assert list(found["norm"]) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert found["args"] == {"lr": 0.1, "nested": {"steps": 5}}
    assert found["numpy"] == [1.5, -7, True]
    assert [type(x) for x in found["numpy"]] == [np.float32, np.int64, np.bool_]
    assert found["torch"] == [(2, 3), "cuda:1", "cpu", "float16"]


def test_tensors_as_the_first_versions_of_pytorch_wrote_them(tmp_path):
    """With a function of fewer arguments, as in torchvision's VGG16, and by Python 2, whose strings are bytes."""

    class Pickler(pickle._Pickler):
        dispatch = pickle._Pickler.dispatch | {
            str: lambda self, text: self.write(b"U" + bytes([len(text)]) + text.encode())
        }

        def reducer_override(self, thing):
            if not isinstance(thing, torch.Tensor):
                return NotImplemented
            place = thing.storage_offset(), tuple(thing.shape), thing.stride()
            return torch._utils._rebuild_tensor, (torch.storage.TypedStorage(wrap_storage=thing.untyped_storage(),
                dtype=thing.dtype, _internal=True), *place)  # fmt: skip

    path, weight = tmp_path / "old.pth", torch.arange(6.0).reshape(2, 3)
    module = SimpleNamespace(__name__="pickle", Pickler=Pickler, dump=pickle.dump)
    torch.save({"weight": weight.T}, path, pickle_module=module, _use_new_zipfile_serialization=False)
    assert b"_rebuild_tensor\n" in path.read_bytes()
    np.testing.assert_array_equal(open_torch_file(path)["weight"], weight.T.numpy())


@pytest.mark.parametrize("part", ["tokenizer", "gpt"])
def test_a_real_file_reads_as_pytorch_reads_it(part):
    path = GOLDEN / part / "model.bin"
    found, expected = open_torch_file(path), torch.load(path, weights_only=True)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())


def test_only_what_is_asked_for_is_read_and_damage_is_noticed_then(tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"wanted": torch.ones(5), "other": torch.full((64,), 1.25)}, path)
    content = path.read_bytes()
    at = content.index(np.float32(1.25).tobytes() * 4)
    path.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
    found = open_torch_file(path)
    np.testing.assert_array_equal(np.asarray(found["wanted"]), np.ones(5))
    with pytest.raises(UserError, match="file.pt is damaged.*CRC"):
        np.asarray(found["other"])


def test_a_tensor_knows_whether_it_repeats_what_is_stored(written):
    base = torch.arange(4.0)
    found = open_torch_file(written({"all": base, "part": base[1:].expand(1, 3), "more": base[0].expand(3, 2)}))
    assert {name: tensor.repeats for name, tensor in found.items()} == {"all": False, "part": False, "more": True}
    np.testing.assert_array_equal(np.asarray(found["more"]), np.zeros((3, 2)))


# What is refused


def test_a_compressed_archive_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(10**5)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "file.pt", "w", zipfile.ZIP_DEFLATED) as other,
    ):
        for name in plain.namelist():
            other.writestr(name, plain.read(name))
    with pytest.raises(UserError, match="file.pt is compressed, which PyTorch's checkpoints are not"):
        open_torch_file(tmp_path / "file.pt")


def test_a_truncated_file_is_refused_wherever_it_ends(written, tmp_path):
    whole = written({"weight": torch.arange(100.0), "bias": torch.ones(3)}).read_bytes()
    path = tmp_path / "cut.pt"
    for length in [*range(0, len(whole) - 1, 23), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(
            UserError, match=r"^\S+cut.pt is (damaged, or )?no PyTorch checkpoint|cut.pt is damaged"
        ) as found:
            open_torch_file(path)
        assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "content", [b"", b"some text\n", b"\x89PNG\r\n\x1a\n" + bytes(100), pickle.dumps({"a": 1}), pickle.dumps(17)]
)
def test_another_kind_of_file_is_refused(tmp_path, content):
    path = tmp_path / "file.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match="file.bin is.* no PyTorch checkpoint"):
        open_torch_file(path)


def test_another_archive_is_refused(tmp_path):
    path = tmp_path / "file.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/readme.txt", "text")
    with pytest.raises(UserError, match="file.zip is a zip archive, but no PyTorch checkpoint"):
        open_torch_file(path)


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path, tmp_path / "absent.pt"):
        with pytest.raises(UserError, match=f"there is no file {path}"):
            open_torch_file(path)


def test_a_big_endian_file_is_refused(tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"weight": torch.ones(2)}, path)
    swapped = tmp_path / "swapped.pt"
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(swapped, "w") as other:
        for name in archive.namelist():
            other.writestr(name, b"big" if name.endswith("/byteorder") else archive.read(name))
    with pytest.raises(UserError, match="big-endian"):
        open_torch_file(swapped)
