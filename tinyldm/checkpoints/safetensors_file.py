"""One safetensors file: tensors by name, read lazily from a memory map, and written atomically.

The format (https://huggingface.co/docs/safetensors): the header's length in 8 little-endian bytes,
the header in JSON with each tensor's dtype, shape and place, then the raw numbers. The safetensors
library checks and writes it; the numbers are taken from the map here, because the library's NumPy
side has no bfloat16 and copies every tensor.
"""
import json
import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import TinyldmError
from ..files import replacing
from ..kernels.half import is_finite

# bfloat16 is the upper half of a float32; NumPy has no such type, so it is read as bare bits.
DTYPES = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"),
          "BF16": np.dtype("<u2")}


class StoredTensor(NamedTuple):
    """A tensor in a file, not read yet."""

    path: Path
    name: str                                           # as the file has it
    mapped: mmap.mmap
    format: str                                         # the header's word for the dtype
    shape: tuple
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
        stored = DTYPES[self.format]
        view = np.frombuffer(self.mapped, stored, int(np.prod(self.shape)), self.start)
        values = view.reshape(self.shape)
        if self.format == "BF16":
            bits = values.astype(np.uint32)
            bits <<= 16
            values = bits.view(np.float32)
        if axes is not None:
            values = values.transpose(axes)
        with np.errstate(over="ignore"):                # what overflows is reported below
            array = np.require(values, dtype, ["ALIGNED", *["C_CONTIGUOUS"] * contiguous])
        mapped = np.may_share_memory(array, view)
        if not is_finite(view if mapped else np.ascontiguousarray(array)):
            raise TinyldmError(f"{self.path}: the tensor {self.name} holds NaN, infinity or "
                               f"numbers too large for {array.dtype}: use another file")
        if not mapped:
            self._forget_pages()
        return array

    def _forget_pages(self):
        """Drop the map's pages of this tensor, now copied: no second copy stays resident."""
        if hasattr(mmap, "MADV_DONTNEED"):
            first = -(-self.start // mmap.PAGESIZE) * mmap.PAGESIZE     # whole pages only: the
            last = self.stop // mmap.PAGESIZE * mmap.PAGESIZE           # edges hold neighbours
            if first < last:
                self.mapped.madvise(mmap.MADV_DONTNEED, first, last - first)


def read_safetensors(path):
    """{name: StoredTensor} of a file, in the file's order. No number is read yet.

    Raises TinyldmError naming a file that is missing, unreadable, truncated or corrupt.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="numpy"):        # checks header, places and length
            pass
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (SafetensorError, OSError) as error:
        raise TinyldmError(f"expected a whole safetensors file, but {path} is missing, truncated "
                           f"or corrupt ({error}): get it again") from None
    length = int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8:8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = StoredTensor(path, name, mapped, entry["dtype"], tuple(entry["shape"]),
                                     start, stop)
    return tensors


def write_safetensors(tensors, path):
    """Write {name: array} atomically, marked as PyTorch weights, which diffusers asks for.

    Raises TinyldmError where the file cannot be written.
    """
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:                # the library's word for a full disk, say
            raise OSError(str(error)) from None
        temporary.chmod(0o644)                          # the library lets only the owner read
