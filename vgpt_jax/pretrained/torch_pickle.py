"""Unpickles what ``torch.save`` pickled, without running anything that is in it.

A pickle can name any function of any module and have it called. This one is given functions that make arrays, and plain
containers; whatever else it names comes out as a class that cannot be instantiated (Lightning's checkpoints name classes of
their callbacks as keys).
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from vgpt_jax.errors import UserError
from vgpt_jax.pretrained.stored_tensor import Storage

STORAGES = {  # torch's class: what its elements are
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
    "ComplexFloatStorage": np.dtype("<c8"),
    "ComplexDoubleStorage": np.dtype("<c16"),
    "UntypedStorage": np.dtype("u1"),
}
DTYPES = {  # torch's name: of tensors that are views of untyped storages
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "bool": np.dtype("?"),
} | {
    f"{kind}{bits}": np.dtype(f"{kind}{bits}").newbyteorder("<")
    for kind, sizes in {
        "float": (16, 32, 64),
        "complex": (64, 128),
        "int": (8, 16, 32, 64),
        "uint": (8, 16, 32, 64),
    }.items()
    for bits in sizes
}


class DataUnpickler(pickle._Unpickler):
    """Unpickles containers of tensors.

    It is Python's own unpickler, not the one in C, whose table of objects is as long as the largest number that a pickle gives
    one: ten bytes would take 64 GB.

    What a pickle can reach here it can also tamper with (the BUILD opcode sets attributes). All of it is built-in types,
    methods of this object, strings, and classes made for this one pickle, so nothing outlasts it.

    Args:
      file: the pickle.
      path: of the checkpoint, for messages.
      open_storage: ``(key, number of elements, dtype) -> storage``. None: there are none.
    """

    def __init__(self, file: BinaryIO, path: Path, open_storage: Callable[[str, int, np.dtype], Storage] | None):
        super().__init__(file, encoding="utf-8")
        self._path, self._open_storage, self._storages = path, open_storage, {}
        namespace_attributes = {"__setstate__": lambda record, state: record.update(state)}
        dtype_attributes = {"__new__": self._dtype_name, "__setstate__": lambda dtype, state: None}
        self._known = {
            "collections.OrderedDict": OrderedDict,
            "argparse.Namespace": type("Namespace", (dict,), namespace_attributes),
            "builtins.set": set,
            "builtins.complex": complex,
            "_codecs.encode": self._bytes,
            "torch.Size": tuple,
            "torch.device": self._device,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_of_bytes,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch._utils._rebuild_parameter_with_state": self._parameter,
            "torch._tensor._rebuild_from_type_v2": self._tensor_with_attributes,
            "numpy.dtype": type("dtype", (str,), dtype_attributes),
            "numpy.core.multiarray.scalar": self._numpy_scalar,
            "numpy._core.multiarray.scalar": self._numpy_scalar,
        }

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module
        if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGES:
            return name
        if module == "torch" and name in DTYPES:
            return name
        full_name = f"{module}.{name}"
        return self._known[full_name] if full_name in self._known else self._refused(full_name)

    def persistent_load(self, reference: tuple) -> tuple[Storage]:
        kind, storage, key, _, count, *view = reference
        if kind != "storage" or storage not in STORAGES or any(view) or type(count) is not int or count < 0:
            raise pickle.UnpicklingError(f"a storage of an unknown kind: {kind}, {storage}")
        if key not in self._storages:
            self._storages[key] = self._open_storage(key, count, STORAGES[storage])
        return (self._storages[key],)  # in a tuple: an object of ours could be changed by the pickle

    def _refused(self, name: str) -> type:
        path = self._path

        def refuse(cls, *args, **kwargs):
            raise UserError(
                f"{path} wants {name} to be called, which is not data: this file is not to be trusted, or needs its tensors "
                'saved again on their own: torch.save({"state_dict": ...}, ...)'
            )

        return type(name, (), {"__new__": refuse})

    def _tensor(self, storage, offset, size, strides, requires_grad=False, hooks=None, metadata=None):
        return self._view(storage[0], offset, size, strides, metadata)

    def _tensor_of_bytes(self, storage, offset, size, strides, requires_grad, hooks, dtype, metadata=None):
        return self._view(storage[0].view(DTYPES[dtype]), offset, size, strides, metadata)

    def _view(self, storage: Storage, offset: int, size: tuple, strides: tuple, metadata: Any):
        if metadata:
            raise pickle.UnpicklingError(f"a tensor with properties that are not supported: {metadata}")
        if not all(type(number) is int for number in (offset, *size, *strides)):
            raise pickle.UnpicklingError("a tensor whose shape and place are no whole numbers")
        np.broadcast_to(np.int8(0), size)  # raises what is no shape for NumPy
        last = offset + sum((n - 1) * step for n, step in zip(size, strides, strict=True))
        if 0 in size:
            offset, strides = 0, (0,) * len(size)
        elif min(offset, *size, *strides, 0) < 0 or last >= storage.size:
            raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} reaches beyond its storage")
        return storage.tensor(offset, size, strides)

    def _parameter(self, data, requires_grad, hooks, state=None):
        return data

    def _tensor_with_attributes(self, rebuild, kind, arguments, state):
        return rebuild(*arguments)

    def _device(self, kind: str, index: int | None = None) -> str:
        return kind if index is None else f"{kind}:{index}"

    def _bytes(self, text: str, encoding: str) -> bytes:
        return text.encode("latin1")  # the one encoding that pickles of bytes name

    def _dtype_name(self, cls, name, align=False, copy=False) -> str:
        return str.__new__(cls, name)

    def _numpy_scalar(self, dtype: str, data: bytes) -> np.generic:
        if not dtype[:1] or dtype[0] not in "biufc":
            raise pickle.UnpicklingError(f"a NumPy scalar of dtype {dtype}")
        return np.frombuffer(data, np.dtype(str(dtype)).newbyteorder("<"), 1)[0]
