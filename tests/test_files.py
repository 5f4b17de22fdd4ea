"""Files that are whole or untouched, whatever lies at their name and whatever happens meanwhile."""
import errno
import os
import stat
import subprocess
import sys
import time

import pytest

from tinyldm import files
from tinyldm.errors import TinyldmError
from tinyldm.files import new_folder, replacing, temporary_beside

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links and permissions of POSIX")


def write(path, text="new"):
    with replacing(path) as temporary:
        temporary.write_text(text)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


# ---- what lies at the name ------------------------------------------------------------------

def test_permissions(tmp_path):
    """A new file has those that open() gives; an existing file keeps its own."""
    before = os.umask(0o027)
    try:
        write(tmp_path / "new")
    finally:
        os.umask(before)
    assert mode(tmp_path / "new") == 0o640
    for own in (0o600, 0o664, 0o755):
        (tmp_path / "new").chmod(own)
        write(tmp_path / "new", str(own))
        assert mode(tmp_path / "new") == own and (tmp_path / "new").read_text() == str(own)


def test_symbolic_links_stay_links(tmp_path):
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "file"
    target.write_text("old")
    (tmp_path / "link").symlink_to("there/file")
    (tmp_path / "link to link").symlink_to("link")
    for link in ("link", "link to link"):
        write(tmp_path / link, link)
        assert (tmp_path / link).is_symlink() and target.read_text() == link
    target.unlink()                                     # a link to nothing: its file is made
    write(tmp_path / "link", "again")
    assert target.read_text() == "again" and names(tmp_path / "there") == ["file"]


def test_a_loop_of_links(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(TinyldmError, match="cannot write .*a .*symbolic links"):
        write(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "short", "long " * 10_000])
def test_hard_links_stay_one_file(text, tmp_path):
    (tmp_path / "file").write_text("old content")
    os.link(tmp_path / "file", tmp_path / "other")
    write(tmp_path / "file", text)
    assert (tmp_path / "other").read_text() == text
    assert (tmp_path / "file").samefile(tmp_path / "other")


@pytest.mark.parametrize("length", [1, 250, 251, 255])
def test_names_up_to_the_systems_longest(length, tmp_path):
    write(tmp_path / ("n" * length))
    with new_folder(tmp_path / ("f" * length)) as folder:
        (folder / "x").touch()
    assert names(tmp_path) == ["f" * length, "n" * length]


@pytest.mark.parametrize("path, message", [
    (".", "it is a folder"), ("/dev/null", "it is a device or a pipe"),
    ("/dev/full", "it is a device or a pipe"), ("none/file", "No such file or directory"),
    ("n" * 256, "File name too long"), ("a\0b", "not a possible name"),
    ("\ud800", "not a possible name"),
])
def test_what_cannot_be_written(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TinyldmError, match=f"cannot write .*{message}"):
        write(path)
    assert names(tmp_path) == []


def test_the_programs_own_output_is_not_replaced(tmp_path):
    """/dev/stdout may be a file: replacing it would lose what was printed there."""
    code = "from tinyldm.files import replacing\nwith replacing('/dev/stdout') as t: pass"
    for output in (tmp_path / "out", subprocess.PIPE):
        stream = output if output is subprocess.PIPE else open(output, "w")
        done = subprocess.run([sys.executable, "-c", code], stdout=stream, stderr=subprocess.PIPE,
                              text=True)
        assert "TinyldmError: cannot write /dev/stdout" in done.stderr
    assert names(tmp_path) == ["out"]


def test_a_write_protected_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, "access", lambda path, how: False)      # root may write anything
    with pytest.raises(TinyldmError, match="cannot write .*file .it is write-protected"):
        write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old"


# ---- what happens meanwhile -----------------------------------------------------------------

def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    """Were a name guessed, the file that somebody's link names would be written."""
    (tmp_path / "victim").write_text("victim")
    monkeypatch.setattr(files.secrets, "token_hex", lambda length: "0" * 2 * length)
    (tmp_path / f".tinyldm-{os.getpid()}-{'0' * 16}.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(TinyldmError, match="cannot write .*File exists"):
        write(tmp_path / "file")
    assert (tmp_path / "victim").read_text() == "victim" and not (tmp_path / "file").exists()


def test_names_of_temporary_files_differ(tmp_path):
    with temporary_beside(tmp_path / "x") as one, temporary_beside(tmp_path / "x") as other:
        assert one != other and names(tmp_path) == sorted([one.name, other.name])
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("existing", [None, "file", "hard link"])
@pytest.mark.parametrize("at", ["the content", os.fsync])
def test_a_failure_leaves_the_old_file(error, existing, at, tmp_path, monkeypatch):
    def fail(*_):
        raise error
    if existing:
        (tmp_path / "file").write_text("old")
    if existing == "hard link":
        os.link(tmp_path / "file", tmp_path / "link")
    before = names(tmp_path)
    if at is os.fsync:                                  # some systems say only here that it is full
        monkeypatch.setattr(os, "fsync", fail)
    message = "file .No space left on device" if isinstance(error, OSError) else None
    with pytest.raises((TinyldmError, KeyboardInterrupt, MemoryError), match=message):
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("half")
            if at == "the content":
                fail()
    assert names(tmp_path) == before
    assert not existing or (tmp_path / "file").read_text() == "old"


def test_the_content_is_on_the_disk_before_it_moves(tmp_path, monkeypatch):
    seen = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (seen.append("fsync"), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda *paths: (seen.append("replace"), replace(*paths)))
    write(tmp_path / "file")
    assert seen == ["fsync", "replace"]


# ---- what killed processes left -------------------------------------------------------------

GONE = 2 ** 22 + 1          # above the largest process number of Linux


@pytest.mark.parametrize("name, age, kept", [
    (f".tinyldm-{GONE}-0123456789abcdef.tmp", 7200, False),
    (f".tinyldm-{GONE}-0123456789abcdef.tmp", 60, True),
    (f".tinyldm-{os.getpid()}-0123456789abcdef.tmp", 7200, True),
    (f".tinyldm-{GONE}-0123456789abcdef.tmp.png", 7200, True),
    (f".tinyldm-{GONE}-0123.tmp", 7200, True),
    (f".other-{GONE}-0123456789abcdef.tmp", 7200, True),
    (f".tinyldm-{'9' * 30}-0123456789abcdef.tmp", 7200, False),
])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_only_our_old_files_of_ended_processes_are_deleted(name, age, kept, kind, tmp_path):
    left, other = tmp_path / name, tmp_path / "other"
    other.write_text("other")
    if kind == "folder":
        left.mkdir()
        (left / "x").touch()
    elif kind == "link":
        left.symlink_to(other)
    else:
        left.touch()
    then = time.time() - age
    os.utime(left, (then, then), follow_symlinks=False)
    write(tmp_path / "file")
    assert os.path.lexists(left) == kept and other.read_text() == "other"


# ---- folders --------------------------------------------------------------------------------

def fill(folder, **contents):
    folder.mkdir(exist_ok=True)
    for name, text in contents.items():
        (folder / name).write_text(text)


@pytest.fixture
def full(tmp_path):
    """A folder with the marker, and what only it has."""
    fill(tmp_path / "full", marker="old", notes="mine")
    fill(tmp_path / "full" / "part", a="old", b="old")
    fill(tmp_path / "full" / "mine", x="mine")
    (tmp_path / "full").chmod(0o750)
    return tmp_path / "full"


def test_a_full_folder_is_replaced_as_a_whole(full):
    with new_folder(full, "marker") as folder:
        fill(folder, marker="new")
        fill(folder / "part", a="new")
        assert (full / "marker").read_text() == "old"
    assert names(full) == ["marker", "mine", "notes", "part"] and mode(full) == 0o750
    assert names(full / "part") == ["a"] and (full / "part" / "a").read_text() == "new"
    assert (full / "marker").read_text() == "new" and (full / "mine" / "x").read_text() == "mine"
    assert names(full.parent) == ["full"]


@pytest.mark.parametrize("call", [0, 1, None])
def test_a_folder_whose_replacement_fails_stays(call, full, monkeypatch):
    """In the first move, in the second, or before both."""
    replace, calls = os.replace, []

    def fail(*paths):
        calls.append(paths)
        if len(calls) - 1 == call:
            raise KeyboardInterrupt
        replace(*paths)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        with new_folder(full, "marker") as folder:
            fill(folder, marker="new")
            if call is None:
                raise KeyboardInterrupt
    assert (full / "marker").read_text() == "old" and names(full.parent) == ["full"]


@pytest.mark.parametrize("marker", [None, "another"])
def test_a_folder_of_something_else_is_not_replaced(marker, full):
    with pytest.raises(TinyldmError, match="full exists already: name a new folder"):
        with new_folder(full, marker):
            pass
    (full.parent / "file").write_text("old")
    with pytest.raises(TinyldmError, match="file exists already: name a new folder"):
        with new_folder(full.parent / "file", marker):
            pass


def test_a_link_to_a_folder_stays_a_link(full):
    (full.parent / "link").symlink_to("full")
    with new_folder(full.parent / "link", "marker") as folder:
        fill(folder, marker="new")
    assert (full.parent / "link").is_symlink() and (full / "marker").read_text() == "new"
