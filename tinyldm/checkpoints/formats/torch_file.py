"""A file as torch.save writes it (.ckpt, .bin, .pt): tensors by name, read lazily, nothing run.

The file is a zip archive without compression. `<root>/data.pkl` is a pickle that lists the tensors;
each `<root>/data/<key>` holds the raw numbers of one storage. A tensor is a view of a storage:
an offset, a shape and strides, all counted in numbers. Every claim of the pickle is checked against
the archive first; then the numbers are read from a memory map of the file. A TorchScript program,
such as OpenAI's CLIP, is such a file with code beside the pickle. The code stays unread.
Source: torch 2.13, torch/serialization.py and torch/_utils.py.
"""
import math
import zipfile
from pathlib import Path
from typing import NamedTuple

from ...errors import TinyldmError
from .foreign import zip_content
from .stored import LONGEST_NAME, MOST_AXES, MOST_NUMBERS, StoredTensor, checked, map_file
from .unpickle import Global, ScriptModule, unpickle

NAMELESS = "emb_params"         # a textual inversion's vectors, where the file name is the word
LARGEST_PICKLE = 1 << 24        # bytes; a checkpoint has about 200 per tensor
ENCRYPTED = 1                   # a bit of a zip entry's flags
# torch's name -> the dtype in safetensors' words, bytes per number
STORAGES = {"torch.DoubleStorage": ("F64", 8), "torch.FloatStorage": ("F32", 4),
            "torch.HalfStorage": ("F16", 2), "torch.BFloat16Storage": ("BF16", 2),
            "torch.LongStorage": ("I64", 8), "torch.IntStorage": ("I32", 4),
            "torch.ShortStorage": ("I16", 2), "torch.CharStorage": ("I8", 1),
            "torch.ByteStorage": ("U8", 1), "torch.BoolStorage": ("BOOL", 1),
            "torch.storage.UntypedStorage": ("U8", 1)}
# Dtypes without a storage class of their own: their tensors name them, on a storage of bytes.
NEW_DTYPES = {"torch.float8_e4m3fn": ("F8_E4M3", 1), "torch.float8_e5m2": ("F8_E5M2", 1),
              "torch.uint16": ("U16", 2), "torch.uint32": ("U32", 4), "torch.uint64": ("U64", 8)}


class Storage(NamedTuple):
    """The place of the raw numbers that one or several tensors share."""

    format: str
    itemsize: int
    start: int                                          # in bytes, from the file's beginning
    count: int                                          # of numbers


def read_torch(path):
    """{name: StoredTensor} of a file's state dict, in the file's order. No number is read yet.

    Lightning stores the state dict under `state_dict`, the training of DiT two under `model` and
    `ema`, of which the averaged one is taken; other entries are dropped, and so is what is not a
    tensor. Of a TorchScript program it is the state dict of its module. Web interfaces store the
    vectors of a textual inversion under `string_to_param` and its word under `name`: that word
    names the tensor here, or NAMELESS without one, as in safetensors files.
    Raises TinyldmError, naming the file, if it is damaged or its pickle holds more than weights.
    """
    path = Path(path)
    archive = Archive(path)
    calls = {"collections.OrderedDict": lambda: {},     # its items are set after the call
             "torch._utils._rebuild_tensor_v2": archive.tensor,
             "torch._utils._rebuild_tensor_v3": archive.tensor_of_new_dtype,
             "torch._utils._rebuild_parameter": lambda tensor, *_: tensor}
    content = unpickle(path, archive.pickle, calls, archive.storage)
    if isinstance(content, ScriptModule):
        content = _state_dict(path, content)
    if isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    if isinstance(content, dict) and {"model", "ema"} <= content.keys():
        content = content["ema"]
    if isinstance(content, dict) and isinstance(content.get("string_to_param"), dict):
        word = content.get("name")
        word = word if isinstance(word, str) else NAMELESS
        vectors = next(iter(content["string_to_param"].values()), None)
        content = {word: vectors}
        if isinstance(vectors, dict) and len(vectors) > 1:      # for SDXL's two text encoders
            content = {f"{word}.{name}": tensor for name, tensor in vectors.items()}
    if not isinstance(content, dict):
        raise TinyldmError(f"{path} must hold tensors by name, not a {type(content).__name__}: "
                           "use another file")
    return checked(path, {name: tensor._replace(name=name) for name, tensor in content.items()
                          if isinstance(tensor, StoredTensor)})


def _state_dict(path, module):
    """The tensors of a ScriptModule and of those in it, with dots between the names.

    A module that is in several places, as none of CLIP's is, counts once: otherwise a small file
    could make a tree without end.
    """
    found, modules, seen = {}, [("", module)], set()
    while modules:
        prefix, module = modules.pop()
        if id(module.state) in seen:
            continue
        seen.add(id(module.state))
        for name, value in module.state.items():
            if len(prefix) + len(name) > LONGEST_NAME:
                raise TinyldmError(f"{path}: its modules are nested deeper than any model's: use "
                                   "another file")
            if isinstance(value, StoredTensor):
                found[prefix + name] = value
            elif isinstance(value, ScriptModule):
                modules.append((f"{prefix}{name}.", value))
    return found


class Archive:
    """The zip archive: its pickle, and where in the file its storages lie."""

    def __init__(self, path):
        self.path = path
        try:
            self.mapped = map_file(path)
            with zipfile.ZipFile(path) as archive:
                self.entries = {entry.filename: entry for entry in archive.infolist()}
                pickle = self._the_pickle()
                self.root = pickle.filename.removesuffix("data.pkl")
                self._check_entries(pickle)
                self.pickle = archive.read(pickle)      # with its checksum
                order = self.entries.get(f"{self.root}byteorder")
                order = archive.read(order) if order and order.file_size < 9 else b"little"
        except TinyldmError:
            raise
        except Exception as error:      # zipfile raises many kinds for a damaged archive
            raise self._damaged(error) from None
        if order != b"little":
            raise TinyldmError(f"{path} has the byte order {order.decode('ascii', 'replace')!a}, "
                               "expected was 'little': save it again on a common processor")

    def _check_entries(self, pickle):
        # torch compresses the code of a TorchScript program, and only that. It is not read.
        code = f"{self.root}code/" if f"{self.root}constants.pkl" in self.entries else None
        entries = [entry for name, entry in self.entries.items()
                   if code is None or not name.startswith(code)]
        for entry in entries:
            if (entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & ENCRYPTED
                    or entry.file_size != entry.compress_size):
                raise TinyldmError(f"{self.path}: its entry {entry.filename!a:.80} is compressed "
                                   "or encrypted, but torch writes neither: use another file")
        total = sum(entry.file_size for entry in entries)
        if total > len(self.mapped):
            raise self._damaged(f"entries of {total} bytes in a file of {len(self.mapped)}")
        if pickle.file_size > LARGEST_PICKLE:
            raise TinyldmError(f"{self.path}: its pickle has {pickle.file_size} bytes, more than "
                               f"the {LARGEST_PICKLE} that any checkpoint needs: use another file")

    def _the_pickle(self):
        found = [entry for name, entry in self.entries.items()
                 if name.endswith("/data.pkl") and name.count("/") == 1]
        if not found:
            raise TinyldmError(f"expected a zip as torch.save writes it, but {self.path} holds "
                               "0 pickles named <folder>/data.pkl: it is "
                               f"{zip_content(self.entries)}")
        if len(found) > 1:
            raise TinyldmError(f"expected a zip as torch.save writes it, but {self.path} holds "
                               f"{len(found)} pickles named <folder>/data.pkl: use another file")
        return found[0]

    def _damaged(self, reason):
        return TinyldmError(f"expected a whole zip as torch.save writes it, but {self.path} is "
                            f"truncated or corrupt ({reason}): get it again")

    # ---- what the pickle refers to ----------------------------------------------------------

    def storage(self, reference):
        """A pickle's reference ("storage", type, key, device, count) -> Storage."""
        kind, storage, key, _, count = reference
        if kind != "storage" or not isinstance(storage, Global) or not isinstance(key, str):
            raise ValueError("a reference to something that is not a storage")
        entry = self.entries[f"{self.root}data/{key}"]
        if storage not in STORAGES:
            raise TinyldmError(f"{self.path}: the storage {key!a:.20} is a {storage!a:.80}, "
                               f"supported are {', '.join(STORAGES)}")
        format, itemsize = STORAGES[storage]
        if entry.file_size != _whole(count) * itemsize:
            raise ValueError(f"storage {key:.20} of {entry.file_size} bytes, not {count} numbers")
        return Storage(format, itemsize, self._start(entry), count)

    def _start(self, entry):
        """Where an entry's bytes begin: after its local header, which has a variable length."""
        header = self.mapped[entry.header_offset:entry.header_offset + 30]
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = entry.header_offset + 30 + lengths
        if (entry.header_offset < 0 or header[:4] != b"PK\3\4"
                or start + entry.file_size > len(self.mapped)):
            raise self._damaged(f"no entry {entry.filename!a:.80} at {entry.header_offset}")
        return start

    def tensor(self, storage, offset, shape, strides, *_):
        """What torch._utils._rebuild_tensor_v2 makes, without gradients and hooks."""
        if not isinstance(storage, Storage) or not len(shape) == len(strides) <= MOST_AXES:
            raise ValueError("a tensor without a storage, or whose shape and strides differ in "
                             "length")
        shape, strides = tuple(map(_whole, shape)), tuple(map(_whole, strides))
        size = math.prod(shape)
        last = sum((length - 1) * stride for length, stride in zip(shape, strides)) if size else -1
        if max(size, _whole(offset) + last + 1) > storage.count:
            raise ValueError(f"a tensor {shape} at {offset} in a storage of {storage.count}")
        start = storage.start + offset * storage.itemsize
        return StoredTensor(self.path, "", self.mapped, storage.format, shape,
                            tuple(stride * storage.itemsize for stride in strides),
                            start, start + (last + 1) * storage.itemsize)


    def tensor_of_new_dtype(self, storage, offset, shape, strides, grad, hooks, dtype, *_):
        """What torch._utils._rebuild_tensor_v3 makes: the dtype is the tensor's, see NEW_DTYPES."""
        if not isinstance(storage, Storage) or storage.format != "U8":
            raise ValueError("a tensor without a storage of bytes")
        if not isinstance(dtype, Global) or dtype not in NEW_DTYPES:
            raise TinyldmError(f"{self.path}: the dtype {dtype!a:.80} of a tensor is not "
                               f"supported, only {', '.join(NEW_DTYPES)} are")
        format, itemsize = NEW_DTYPES[dtype]
        storage = Storage(format, itemsize, storage.start, storage.count // itemsize)
        return self.tensor(storage, offset, shape, strides)


def _whole(number):
    """Check that a value from a pickle is a whole number in sane bounds, and return it."""
    if type(number) is not int or not 0 <= number <= MOST_NUMBERS:
        raise ValueError(f"a {type(number).__name__} that is no count")
    return number
