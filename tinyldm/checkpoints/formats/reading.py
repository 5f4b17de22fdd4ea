"""A weight file of any format: tensors by name, lazily, whatever the file is called."""
from pathlib import Path

from ...errors import TinyldmError
from .safetensors_file import read_safetensors
from .torch_file import read_torch

OLD_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."   # the magic number before torch 1.6
LFS = b"version https://git-lfs"


def read_tensors(path):
    """{name: StoredTensor} of a safetensors file or of one that torch.save wrote: its bytes say.

    Raises TinyldmError for a file of neither kind, see read_safetensors and read_torch.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(len(LFS))
    except OSError:
        head = b""                                      # read_safetensors says what is wrong
    if head.startswith(b"PK"):
        return read_torch(path)
    if head.startswith(OLD_TORCH):
        raise TinyldmError(f"{path} was written by torch before 1.6, which is not read: load it "
                           "with torch and save it anew, best as safetensors")
    if head[:1] == b"\x80" and head[1:2] <= b"\x05" and head[8:9] != b"{":
        raise TinyldmError(f"{path} is a bare pickle, expected was a zip as torch.save writes it, "
                           "or a safetensors file: use another file")
    if head == LFS:
        raise TinyldmError(f"{path} is not the weights, but git's note of where they are: "
                           "run `git lfs pull`, or download the file itself")
    return read_safetensors(path)
