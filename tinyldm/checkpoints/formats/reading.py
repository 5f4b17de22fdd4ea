"""A weight file of any format: its first bytes tell which, not its name."""
from ...errors import TinyldmError
from ...files import as_path
from .foreign import HEAD, UNFINISHED, refuse_foreign, refuse_quantised
from .safetensors_file import LONGEST_HEADER, read_safetensors
from .torch_file import read_torch


def read_tensors(path):
    """{name: StoredTensor} of a safetensors file, or of a file that torch.save wrote.

    Raises TinyldmError for any other file, saying what it is if its first bytes or its name tell,
    for quantised weights, and as read_safetensors and read_torch do.
    """
    path = as_path("a file of weights", path)
    tensors = _read(path)
    refuse_quantised(path, tensors)
    return tensors


def _read(path):
    """The same of a Path, with quantised weights, too: their numbers mean nothing by themselves."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except (OSError, ValueError):
        return read_safetensors(path)                   # which reports the reason
    try:
        if head.startswith(b"PK"):
            return read_torch(path)
        length = int.from_bytes(head[:8], "little")
        if head[8:9] != b"{" or length > LONGEST_HEADER:
            refuse_foreign(path, head)
        return read_safetensors(path)
    except TinyldmError:
        if path.suffix in UNFINISHED:
            raise TinyldmError(f"{path} is a download that is not finished: wait for its end, or "
                               "get it again") from None
        raise
