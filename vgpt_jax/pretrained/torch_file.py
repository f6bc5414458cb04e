"""Reads PyTorch checkpoints without PyTorch, and without running anything that is in them.

``torch.save`` writes a pickle of containers in which tensors are views of numbered storages, and the storages' raw bytes
beside it: in a zip archive (since PyTorch 1.6), or one after the other in a stream (before). A pickle can name any function
of any module and have it called. This one is given functions that make arrays, and plain containers; whatever else it
names comes out as a class that cannot be instantiated (Lightning's checkpoints name classes of their callbacks as keys).

`read_torch_file` reads all of it. `open_torch_file` leaves the tensors in the file until each is asked for: a checkpoint may hold
more than is wanted of it, such as an optimizer's state, and need not be in memory beside what is made of it.
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import ml_dtypes
import numpy as np

from vgpt_jax.errors import UserError

STREAM_MAGIC = 0x1950A86A20F9469CFC6C
STREAM_PROTOCOL = 1001
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


class StoredTensor:
    """A tensor that is still in its file; ``np.asarray`` reads it, anew each time.

    Attributes:
      shape, dtype, nbytes: as NumPy's.
    """

    __slots__ = ("shape", "dtype", "_read")

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[], np.ndarray]):
        self.shape, self.dtype, self._read = shape, dtype, read

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """The array, read-only unless it has to be converted.

        Raises:
          UserError: its bytes are damaged.
        """
        return np.asarray(self._read(), dtype)

    def __setstate__(self, state: Any):  # what a pickle would call to change it
        raise pickle.UnpicklingError("a tensor does not take a state")


def read_torch_file(path: str | Path) -> Any:
    """What was given to ``torch.save``, with arrays in place of tensors and parameters.

    Returns:
      Dicts, lists, tuples, numbers and strings as they were; a ``torch.Size`` as a tuple, a device, a dtype or an
      ``argparse.Namespace`` as a string or a dict. Arrays are read-only, of the tensors' dtypes (``ml_dtypes`` has those that
      NumPy lacks); tensors that shared a storage share memory.

    Raises:
      UserError: there is no such file, it is damaged or of another kind, or it wants something called or made that is
        not data; the message says what.
    """
    return _read(path, _LoadedStorage)


def open_torch_file(path: str | Path) -> Any:
    """As `read_torch_file`, with a `StoredTensor` in place of each array. The file has to stay where it is."""
    return _read(path, _StoredStorage)


def _read(path: str | Path, kind: "type[_LoadedStorage | _StoredStorage]") -> Any:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with _explained(path), path.open("rb") as file:
        if file.peek(4)[:4] == b"PK\x03\x04":
            return _read_zip(zipfile.ZipFile(path), path, kind)  # closed with the last tensor that is still to be read
        return _read_stream(file, path, kind)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns whatever a damaged file raises into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        raise UserError(f"{path} is damaged, or no PyTorch checkpoint ({reason})") from error


def _strided(elements: np.ndarray, offset: int, size: tuple, strides: tuple) -> np.ndarray:
    """A read-only view of a storage's elements; offset and strides count elements."""
    width = elements.itemsize
    steps = tuple(step * width for step in strides)
    array = np.ndarray(tuple(size), elements.dtype, elements.view(np.uint8), offset * width, steps)
    array.flags.writeable = False
    return array


class _Storage(Protocol):
    """What a pickle's tensors are views of."""

    size: int

    def view(self, dtype: np.dtype) -> "_Storage":
        """The same bytes as elements of another type."""

    def tensor(self, offset: int, size: tuple, strides: tuple) -> np.ndarray | StoredTensor: ...


class _LoadedStorage:
    """A storage whose elements are in memory."""

    def __init__(self, read: Callable[[np.dtype, int], np.ndarray], dtype: np.dtype, count: int):
        self._elements = read(dtype, count)
        self.size = self._elements.size

    def view(self, dtype: np.dtype) -> _Storage:
        return _LoadedStorage(lambda dtype, _: self._elements.view(dtype), dtype, self.size)

    def tensor(self, offset: int, size: tuple, strides: tuple) -> np.ndarray:
        return _strided(self._elements, offset, size, strides)


class _StoredStorage:
    """A storage that is read when one of its tensors is."""

    def __init__(self, read: Callable[[np.dtype, int], np.ndarray], dtype: np.dtype, count: int):
        self._read, self._dtype, self.size = read, dtype, count

    def view(self, dtype: np.dtype) -> _Storage:
        return _StoredStorage(self._read, dtype, self.size * self._dtype.itemsize // dtype.itemsize)

    def tensor(self, offset: int, size: tuple, strides: tuple) -> StoredTensor:
        read, dtype, count = self._read, self._dtype, self.size
        return StoredTensor(tuple(size), dtype, lambda: _strided(read(dtype, count), offset, size, strides))


def _read_zip(archive: zipfile.ZipFile, path: Path, kind: type) -> Any:
    names = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(names) != 1:
        raise UserError(f"{path} is a zip archive, but no PyTorch checkpoint: it has no data.pkl")
    root = names[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise UserError(f"{path} was written on a big-endian machine: save it again on another")
    last: dict[str, bytes] = {}  # tensors that share a storage tend to follow each other

    def open_storage(key: str, count: int, dtype: np.dtype) -> _Storage:
        def read(dtype: np.dtype, count: int) -> np.ndarray:
            with _explained(path):
                if key not in last:
                    last.clear()
                    last[key] = archive.read(f"{root}data/{key}")
                return np.frombuffer(last[key], dtype, count)

        if archive.getinfo(f"{root}data/{key}").file_size < count * dtype.itemsize:
            raise EOFError(f"storage {key} is shorter than its tensors")
        return kind(read, dtype, count)

    with archive.open(names[0]) as pickled:
        return _DataUnpickler(pickled, path, open_storage).load()


def _read_stream(file: BinaryIO, path: Path, kind: type) -> Any:
    def load(open_storage: Callable | None = None) -> Any:
        return _DataUnpickler(file, path, open_storage).load()

    if load() != STREAM_MAGIC or load() != STREAM_PROTOCOL:
        raise UserError(f"{path} is no PyTorch checkpoint")
    if not load()["little_endian"]:
        raise UserError(f"{path} was written on a big-endian machine: save it again on another")
    start, sizes, places = file.tell(), {}, {}

    def open_storage(kind: type) -> Callable[[str, int, np.dtype], _Storage]:
        def open_one(key: str, count: int, dtype: np.dtype) -> _Storage:
            def read(dtype: np.dtype, count: int) -> np.ndarray:
                with _explained(path):
                    return np.fromfile(path, dtype, count, offset=places[key])

            sizes[key] = count, dtype.itemsize
            return kind(read, dtype, count)

        return open_one

    found = load(open_storage(_StoredStorage))  # where the storages are is known behind all that refers to them
    for key in load():
        count, width = sizes[key]
        if int.from_bytes(file.read(8), "little") != count:
            raise EOFError(f"storage {key} has another length than its tensors")
        places[key] = file.tell()
        file.seek(count * width, 1)
    if file.tell() > path.stat().st_size or places.keys() != sizes.keys():
        raise EOFError("it ends too early")
    if kind is _StoredStorage:
        return found
    file.seek(start)
    return load(open_storage(kind))


class _DataUnpickler(pickle.Unpickler):
    """Unpickles containers of tensors.

    What a pickle can reach here it can also tamper with (the BUILD opcode sets attributes). All of it is built-in types,
    methods of this object, strings, and classes made for this one pickle, so nothing outlasts it.

    Args:
      file: the pickle.
      path: of the checkpoint, for messages.
      open_storage: ``(key, number of elements, dtype) -> storage``. None: there are none.
    """

    def __init__(self, file: BinaryIO, path: Path, open_storage: Callable[[str, int, np.dtype], _Storage] | None):
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

    def persistent_load(self, reference: tuple) -> tuple[_Storage]:
        kind, storage, key, _, count, *view = reference
        if kind != "storage" or storage not in STORAGES or any(view):
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

    def _view(self, storage: _Storage, offset: int, size: tuple, strides: tuple, metadata: Any):
        if metadata:
            raise pickle.UnpicklingError(f"a tensor with properties that are not supported: {metadata}")
        last = offset + sum((n - 1) * step for n, step in zip(size, strides, strict=True))
        if min(offset, *size, *strides, 0) < 0 or (0 not in size and last >= storage.size):
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
