"""Reads PyTorch checkpoints without PyTorch, and without running anything that is in them.

``torch.save`` writes a pickle of containers in which tensors are views of numbered storages, and the storages' raw bytes
beside it: in a zip archive (since PyTorch 1.6), or one after the other in a stream (before). `torch_pickle` reads the pickle.

Tensors stay in the file until each is asked for: a checkpoint may hold more than is wanted of it, such as an optimizer's state,
and need not be in memory beside what is made of it.
"""

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vgpt_jax.errors import UserError
from vgpt_jax.pretrained.stored_tensor import Storage
from vgpt_jax.pretrained.torch_pickle import DataUnpickler

STREAM_MAGIC = 0x1950A86A20F9469CFC6C
STREAM_PROTOCOL = 1001


def open_torch_file(path: str | Path) -> Any:
    """What was given to ``torch.save``, with a `StoredTensor` in place of each tensor and parameter.

    The file has to stay where it is.

    Returns:
      Dicts, lists, tuples, numbers and strings as they were; a ``torch.Size`` as a tuple, a device, a dtype or an
      ``argparse.Namespace`` as a string or a dict. Tensors are of their own dtypes (``ml_dtypes`` has those that NumPy lacks).

    Raises:
      UserError: there is no such file, it is damaged or of another kind, or it wants something called or made that is
        not data; the message says what. That the bytes of a tensor are damaged is found out when it is read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with _explained(path), path.open("rb") as file:
        if file.peek(4)[:4] == b"PK\x03\x04":
            return _read_zip(zipfile.ZipFile(path), path)  # closed with the last tensor that is still to be read
        return _read_stream(file, path)


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


def _read_zip(archive: zipfile.ZipFile, path: Path) -> Any:
    names = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(names) != 1:
        raise UserError(f"{path} is a zip archive, but no PyTorch checkpoint: it has no data.pkl")
    if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
        raise UserError(f"{path} is compressed, which PyTorch's checkpoints are not: save it again with torch.save")
    root = names[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist():
        with archive.open(f"{root}byteorder") as order:
            if order.read(8) != b"little":
                raise UserError(f"{path} was written on a big-endian machine: save it again on another")
    last: dict[str, bytes] = {}  # tensors that share a storage tend to follow each other

    def open_storage(key: str, count: int, dtype: np.dtype) -> Storage:
        def read(dtype: np.dtype, count: int) -> np.ndarray:
            with _explained(path):
                if key not in last:
                    last.clear()
                    last[key] = archive.read(f"{root}data/{key}")
                return np.frombuffer(last[key], dtype, count)

        if archive.getinfo(f"{root}data/{key}").file_size < count * dtype.itemsize:
            raise EOFError(f"storage {key} is shorter than its tensors")
        return Storage(read, dtype, count)

    with archive.open(names[0]) as pickled:
        return DataUnpickler(pickled, path, open_storage).load()


def _read_stream(file: BinaryIO, path: Path) -> Any:
    def load(open_storage: Callable | None = None) -> Any:
        return DataUnpickler(file, path, open_storage).load()

    if load() != STREAM_MAGIC or load() != STREAM_PROTOCOL:
        raise UserError(f"{path} is no PyTorch checkpoint")
    if not load()["little_endian"]:
        raise UserError(f"{path} was written on a big-endian machine: save it again on another")
    sizes, places = {}, {}

    def open_storage(key: str, count: int, dtype: np.dtype) -> Storage:
        def read(dtype: np.dtype, count: int) -> np.ndarray:
            with _explained(path):
                return np.fromfile(path, dtype, count, offset=places[key])

        sizes[key] = count, dtype.itemsize
        return Storage(read, dtype, count)

    found = load(open_storage)
    for key in load():  # where the storages are is known behind all that refers to them
        count, width = sizes[key]
        if int.from_bytes(file.read(8), "little") != count:
            raise EOFError(f"storage {key} has another length than its tensors")
        places[key] = file.tell()
        file.seek(count * width, 1)
    if file.tell() > path.stat().st_size or places.keys() != sizes.keys():
        raise EOFError("it ends too early")
    return found
