"""What a pickle asks for and does not get. PyTorch writes the files, in both containers."""

import argparse
import io
import os
import subprocess
import tracemalloc
import zipfile
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vgpt_jax import UserError
from vgpt_jax.pretrained.torch_file import open_torch_file


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
    with pytest.raises(UserError, match=rf"file.pt wants \S*{kind} to be called"):
        open_torch_file(path)
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
        open_torch_file(path)


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
    with pytest.raises(UserError, match="file.pt is damaged"):
        open_torch_file(path)


def test_a_class_that_is_only_named_does_no_harm(written):
    found = open_torch_file(written({"callbacks": {argparse.ArgumentParser: {"best": torch.ones(1)}}}))
    ((key, value),) = found["callbacks"].items()
    assert key is not argparse.ArgumentParser
    assert key.__name__ == "argparse.ArgumentParser"
    np.testing.assert_array_equal(value["best"], [1.0])
    with pytest.raises(UserError, match="wants argparse.ArgumentParser to be called"):
        key()


def test_an_instance_of_an_unknown_class_is_refused_by_its_name(written):
    with pytest.raises(UserError, match="wants types.SimpleNamespace to be called.*save.*state_dict"):
        open_torch_file(written({"config": SimpleNamespace(lr=0.1)}))


@pytest.mark.parametrize(
    ("offset", "size", "stride"), [(0, (5,), (1,)), (2, (2, 2), (1, 2)), (-1, (2,), (1,)), (3, (2,), (-1,))]
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(written, offset, size, stride):
    storage = torch.storage.TypedStorage(4, dtype=torch.float32, _internal=True)
    bad = Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())
    with pytest.raises(UserError, match="is damaged.*reaches beyond its storage"):
        open_torch_file(written({"bad": bad}))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0.0, (2,), (1,)),
        (0, (2.0,), (1,)),
        (0, (True,), (1,)),
        (0, (2,), (0.5,)),
        (0, (1,) * 70, (1,) * 70),
        (0, "2", (1,)),
    ],
)
def test_a_shape_that_is_none_is_refused(written, offset, size, stride):
    storage = torch.storage.TypedStorage(4, dtype=torch.float32, _internal=True)
    path = written({"bad": Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())})
    with pytest.raises(UserError, match="file.pt is damaged"):
        open_torch_file(path)


def test_a_large_number_of_an_object_takes_no_memory(tmp_path):
    path = tmp_path / "file.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}r\xff\xff\xff\xff.")  # LONG_BINPUT
    tracemalloc.start()
    assert open_torch_file(path) == {}
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


def test_a_tensor_with_a_pending_conjugation_is_refused(written):
    with pytest.raises(UserError, match="properties that are not supported.*conj"):
        open_torch_file(written({"x": torch.tensor([1j]).conj()}))
