"""What a training keeps on disk, and the signals that must not interrupt its writing."""
import json
import os
import shutil
import signal
from contextlib import contextmanager

import numpy as np

from ..errors import TinyldmError
from ..files import make_folder, replacing, temporary_beside
from ..signals import handled


class CannotWrite(TinyldmError):
    """A state could not be written; the file is as it was."""


def write_npz(path, **arrays):
    """Write arrays by name into one .npz file, whole or not at all."""
    make_folder(path.parent)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def check_writable(path):
    """Make the folder of a file and try to write there, before hours of work end in it."""
    make_folder(path.parent)
    with temporary_beside(path):
        pass


def read_npz(path, shapes, optional=()):
    """Read arrays from an .npz file -> {name: array}.

    shapes: {name: shape}, where None stands for any length, also of an empty array of other axes.
    optional: names that may be missing.
    Raises TinyldmError for a file that is damaged, and for arrays that are missing, of another
    shape, no numbers or not finite: NumPy would stretch an array of one number over all weights.
    """
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files if name in shapes}
    except Exception as error:                          # NumPy's and zipfile's share no base
        raise unusable(path, f"it cannot be read, {error}") from None
    for name, shape in shapes.items():
        if name not in arrays and name in optional:
            continue
        if name not in arrays:
            raise unusable(path, f"it lacks {name!r}")
        found = arrays[name]
        fits = len(found.shape) == len(shape) and all(
            side in (None, length) for side, length in zip(shape, found.shape))
        if not fits and not (None in shape and found.size == 0):
            raise unusable(path, f"{name!r} has the shape {found.shape}, not {shape}")
        if found.dtype.kind not in "iuf" or not np.isfinite(found).all():
            raise unusable(path, f"{name!r} is not made of finite numbers")
    return arrays


def unusable(path, reason):
    """The TinyldmError about a state file that does not belong to this training."""
    return TinyldmError(f"{path} is no whole state of this training: {reason}; delete it to begin "
                        "anew, or name another folder")


# ---- the folder -------------------------------------------------------------------------------

@contextmanager
def locked(folder):
    """Keep other trainings out of a folder. Raises TinyldmError where one runs already.

    The system unlocks the folder when a process ends, however it ends. Where it locks no folders,
    nothing happens: then Trainer.save sees that another training wrote the file.
    """
    try:
        import fcntl
    except ImportError:                                 # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TinyldmError(f"another training runs in {folder}: wait for its end, or name "
                               "another folder") from None
        except OSError:                                 # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def check_room(path, size):
    """Raise TinyldmError if the disk of `path` has no room for a file of so many bytes."""
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise TinyldmError(f"the state of this training takes {size / 1e6:,.0f} MB, and the disk "
                           f"of {path.parent} has {free / 1e6:,.0f} MB left: make room, or name "
                           "another folder")


# ---- settings ---------------------------------------------------------------------------------

def to_text(settings):
    """{name: a value for JSON} -> bytes as an array, which an .npz file holds without a pickle."""
    return np.frombuffer(json.dumps(settings).encode(), np.uint8)


def from_text(path, array):
    """What to_text made, from the state file `path`; {} for None."""
    try:
        return {} if array is None else json.loads(bytes(array.astype(np.uint8)))
    except ValueError:
        raise unusable(path, "its settings cannot be read") from None


def check_same(path, settings, stored):
    """Raise TinyldmError, which names each difference, unless a training goes on as it began."""
    def shown(name, value):
        if name == "data":
            return "the pictures are others"
        return f"{name} is {value}, it was {stored.get(name)}"

    changed = [shown(name, value) for name, value in json.loads(json.dumps(settings)).items()
               if stored.get(name) != value]
    if changed:
        raise TinyldmError(f"{path} was begun otherwise ({'; '.join(changed)}): give what it was, "
                           "go on with the new by --resume changed, or name another folder with "
                           "--output")


# ---- signals ----------------------------------------------------------------------------------

@contextmanager
def held_signals(most=None):
    """Hold back Ctrl-C and SIGTERM inside -> a list of those that came; deliver one at the end.

    So nothing inside is interrupted, neither an update nor the saving of its result. most: how many
    to hold back; the next one is delivered at once. Where an exception ends the block, that is what
    the caller hears. In other threads nothing is held back.
    """
    came = []

    def hold(number, _):
        came.append(number)
        if most is not None and len(came) > most:
            release()
            signal.raise_signal(number)

    with handled(hold, lambda handler: handler not in (signal.SIG_IGN, None)) as release:
        yield came
    if came:
        signal.raise_signal(came[0])
