"""Files for every part: strict reading of JSON, and writing that leaves no half-written file."""
import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import TinyldmError


def read_json(path):
    """The object in a JSON file. Raises TinyldmError for a missing or malformed file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
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
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


@contextmanager
def temporary_beside(path):
    """A temporary name in the folder of `path`; a file of that name is deleted at the end.

    Raises TinyldmError if nothing can be written there.
    """
    with _free_name(Path(path)) as temporary:
        try:
            yield temporary
        finally:
            with suppress(OSError):                     # moved away, or never written
                temporary.unlink()


@contextmanager
def _free_name(path):
    """A name beside path; the system's errors in writing there become TinyldmErrors."""
    try:
        yield path.with_name(f".{path.name}.{os.getpid()}.tmp")
    except OSError as error:
        raise TinyldmError(f"cannot write {path} ({error.strerror or error}): "
                           "choose another place") from None


@contextmanager
def replacing(path):
    """A temporary name beside `path`, moved there at the end: `path` is whole or untouched.

    Raises TinyldmError if the file cannot be written.
    """
    with temporary_beside(path) as temporary:
        yield temporary
        os.replace(temporary, path)


@contextmanager
def new_folder(path):
    """A temporary folder beside `path`, moved there at the end: `path` is whole or not there.

    Raises TinyldmError if `path` is not empty, or if nothing can be written there.
    """
    path = Path(os.path.abspath(path))
    with _free_name(path) as temporary:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise TinyldmError(f"{path} exists already: name a new folder, or an empty one")
        try:
            temporary.mkdir(parents=True)
            yield temporary
            if path.exists():
                path.rmdir()                            # some systems do not replace a folder
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)    # moved away, or left half-written
