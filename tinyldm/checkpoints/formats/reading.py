"""A weight file of any format: its first bytes tell which, not its name."""
from ...errors import TinyldmError
from ...files import as_path
from .safetensors_file import read_safetensors
from .torch_file import read_torch

OLD_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."   # magic number before torch 1.6
LFS = b"version https://git-lfs"


def read_tensors(path):
    """{name: StoredTensor} of a safetensors file, or of a file that torch.save wrote.

    Raises TinyldmError for any other file, and as read_safetensors and read_torch do.
    """
    path = as_path("a file of weights", path)
    try:
        with open(path, "rb") as file:
            head = file.read(len(LFS))
    except OSError:
        head = b""                                      # read_safetensors reports the reason
    if head.startswith(b"PK"):
        return read_torch(path)
    if head.startswith(OLD_TORCH):
        raise TinyldmError(f"{path} was written by a torch older than 1.6, which is not supported: "
                           "load it with torch and save it again, best as safetensors")
    if head[:1] == b"\x80" and head[1:2] <= b"\x05" and head[8:9] != b"{":
        raise TinyldmError(f"{path} is a bare pickle, expected a zip as torch.save writes it, or a "
                           "safetensors file: use another file")
    if head == LFS:
        raise TinyldmError(f"{path} is not the weights, but Git LFS's pointer to them: "
                           "run `git lfs pull`, or download the file itself")
    return read_safetensors(path)
