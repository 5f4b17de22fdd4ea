"""Files for every part: strict reading of JSON, and writing that leaves no half-written file."""
import json
import os
import re
import secrets
import shutil
import stat
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import TinyldmError


def as_path(name, value):
    """A path that a user gives -> Path, with ~ for the home folder.

    Raises TinyldmError, with the name, for what no file system takes as a path.
    """
    try:
        path = Path(value).expanduser()
        encoded = os.fsencode(path)                     # refuses half of a surrogate pair
    except (TypeError, ValueError, RuntimeError) as error:      # RuntimeError: the home of nobody
        raise TinyldmError(f"{name} must be a path, a str or a pathlib.Path, not {value!r:.80} "
                           f"({error})") from None
    if b"\0" in encoded or value == "":
        raise TinyldmError(f"{name} must be a path, but {value!r:.80} "
                           f"{'holds a NUL character' if value else 'is empty'}")
    return path


def read_json(path):
    """The object in a JSON file. Raises TinyldmError for a missing or malformed file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))    # editors may mark it
    except FileNotFoundError:
        raise TinyldmError(f"expected a file {path}, found none: is the folder complete?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise TinyldmError(f"{path} is not readable JSON ({error}): get it again") from None
    if not isinstance(content, dict):
        raise TinyldmError(f"{path} must hold a JSON object, not a {type(content).__name__}: "
                           "get it again")
    return content


def write_json(path, content, indent=2):
    """Write an object as a JSON file, whole or not at all; its folder is made if missing."""
    make_folder(path.parent)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def make_folder(path):
    """Make a folder, and those above it, if missing. Raises TinyldmError if that fails."""
    with _writing(path):
        Path(path).mkdir(parents=True, exist_ok=True)


# ---- whole or not at all ---------------------------------------------------------------------

TEMPORARY = re.compile(r"\.tinyldm-(\d+)-[0-9a-f]{16}\.tmp")     # the number is the process's
ABANDONED = 3600            # seconds


@contextmanager
def replacing(path):
    """A new, empty file beside `path`, moved there at the end: `path` is whole or untouched.

    The content is on the disk before the file moves. An existing file keeps its permissions. A
    symbolic link stays a link, and the file that it names is replaced. A hard link stays one: all
    names of the file show the new content.
    Raises TinyldmError if the file cannot be written, and if `path` is a folder or a device.
    """
    with _beside(path) as (temporary, place, there):
        mode = stat.S_IMODE((there or temporary.stat()).st_mode)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            temporary.chmod(mode)
        if there and there.st_nlink > 1:
            _copy_into(temporary, place)
        else:
            os.replace(temporary, place)


@contextmanager
def temporary_beside(path):
    """A new, empty file beside `path`, deleted at the end. Raises what `replacing` raises."""
    with _beside(path) as (temporary, _, _):
        yield temporary


@contextmanager
def new_folder(path, marker=None):
    """A new folder beside `path`, moved there at the end: `path` is whole or untouched.

    `path` is a new folder, an empty one, or one that holds a file of the name `marker`. That one is
    replaced; what only the old folder has is kept.
    Raises TinyldmError for any other `path`, and if nothing can be written there.
    """
    with _writing(path):
        place, there = _place(path)
        full = there and not (place.is_dir() and not any(place.iterdir()))
        if full and not (marker and (place / marker).is_file()):
            raise TinyldmError(f"{path} exists already: name a new folder, or an empty one")
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = _free_name(place.parent)
        try:
            temporary.mkdir()
            yield temporary
            if full:
                _keep_others(place, temporary)
                _exchange(temporary, place)
            else:
                if there:
                    place.rmdir()                       # some systems do not replace a folder
                os.replace(temporary, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)    # moved away, or left half-written


@contextmanager
def _writing(path):
    """The system's errors inside become TinyldmErrors about `path`."""
    try:
        yield
    except OSError as error:
        raise TinyldmError(f"cannot write {path} ({error.strerror or error}): "
                           "choose another place") from None


@contextmanager
def _beside(path):
    """A new, empty file in the folder of the file that `path` names -> it, and _place(path)."""
    with _writing(path):
        place, there = _place(path)
        if there and not stat.S_ISREG(there.st_mode):
            what = "folder" if stat.S_ISDIR(there.st_mode) else "device or a pipe"
            raise TinyldmError(f"cannot write {path}: it is a {what}, not a file; name a file")
        if there and not os.access(place, os.W_OK):
            raise OSError("it is write-protected")
        if there and any(os.path.samestat(there, stream) for stream in _standard_streams()):
            raise OSError("this program's own output goes there")
        temporary = _free_name(place.parent)
        try:
            # O_EXCL: never follow a link, or open a file, that somebody else put there.
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield temporary, place, there
        finally:
            with suppress(OSError):                     # moved away, or never made
                temporary.unlink()


def _place(path):
    """What `path` names, symbolic links followed -> its Path, and its os.stat or None."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        there = None
    except ValueError as error:                         # a NUL, or half a surrogate pair
        raise OSError(f"not a possible name: {error}") from None
    return Path(os.path.realpath(path)), there


def _standard_streams():
    """os.stat of the files behind standard input, output and error."""
    for number in range(3):
        with suppress(OSError):                         # closed
            yield os.fstat(number)


def _free_name(folder):
    """A name for something temporary that nobody can guess, as short for names of any length."""
    _sweep(folder)
    return folder / f".tinyldm-{os.getpid()}-{secrets.token_hex(8)}.tmp"


def _sweep(folder):
    """Delete what killed processes left in a folder: old, and named as we name what is temporary.
    """
    with suppress(OSError):
        for entry in os.scandir(folder):
            match = TEMPORARY.fullmatch(entry.name)
            if not match or time.time() - entry.stat(follow_symlinks=False).st_mtime < ABANDONED:
                continue
            if not _runs(int(match[1])):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    os.unlink(entry)


def _runs(process):
    if os.name != "posix":                              # there os.kill would end the process
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:                             # somebody else's
        pass
    return True


def _copy_into(source, path):
    """Write a file's content into another one, whose hard links then show it as well."""
    with open(source, "rb") as new, open(path, "rb+") as file:
        size = os.fstat(new.fileno()).st_size
        if size and hasattr(os, "posix_fallocate"):     # is the disk full? before anything is lost
            os.posix_fallocate(file.fileno(), 0, size)
        shutil.copyfileobj(new, file)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def _keep_others(old, new):
    """Copy what only the old folder has into the new one."""
    for entry in old.iterdir():
        if not os.path.lexists(new / entry.name):
            if entry.is_dir() and not entry.is_symlink():
                shutil.copytree(entry, new / entry.name, symlinks=True)
            else:
                shutil.copy2(entry, new / entry.name, follow_symlinks=False)
    shutil.copymode(old, new)


def _exchange(new, path):
    """Exchange two folders. If the second move fails, the first one is undone."""
    old = new.with_suffix(".old")                       # a name that _sweep leaves alone
    try:
        os.replace(path, old)
        os.replace(new, path)
    except BaseException:
        if not path.exists():
            os.replace(old, path)
        raise
    os.replace(old, new)
