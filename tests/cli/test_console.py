"""What all programs share: exit statuses, signals, and output that cannot be written."""
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from tests.support.command import environment
from tinyldm.cli.console import Lenient, Stopped, say, status
from tinyldm.errors import TinyldmError

unix = pytest.mark.skipif(sys.platform == "win32", reason="needs a shell of Unix")
PROMPT = "a big red star on a white background"


# ---- the status -----------------------------------------------------------------------------

def stop(error):
    def run():
        raise error
    return run


@pytest.mark.parametrize("run, expected, said", [
    (lambda: None, 0, ""), (stop(TinyldmError("expected this")), 2, "error: expected this\n"),
    (stop(KeyboardInterrupt()), 130, "\ninterrupted\n"), (stop(SystemExit(0)), 0, ""),
    (lambda: signal.raise_signal(signal.SIGINT), 130, "\ninterrupted\n"),
    (lambda: signal.raise_signal(signal.SIGTERM), 143, "\nterminated\n")])
def test_a_status_for_every_end(run, expected, said, capsys):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert status(run) == expected
    assert capsys.readouterr().err == said
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_an_interrupt_that_becomes_another_exception(capsys):
    """As in the import of a library in C."""
    def run():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("no module") from None
    assert status(run, "stopped") == 130 and capsys.readouterr().err == "\nstopped\n"


def test_whoever_cleans_after_an_interrupt_cleans_after_sigterm():
    done = []

    def run():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            done.append(type(error))
            raise
    assert status(run) == 143 and done == [Stopped]


def test_a_mistake_in_the_program_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        status(lambda: 1 / 0)


# ---- output that cannot be written ------------------------------------------------------------

def shell(command, folder, **variables):
    """A line of a shell, with $PY and $PROMPT -> its process; $? of the program is the status."""
    variables = {"PY": sys.executable, "PROMPT": PROMPT} | variables
    return subprocess.run(["sh", "-c", command], cwd=folder, env=environment() | variables,
                          capture_output=True, timeout=300)


DRAW = '"$PY" -m tinyldm "$PROMPT" --steps 1 '


@unix
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("redirection, reason", [
    (">&-", "it is closed"), (">/dev/full", "No space left on device")])
def test_a_picture_is_drawn_though_its_path_cannot_be_printed(
        redirection, reason, unbuffered, tmp_path):
    process = shell(DRAW + redirection, tmp_path, PYTHONUNBUFFERED=unbuffered)
    assert process.returncode == 0 and process.stdout == b""
    last = process.stderr.decode().splitlines()[-1]
    assert last == (f"note: standard output cannot be written ({reason}): send it elsewhere; the "
                    "picture is there: out.png")
    assert Image.open(tmp_path / "out.png").size == (64, 64)


@unix
@pytest.mark.parametrize("redirection", [
    "2>&-", "2>/dev/full", ">&- 2>&-", ">/dev/full 2>/dev/full", ">&- 2>&- <&-"])
def test_a_picture_is_drawn_without_standard_error(redirection, tmp_path):
    assert shell(DRAW + redirection, tmp_path).returncode == 0
    assert Image.open(tmp_path / "out.png").size == (64, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


@unix
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_path_that_the_encoding_lacks(encoding, tmp_path):
    process = shell(DRAW + "--output 図.png", tmp_path, PYTHONIOENCODING=encoding)
    assert process.returncode == 0 and process.stdout == b""        # no other file's name
    assert process.stderr.decode().splitlines()[-1] == (
        f"note: standard output cannot take every character in its encoding {encoding}: set "
        "PYTHONIOENCODING=utf-8; the picture is there: \\u56f3.png")
    read = shell('"$PY" -m tinyldm.inspect 図.png', tmp_path, PYTHONIOENCODING=encoding)
    assert read.returncode == 0 and read.stderr == b""
    assert read.stdout.startswith(b"\\u56f3.png: a picture of 64x64 pixels")


@unix
@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are valid text")
def test_a_path_of_bytes_that_are_no_text(tmp_path):
    process = shell(DRAW + '--output "$(printf \'x\\377.png\')"', tmp_path, PYTHONUTF8="1")
    assert process.returncode == 0 and process.stdout == b"x\xff.png\n"
    assert os.listdir(os.fsencode(tmp_path)) == [b"x\xff.png"]


@unix
@pytest.mark.parametrize("program", [
    "tinyldm --help", "tinyldm --version", "tinyldm.inspect --help", "tinyldm.shapes --help",
    "tinyldm.training --help", "tinyldm.inspect out.png",
    "tinyldm.shapes evaluate --prompts 1 --weights ."])
@pytest.mark.parametrize("redirection, reason", [
    (">&-", "it is closed"), (">/dev/full", "No space left on device")])
def test_programs_whose_result_cannot_be_printed(program, redirection, reason, tmp_path, weights):
    Image.new("RGB", (8, 8)).save(tmp_path / "out.png", pnginfo=_parameters())
    program = program.replace("--weights .", "")
    process = shell(f'"$PY" -m {program} {redirection}', tmp_path)
    assert process.returncode == 2 and b"Traceback" not in process.stderr
    assert process.stderr.decode().splitlines()[-1] == (
        f"error: standard output cannot be written ({reason}): send it elsewhere")


def _parameters():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", "a cat")
    return info


def test_standard_error_that_is_none(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert status(stop(TinyldmError("unheard"))) == 2
    assert Lenient(None).write("x") is None


def test_what_is_said_to_a_stream_without_an_encoding(monkeypatch):
    class Words(list):
        write, flush = list.append, lambda self: None
    monkeypatch.setattr(sys, "stdout", Words())
    say("図")
    assert "".join(sys.stdout) == "図\n"


# ---- signals ----------------------------------------------------------------------------------

IMPORTING = """
import builtins, signal, sys
original = builtins.__import__
def importing(name, *rest, **options):
    if name == {name!r}:
        signal.raise_signal(signal.{number})
    return original(name, *rest, **options)
builtins.__import__ = importing
signal.signal(signal.SIGINT, signal.default_int_handler)
import runpy
sys.argv[1:] = ["x"]
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


@unix
@pytest.mark.parametrize("number, expected", [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("module, name", [
    ("tinyldm", "numpy"), ("tinyldm", "options"), ("tinyldm", "argparse"),
    ("tinyldm.inspect", "numpy"), ("tinyldm.shapes", "tqdm"), ("tinyldm.training", "argparse")])
def test_a_signal_during_imports(module, name, number, expected, tmp_path):
    code = IMPORTING.format(module=module, name=name, number=number)
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(),
                             capture_output=True, text=True)
    assert process.returncode == expected, process.stderr
    assert process.stderr.startswith("\n") and process.stderr.count("\n") == 2


@unix
@pytest.mark.parametrize("number, expected", [
    (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_while_saving_leaves_no_half_file(number, expected, tmp_path):
    """The picture is written slowly, so that the signal comes in the middle."""
    code = ("import signal, sys, time\nfrom tinyldm import images\n"
            "from tinyldm.cli.draw import main\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "def write(image, path, temporary, text, **options):\n"
            "    temporary.write_bytes(b'half')\n"
            "    if text:\n        print('saving', flush=True)\n        time.sleep(60)\n"
            f"images.write = write\nsys.exit(main([{PROMPT!r}, '--steps', '1']))")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"saving\n"
    assert list(tmp_path.iterdir())
    time.sleep(0.1)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == expected and b"Traceback" not in said, said
    assert not list(tmp_path.iterdir())
