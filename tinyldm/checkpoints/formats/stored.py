"""A tensor in a file, not read yet: where its numbers lie in the file's memory map.

Both readers, safetensors_file.py and torch_file.py, return tensors of this kind.
"""
import math
import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...backend import is_finite
from ...errors import TinyldmError

# NumPy has no bfloat16, so its bits are read as integers. It is the upper half of a float32.
DTYPES = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"),
          "BF16": np.dtype("<u2"), "F8_E4M3": np.dtype("u1"), "F8_E5M2": np.dtype("u1")}


def _float8_values():
    """{format: the value of every byte, as float16, which holds all of them exactly}.

    E5M2 is the upper half of a float16. E4M3 has one bit less of exponent and one more of fraction:
    in a float16's places its value is 2**8 too small, because the biases are 7 and 15. It has no
    infinity, and NaN is the code of all ones.
    Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433, table 1.
    """
    codes = np.arange(256, dtype=np.uint16)
    e4m3 = ((codes & 0x80) << 8 | (codes & 0x7f) << 7).view(np.float16) * np.float16(256)
    e4m3[(codes & 0x7f) == 0x7f] = np.nan
    return {"F8_E4M3": e4m3, "F8_E5M2": (codes << 8).view(np.float16)}


FLOAT8 = _float8_values()


# Beyond what any model has. NumPy's own limits are 64 axes and 2**63 bytes, and Python refuses to
# read a number of more than 4,300 digits, such as one in a name.
LONGEST_NAME, MOST_AXES, MOST_NUMBERS = 1000, 8, 1 << 40


class StoredTensor(NamedTuple):
    """A tensor in a file, not read yet."""

    path: Path
    name: str                                           # in the file
    mapped: mmap.mmap
    format: str                                         # the dtype in safetensors' words
    shape: tuple
    strides: tuple                                      # in bytes, one per axis
    start: int                                          # in bytes, from the file's beginning
    stop: int

    @property
    def fits_float16(self):
        """Whether float16 holds every number that its format can have."""
        return self.format == "F16" or self.format in FLOAT8

    def read(self, dtype, axes=None, contiguous=True):
        """The numbers as an array of `dtype`, with the axes in the order `axes`.

        If nothing has to be converted, the array is a view of the memory map: it takes no memory of
        its own, and writing to it does not change the file (copy-on-write). contiguous=False:
        changing the order of the axes does not count as a conversion.
        Raises TinyldmError for a dtype that is not in DTYPES, and for NaN or infinity.
        """
        values = view = self._view()
        if self.format == "BF16":
            bits = values.astype(np.uint32)
            bits <<= 16
            values = bits.view(np.float32)
        elif self.format in FLOAT8:
            values = FLOAT8[self.format][values]
        if axes is not None:
            values = values.transpose(axes)
        with np.errstate(over="ignore"):                # an overflow is reported below
            array = np.require(values, dtype, ["ALIGNED", *["C_CONTIGUOUS"] * contiguous])
        mapped = np.may_share_memory(array, view)
        if not is_finite(view if mapped else array):
            raise TinyldmError(f"{self.path}: the tensor {self.name} holds NaN, infinity or "
                               f"numbers too large for {array.dtype}: use another file")
        if not mapped:
            self._forget_pages()
        return array

    def rows(self, first, last):
        """The rows first to last - 1 of the first axis, as a StoredTensor."""
        start = self.start + first * self.strides[0]
        return self._replace(shape=(last - first, *self.shape[1:]), start=start,
                             stop=start + (last - first) * self.strides[0])

    def picked(self, spans):
        """The rows of several (first, last) spans one below the other, copied: a StoredTensor.

        Raises TinyldmError for a dtype that is not in DTYPES.
        """
        numbers = self._view()
        rows = np.concatenate([numbers[first:last] for first, last in spans])
        mapped = mmap.mmap(-1, max(rows.nbytes, 1))
        mapped.write(rows.tobytes())
        return self._replace(mapped=mapped, shape=rows.shape, start=0, stop=rows.nbytes,
                             strides=row_major(rows.shape, rows.itemsize))

    def transposed(self):
        """The matrix with its axes exchanged."""
        return self._replace(shape=self.shape[::-1], strides=self.strides[::-1])

    def _view(self):
        """The numbers where they lie, bfloat16 and 8-bit floats as integers."""
        if self.format not in DTYPES:
            raise TinyldmError(f"{self.path}: the tensor {self.name} has dtype {self.format}, "
                               f"supported are {', '.join(DTYPES)}: convert the file")
        file = np.frombuffer(self.mapped, np.uint8)     # an array on it keeps the map open
        return np.ndarray(self.shape, DTYPES[self.format], file, self.start, self.strides)

    def _forget_pages(self):
        """The numbers were copied: free the map's pages, so that only one copy stays in memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            first = -(-self.start // mmap.PAGESIZE) * mmap.PAGESIZE     # whole pages only: pages
            last = self.stop // mmap.PAGESIZE * mmap.PAGESIZE           # at the edges are shared
            if first < last:
                self.mapped.madvise(mmap.MADV_DONTNEED, first, last - first)


def checked(path, tensors):
    """{name: StoredTensor}, if no name and no shape is beyond what any model has.

    An empty tensor may have any length on its other axes, which says nothing about the file's size.
    Raises TinyldmError.
    """
    for name, tensor in tensors.items():
        shape = tensor.shape
        if len(name) > LONGEST_NAME:
            raise TinyldmError(f"{path}: the tensor {name} has a name of {len(name)} characters, "
                               f"more than the {LONGEST_NAME} that any model needs: use another "
                               "file")
        if len(shape) > MOST_AXES:
            raise TinyldmError(f"{path}: the tensor {name} has {len(shape)} axes, more than the "
                               f"{MOST_AXES} that any model needs: use another file")
        if math.prod(max(1, length) for length in shape) > MOST_NUMBERS:
            raise TinyldmError(f"{path}: the tensor {name} has the shape {list(shape)}, larger "
                               "than any model's: use another file")
    return tensors


def map_file(path):
    """The whole file as a copy-on-write memory map. Raises OSError, ValueError."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def row_major(shape, itemsize):
    """The strides in bytes of a contiguous array in C order."""
    return tuple(itemsize * math.prod(shape[axis + 1:]) for axis in range(len(shape)))
