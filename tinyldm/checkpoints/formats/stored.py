"""A tensor in a file, not read yet: where its numbers lie in the file's memory map.

What every reader of a weight file returns, whatever the format: safetensors_file.py, torch_file.py.
"""
import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...backend import is_finite
from ...errors import TinyldmError

# bfloat16 is the upper half of a float32; NumPy has no such type, so it is read as bare bits.
DTYPES = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"),
          "BF16": np.dtype("<u2")}


class StoredTensor(NamedTuple):
    """A tensor in a file, not read yet."""

    path: Path
    name: str                                           # as the file has it
    mapped: mmap.mmap
    format: str                                         # safetensors' word for the dtype
    shape: tuple
    strides: tuple                                      # in bytes, one an axis
    start: int                                          # in bytes, from the file's first
    stop: int

    def read(self, dtype, axes=None, contiguous=True):
        """The numbers as an array of `dtype`, with axes permuted as `axes` says.

        Where nothing needs converting the array is the memory map itself: it takes no memory of
        its own, and writing to it leaves the file alone (copy-on-write). contiguous: permuting
        needs converting; if it may not be, the numbers lie in the file's order.
        Raises TinyldmError for a dtype other than F64, F32, F16, BF16, and for NaN or infinity.
        """
        if self.format not in DTYPES:
            raise TinyldmError(f"{self.path}: the tensor {self.name} has dtype {self.format}, "
                               f"supported are {', '.join(DTYPES)}")
        file = np.frombuffer(self.mapped, np.uint8)     # keeps the map open, unlike the map alone
        values = view = np.ndarray(self.shape, DTYPES[self.format], file, self.start, self.strides)
        if self.format == "BF16":
            bits = values.astype(np.uint32)
            bits <<= 16
            values = bits.view(np.float32)
        if axes is not None:
            values = values.transpose(axes)
        with np.errstate(over="ignore"):                # what overflows is reported below
            array = np.require(values, dtype, ["ALIGNED", *["C_CONTIGUOUS"] * contiguous])
        mapped = np.may_share_memory(array, view)
        if not is_finite(view if mapped else array):
            raise TinyldmError(f"{self.path}: the tensor {self.name} holds NaN, infinity or "
                               f"numbers too large for {array.dtype}: use another file")
        if not mapped:
            self._forget_pages()
        return array

    def rows(self, first, last):
        """The rows first to last - 1 of the first axis, as a tensor of their own."""
        start = self.start + first * self.strides[0]
        return self._replace(shape=(last - first, *self.shape[1:]), start=start,
                             stop=start + (last - first) * self.strides[0])

    def transposed(self):
        """The matrix with its axes exchanged."""
        return self._replace(shape=self.shape[::-1], strides=self.strides[::-1])

    def _forget_pages(self):
        """Drop the map's pages of this tensor, now copied: no second copy stays resident."""
        if hasattr(mmap, "MADV_DONTNEED"):
            first = -(-self.start // mmap.PAGESIZE) * mmap.PAGESIZE     # whole pages only: the
            last = self.stop // mmap.PAGESIZE * mmap.PAGESIZE           # edges hold neighbours
            if first < last:
                self.mapped.madvise(mmap.MADV_DONTNEED, first, last - first)


def map_file(path):
    """The whole file as a memory map whose changes stay in memory. Raises OSError, ValueError."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def row_major(shape, itemsize):
    """The strides in bytes of numbers that follow each other, the last axis fastest."""
    strides = []
    for length in reversed(shape):
        strides.append(itemsize)
        itemsize *= length
    return tuple(reversed(strides))
