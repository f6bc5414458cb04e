"""Tensors that are still in their file, and the storages of PyTorch's checkpoints that tensors are views of."""

import math
import pickle
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np


class StoredTensor:
    """A tensor that is still in its file; ``np.asarray`` reads it, anew each time.

    Attributes:
      shape, dtype, nbytes: as NumPy's.
      repeats: whether it has more elements than its storage, so that its size says nothing of the file's.
    """

    __slots__ = ("shape", "dtype", "repeats", "_read")

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[], np.ndarray], repeats: bool = False):
        self.shape, self.dtype, self.repeats, self._read = shape, dtype, repeats, read

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


def _strided(elements: np.ndarray, offset: int, size: tuple, strides: tuple) -> np.ndarray:
    """A read-only view of a storage's elements; offset and strides count elements."""
    width = elements.itemsize
    steps = tuple(step * width for step in strides)
    array = np.ndarray(tuple(size), elements.dtype, elements.view(np.uint8), offset * width, steps)
    array.flags.writeable = False
    return array


class Storage(Protocol):
    """What a pickle's tensors are views of."""

    size: int

    def view(self, dtype: np.dtype) -> "Storage":
        """The same bytes as elements of another type."""

    def tensor(self, offset: int, size: tuple, strides: tuple) -> np.ndarray | StoredTensor: ...


class LoadedStorage:
    """A storage whose elements are in memory."""

    def __init__(self, read: Callable[[np.dtype, int], np.ndarray], dtype: np.dtype, count: int):
        self._elements = read(dtype, count)
        self.size = self._elements.size

    def view(self, dtype: np.dtype) -> Storage:
        return LoadedStorage(lambda dtype, _: self._elements.view(dtype), dtype, self.size)

    def tensor(self, offset: int, size: tuple, strides: tuple) -> np.ndarray:
        return _strided(self._elements, offset, size, strides)


class StoredStorage:
    """A storage that is read when one of its tensors is."""

    def __init__(self, read: Callable[[np.dtype, int], np.ndarray], dtype: np.dtype, count: int):
        self._read, self._dtype, self.size = read, dtype, count

    def view(self, dtype: np.dtype) -> Storage:
        return StoredStorage(self._read, dtype, self.size * self._dtype.itemsize // dtype.itemsize)

    def tensor(self, offset: int, size: tuple, strides: tuple) -> StoredTensor:
        read, dtype, count = self._read, self._dtype, self.size
        repeats = math.prod(size) > count
        return StoredTensor(tuple(size), dtype, lambda: _strided(read(dtype, count), offset, size, strides), repeats)
