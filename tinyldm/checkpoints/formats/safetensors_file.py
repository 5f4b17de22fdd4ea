"""A safetensors file: tensors by name, read lazily from a memory map, and written atomically.

The format (https://huggingface.co/docs/safetensors): the header's length in 8 little-endian bytes,
the header in JSON with each tensor's dtype, shape and place, then the raw numbers. The safetensors
library checks and writes files. The numbers are read from a memory map here, because the library
has no bfloat16 for NumPy and copies every tensor.
"""
import json
import math
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ...errors import TinyldmError
from ...files import replacing
from .stored import StoredTensor, checked, map_file, row_major

LONGEST_HEADER = 100_000_000    # bytes; the library's own limit


def read_safetensors(path):
    """{name: StoredTensor} of a file, in the file's order. No number is read yet.

    Raises TinyldmError, naming the file, if it is missing, unreadable, truncated or corrupt.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="numpy"):        # checks header, places and length
            pass
        mapped = map_file(path)
    except (SafetensorError, OSError) as error:
        raise TinyldmError(f"expected a whole safetensors file, but {path} is missing, truncated "
                           f"or corrupt ({missing_bytes(path) or error}): get it again") from None
    length = int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8:8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        shape = tuple(entry["shape"])
        itemsize = (stop - start) // max(1, math.prod(shape))
        tensors[name] = StoredTensor(path, name, mapped, entry["dtype"], shape,
                                     row_major(shape, itemsize), start, stop)
    return checked(path, tensors)


def missing_bytes(path):
    """How much of a truncated file is there, by its header; "" if the header does not tell."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, size)))
        header.pop("__metadata__", None)
        whole = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
        return f"it has {size:,} of {whole:,} bytes" if size < whole else ""
    except Exception:                                   # a header may be any JSON
        return ""


def read_metadata(path):
    """{name: text}, the metadata in the header; {} for a file of another format."""
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}


def write_safetensors(tensors, path, metadata=None):
    """Write {name: array} atomically, marked as PyTorch weights, as diffusers requires.

    metadata: {name: text}, for the header.
    Raises TinyldmError if the file cannot be written.
    """
    tensors = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"} | (metadata or {}))
        except SafetensorError as error:                # for instance when the disk is full
            raise OSError(str(error)) from None
