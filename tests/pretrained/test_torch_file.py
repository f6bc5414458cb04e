"""Against PyTorch, which writes the files here: what is read, and what is refused."""

import argparse
import io
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch

from vgpt_jax import UserError
from vgpt_jax.pretrained.torch_file import StoredTensor, open_torch_file, read_torch_file

GOLDEN = Path(__file__).parents[1] / "golden" / "visual_gpt_cosine"
CONTAINERS = {"zip": True, "stream": False}


@pytest.fixture(params=CONTAINERS)
def written(request, tmp_path):
    """A function that has PyTorch write an object, in either container, and gives the file's path."""

    def write(thing, **arguments):
        path = tmp_path / "file.pt"
        torch.save(thing, path, _use_new_zipfile_serialization=CONTAINERS[request.param], **arguments)
        return path

    return write


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
    found = read_torch_file(written(tensors))
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.numpy().dtype
        np.testing.assert_array_equal(found[name], tensor.numpy())


def test_the_dtypes_that_numpy_lacks(written):
    values = torch.tensor([0.0, -1.5, 0.25, 3.0])
    names = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
    found = read_torch_file(written({name: values.to(getattr(torch, name)) for name in names}))
    for name in names:
        assert found[name].dtype == np.dtype(getattr(ml_dtypes, name))
        np.testing.assert_array_equal(found[name].astype(np.float32), values.numpy())


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
    found = read_torch_file(written(tensors))
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape
        np.testing.assert_array_equal(found[name], tensor.numpy())
    assert np.shares_memory(found["base"], found["permuted"])
    assert not found["base"].flags.writeable


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
    found = read_torch_file(written(thing))
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
    np.testing.assert_array_equal(read_torch_file(path)["weight"], weight.T.numpy())


@pytest.mark.parametrize("part", ["tokenizer", "gpt"])
def test_a_real_file_reads_as_pytorch_reads_it(part):
    path = GOLDEN / part / "model.bin"
    found, expected = read_torch_file(path), torch.load(path, weights_only=True)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())


# Tensors that stay in the file


def test_stored_tensors_are_what_all_of_them_read_at_once_are(written):
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {"base": base, "permuted": base.permute(2, 0, 1), "sliced": base[1, ::2, 1::2], "empty": base[:, :0]}
    tensors |= {"scalar": base[1, 2, 3], "half": torch.ones(3).half(), "flags": torch.tensor([True, False])}
    tensors["uint16"] = torch.tensor([1, 60000]).to(torch.uint16)  # of a storage of bytes
    found = open_torch_file(written({"nested": [tensors], "epoch": 3}))
    assert found["epoch"] == 3
    for name, tensor in tensors.items():
        stored = found["nested"][0][name]
        assert isinstance(stored, StoredTensor)
        assert (stored.shape, stored.dtype) == (tensor.shape, tensor.numpy().dtype)
        np.testing.assert_array_equal(np.asarray(stored), tensor.numpy())
        assert np.asarray(stored, np.float64).dtype == np.float64


def test_only_what_is_asked_for_is_read(tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"wanted": torch.ones(5), "other": torch.full((64,), 1.25)}, path)
    content = path.read_bytes()
    at = content.index(np.float32(1.25).tobytes() * 4)
    path.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
    found = open_torch_file(path)
    np.testing.assert_array_equal(np.asarray(found["wanted"]), np.ones(5))
    with pytest.raises(UserError, match="file.pt is damaged.*CRC"):
        np.asarray(found["other"])


# What is refused


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def harmful(marker):
    """Pickles that would make the file ``marker``, and what of it is to be named."""
    return {
        "system": Calls(os.system, f"touch {marker}"),
        "eval": Calls(eval, f"open({str(marker)!r}, 'w')"),
        "__import__": Calls(getattr, Calls(__import__, "os"), "system"),
        "Popen": Calls(subprocess.Popen, ["touch", str(marker)]),
        "open": {"state_dict": {"weight": torch.ones(2), "more": Calls(io.open, str(marker), "w")}},
    }


@pytest.mark.parametrize("kind", harmful(""))
def test_nothing_is_run(written, tmp_path, kind):
    marker = tmp_path / "marker"
    path = written(harmful(marker)[kind])
    for read in (read_torch_file, open_torch_file):
        with pytest.raises(UserError, match=rf"file.pt wants \S*{kind} to be called"):
            read(path)
    assert not marker.exists()
    if kind == "system":  # the file would have done it
        torch.load(path, weights_only=False)
        assert marker.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00true\x81.",  # NEWOBJ
        b"(cos\nsystem\nX\x04\x00\x00\x00trueo.",  # OBJ
        b"(X\x04\x00\x00\x00trueios\nsystem\n.",  # INST
        b"\x80\x04X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93X\x04\x00\x00\x00true\x85R.",  # STACK_GLOBAL
    ],
)
def test_no_opcode_runs_anything(tmp_path, pickled):
    path = tmp_path / "file.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    with pytest.raises(UserError, match="file.pt (wants os.system to be called|is damaged)"):
        read_torch_file(path)


class Changed:
    """Pickles as a tensor that is given a state afterwards (BUILD)."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        storage = torch.storage.TypedStorage(4, dtype=torch.float32, _internal=True)
        return torch._utils._rebuild_tensor_v2, (storage, 0, (4,), (1,), False, OrderedDict()), self.state


@pytest.mark.parametrize("state", [{"_read": "other"}, (None, {"shape": (9,)}), (1, (9,), "f4", False, b"\x00" * 36)])
def test_a_tensor_cannot_be_changed_by_its_pickle(written, state):
    path = written({"x": Changed(state)})
    for read in (read_torch_file, open_torch_file):
        with pytest.raises(UserError, match="file.pt is damaged"):
            read(path)


def test_a_class_that_is_only_named_does_no_harm(written):
    found = read_torch_file(written({"callbacks": {argparse.ArgumentParser: {"best": torch.ones(1)}}}))
    ((key, value),) = found["callbacks"].items()
    assert key is not argparse.ArgumentParser
    assert key.__name__ == "argparse.ArgumentParser"
    np.testing.assert_array_equal(value["best"], [1.0])
    with pytest.raises(UserError, match="wants argparse.ArgumentParser to be called"):
        key()


def test_an_instance_of_an_unknown_class_is_refused_by_its_name(written):
    with pytest.raises(UserError, match="wants types.SimpleNamespace to be called.*save.*state_dict"):
        read_torch_file(written({"config": SimpleNamespace(lr=0.1)}))


@pytest.mark.parametrize(
    ("offset", "size", "stride"), [(0, (5,), (1,)), (2, (2, 2), (1, 2)), (-1, (2,), (1,)), (3, (2,), (-1,))]
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(written, offset, size, stride):
    storage = torch.storage.TypedStorage(4, dtype=torch.float32, _internal=True)
    bad = Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())
    with pytest.raises(UserError, match="is damaged.*reaches beyond its storage"):
        read_torch_file(written({"bad": bad}))


def test_a_tensor_with_a_pending_conjugation_is_refused(written):
    with pytest.raises(UserError, match="properties that are not supported.*conj"):
        read_torch_file(written({"x": torch.tensor([1j]).conj()}))


def test_a_truncated_file_is_refused_wherever_it_ends(written, tmp_path):
    whole = written({"weight": torch.arange(100.0), "bias": torch.ones(3)}).read_bytes()
    path = tmp_path / "cut.pt"
    for length in [*range(0, len(whole) - 1, 23), len(whole) - 1]:
        path.write_bytes(whole[:length])
        for read in (read_torch_file, open_torch_file):
            with pytest.raises(
                UserError, match=r"^\S+cut.pt is (damaged, or )?no PyTorch checkpoint|cut.pt is damaged"
            ) as found:
                read(path)
            assert "\n" not in str(found.value)


def test_a_damaged_tensor_of_an_archive_is_noticed(tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"weight": torch.full((64,), 1.25)}, path)
    content = path.read_bytes()
    at = content.index(np.float32(1.25).tobytes() * 4)
    path.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
    with pytest.raises(UserError, match="file.pt is damaged.*CRC"):
        read_torch_file(path)


@pytest.mark.parametrize(
    "content", [b"", b"some text\n", b"\x89PNG\r\n\x1a\n" + bytes(100), pickle.dumps({"a": 1}), pickle.dumps(17)]
)
def test_another_kind_of_file_is_refused(tmp_path, content):
    path = tmp_path / "file.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match="file.bin is.* no PyTorch checkpoint"):
        read_torch_file(path)


def test_another_archive_is_refused(tmp_path):
    path = tmp_path / "file.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/readme.txt", "text")
    with pytest.raises(UserError, match="file.zip is a zip archive, but no PyTorch checkpoint"):
        read_torch_file(path)


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path, tmp_path / "absent.pt"):
        with pytest.raises(UserError, match=f"there is no file {path}"):
            read_torch_file(path)


def test_a_big_endian_file_is_refused(tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"weight": torch.ones(2)}, path)
    swapped = tmp_path / "swapped.pt"
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(swapped, "w") as other:
        for name in archive.namelist():
            other.writestr(name, b"big" if name.endswith("/byteorder") else archive.read(name))
    with pytest.raises(UserError, match="big-endian"):
        read_torch_file(swapped)
