"""Against the safetensors library with PyTorch, which writes the files here."""

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vgpt_jax import UserError
from vgpt_jax.pretrained.safetensors_file import open_safetensors


@pytest.fixture
def tensors():
    names = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
    return {name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in names}


def test_every_dtype(tensors, tmp_path):
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.ones(0, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    found = open_safetensors(tmp_path / "a.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == np.asarray(found[name]).dtype == tensor.numpy().dtype
        np.testing.assert_array_equal(found[name], tensor.numpy())


def test_bfloat16(tmp_path):
    save_file({"x": torch.tensor([0.0, -1.5, 3.0]).bfloat16()}, tmp_path / "a.safetensors")
    found = open_safetensors(str(tmp_path / "a.safetensors"))["x"]
    assert found.dtype == np.dtype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(found, np.float32), [0.0, -1.5, 3.0])


def test_shapes_are_known_before_anything_is_read(tensors, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    found = open_safetensors(tmp_path / "a.safetensors")
    assert {(t.shape, str(t.dtype)) for t in found.values()} == {((2, 3), name) for name in tensors}
    np.testing.assert_array_equal(np.asarray(found["int32"]), tensors["int32"].numpy())


def test_a_dtype_that_is_not_read_is_named(tmp_path):
    save_file({"x": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="holds x as F8_E4M3, but what is read is BF16, BOOL, F16"):
        open_safetensors(tmp_path / "a.safetensors")


def test_a_damaged_file_and_another_kind_are_refused(tensors, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    whole = path.read_bytes()
    for content in (b"", b"some text\n", whole[:7], whole[:100], whole[:-1], b"PK\x03\x04" + bytes(50)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="a.safetensors is damaged, or no safetensors file") as found:
            open_safetensors(path)
        assert "\n" not in str(found.value)
    with pytest.raises(UserError, match="there is no file"):
        open_safetensors(tmp_path)
