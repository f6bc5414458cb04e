"""Tensors that are still in their file, and the storages of PyTorch's checkpoints that they are views of."""

import math
import pickle
from collections.abc import Callable
from typing import Any

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


class Storage:
    """The elements that tensors of a PyTorch checkpoint are views of; they are read when one of the tensors is.

    Args:
      read: ``(dtype, count) -> [count]``, reads them.
      dtype: of the elements.
      count: of the elements.
    """

    def __init__(self, read: Callable[[np.dtype, int], np.ndarray], dtype: np.dtype, count: int):
        self._read, self._dtype, self.size = read, dtype, count

    def view(self, dtype: np.dtype) -> "Storage":
        """The same bytes as elements of another type."""
        return Storage(self._read, dtype, self.size * self._dtype.itemsize // dtype.itemsize)

    def tensor(self, offset: int, size: tuple, strides: tuple) -> StoredTensor:
        """A view; offset and strides count elements."""
        read, dtype, count = self._read, self._dtype, self.size

        def strided() -> np.ndarray:
            elements, steps = read(dtype, count), tuple(step * dtype.itemsize for step in strides)
            array = np.ndarray(tuple(size), dtype, elements.view(np.uint8), offset * dtype.itemsize, steps)
            array.flags.writeable = False
            return array

        return StoredTensor(tuple(size), dtype, strided, repeats=math.prod(size) > count)
