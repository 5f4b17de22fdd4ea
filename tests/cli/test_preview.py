"""What is shown while a picture is drawn: previews, animations, the terminal."""
import contextlib
import os
import re
import struct
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from tests.support.command import command, environment
from tests.support.terminal import Screen
from tinyldm.cli import preview
from tinyldm.cli.draw import main
from tinyldm.cli.preview import half_blocks
from tinyldm.pipelines.stable_diffusion import StableDiffusion

PROMPT = "a big red star left of a small blue circle on a yellow background"


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), int)


# ---- previews -------------------------------------------------------------------------------

@pytest.mark.parametrize("options, names", [
    (["--preview", "2"], ["out-step2.png", "out-step4.png", "out.png"]),
    (["--preview", "9"], ["out.png"]),
    (["--preview", "5", "--count", "2"],
     ["out-0-step5.png", "out-0.png", "out-1-step5.png", "out-1.png", "out-sheet.png"]),
    (["--animate", "{}/film.gif", "--count", "2"],
     ["film-0.gif", "film-1.gif", "out-0.png", "out-1.png", "out-sheet.png"]),
])
def test_files(options, names, tmp_path):
    command = [PROMPT, "--steps", "5", "--output", str(tmp_path / "out.png")]
    assert main(command + [option.format(tmp_path) for option in options]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_the_previews_approach_the_picture(tmp_path):
    main([PROMPT, "--steps", "20", "--preview", "5", "--output", str(tmp_path / "out.png")])
    last = pixels(tmp_path / "out.png")
    errors = [abs(pixels(tmp_path / f"out-step{n}.png") - last).mean() for n in (5, 10, 15, 20)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 2
    text = Image.open(tmp_path / "out-step5.png").text["parameters"]
    assert text == Image.open(tmp_path / "out.png").text["parameters"]


# ---- animations -----------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_has_a_frame_a_step_and_ends_in_the_picture(suffix, tmp_path):
    out, film = tmp_path / "out.png", tmp_path / f"film{suffix}"
    assert main([PROMPT, "--steps", "4", "--output", str(out), "--animate", str(film)]) == 0
    with Image.open(film) as image:
        assert image.n_frames == 4
        image.seek(3)
        last = np.asarray(image.convert("RGB"), int)
    assert abs(last - pixels(out)).mean() < 8           # 256 colours, or compressed


def test_the_last_frame_is_the_picture_in_the_place_of_its_preview(tmp_path):
    """pndm's last preview differs from the picture; the frame must be the picture."""
    out, film = tmp_path / "out.png", tmp_path / "film.gif"
    assert main([PROMPT, "--steps", "4", "--sampler", "pndm", "--output", str(out),
                 "--animate", str(film)]) == 0
    with Image.open(film) as image:
        assert image.n_frames == 5                      # the calls of pndm


@pytest.mark.parametrize("options, message", [
    (["--preview", "0"], "--preview must be at least 1 step, not 0"),
    (["--preview", "two"], "invalid int value"),
    (["--animate", "{}/film.png"], "--animate must name a .gif or .webp file, not .*film.png"),
    (["--animate", "{}/none/film.gif"], "there is no folder .*none"),
])
def test_bad_input(options, message, tmp_path, capsys):
    command = [PROMPT, "--output", str(tmp_path / "out.png")]
    assert main(command + [option.format(tmp_path) for option in options]) == 2
    assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


# ---- the terminal ---------------------------------------------------------------------------

def parsed(text):
    """The colours that half_blocks writes, as an image (2*lines, columns, 3)."""
    rows = []
    for line in text.splitlines():
        assert line.endswith("\x1b[0m")
        cells = re.findall(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m\u2580", line)
        cells = np.array(cells, int).reshape(-1, 2, 3)
        rows += [cells[:, 0], cells[:, 1]]
    return np.stack(rows)


@pytest.mark.parametrize("size, room, expected", [
    ((6, 4), (80, 24), (4, 6)), ((7, 5), (80, 24), (4, 7)),      # never enlarged; lines are whole
    ((100, 100), (40, 80), (40, 40)), ((100, 100), (400, 10), (20, 20)),
    ((90, 1), (30, 10), (2, 30)),
])
def test_half_blocks(size, room, expected):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    colours = parsed(half_blocks(image, *room))
    assert colours.shape == (*expected, 3)
    np.testing.assert_array_equal(colours, np.asarray(image.resize(expected[::-1])))


@pytest.fixture
def terminal(monkeypatch):
    """Standard error is a terminal of 60x40 characters, for what runs in this process."""
    monkeypatch.setattr(preview, "obstacle", lambda: None)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "40")
    return Screen(60, 40)


def test_show(tmp_path, capsys, terminal):
    out = tmp_path / "out.png"
    assert main([PROMPT, "--steps", "3", "--output", str(out), "--show"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"                    # for programs; the picture is for people
    assert printed.err.count("\u2580") == 4 * 60 * 30   # three steps and the finished picture ...
    [shown] = terminal.feed(printed.err).pictures()     # ... at one place
    np.testing.assert_array_equal(shown, np.asarray(Image.open(out).resize((60, 60))))
    lines = terminal.text()                             # around it, each in a line of its own
    place = lines.index("\u2580" * 60)
    assert lines[place - 1].startswith("reading the prompt:")
    assert lines[place + 30].startswith("drawing: 100%|")
    assert lines[place + 31].startswith("decoding:") and lines[place + 32:] == [""]


def test_every_step_is_shown(tmp_path, capsys, terminal):
    main([PROMPT, "--steps", "3", "--output", str(tmp_path / "out.png"), "--show", "--preview",
          "1"])
    said = capsys.readouterr().err
    for step, frame in enumerate(said.split("\x1b[30A")[:3], 1):
        last = Screen(60, 40).feed(frame).pictures()[-1]
        expected = Image.open(tmp_path / f"out-step{step}.png").resize((60, 60))
        np.testing.assert_array_equal(last, np.asarray(expected))


def test_pictures_that_are_shown_stand_below_one_another(tmp_path, capsys, terminal):
    out = tmp_path / "out.png"
    assert main([PROMPT, "--steps", "2", "--count", "2", "--output", str(out), "--show"]) == 0
    shown = terminal.feed(capsys.readouterr().err).pictures()
    for picture, name in zip(shown, ("out-0.png", "out-1.png"), strict=True):
        expected = Image.open(tmp_path / name).resize((60, 60))
        np.testing.assert_array_equal(picture, np.asarray(expected))


def test_a_note_while_a_picture_is_shown_stays(tmp_path, capsys, terminal, monkeypatch):
    decode = StableDiffusion.decode

    def noting(self, latents):
        warnings.warn("look", stacklevel=1)             # the command line says it once
        return decode(self, latents)
    monkeypatch.setattr(StableDiffusion, "decode", noting)
    out = tmp_path / "out.png"
    assert main([PROMPT, "--steps", "2", "--output", str(out), "--show"]) == 0
    screen = terminal.feed(capsys.readouterr().err)
    assert "note: look" in screen.text()
    expected = np.asarray(Image.open(out).resize((60, 60)))
    np.testing.assert_array_equal(screen.pictures()[-1], expected)


@pytest.mark.parametrize("variables, reason", [
    ({"NO_COLOR": "1"}, "NO_COLOR is set"), ({"TERM": "dumb"}, "TERM is dumb"),
    ({"NO_COLOR": ""}, "standard error is no terminal that takes it")])
def test_show_without_a_terminal(variables, reason, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out.png"
    assert main([PROMPT, "--steps", "1", "--output", str(out), "--show"]) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"note: --show has no place to draw: {reason}\n")
    assert "\x1b[38" not in said


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("columns, lines", [(80, 24), (20, 50), (5, 4)])
def test_show_in_a_real_terminal(columns, lines, tmp_path):
    """Standard error is the terminal; standard output is a pipe, as in out=$(python -m tinyldm)."""
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))
    variables = {name: value for name, value in environment().items()
                 if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(command(PROMPT, "--steps", 2, "--show"), cwd=tmp_path,
                               env=variables | {"TERM": "xterm"}, stdout=subprocess.PIPE,
                               stderr=theirs)
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):                  # EIO where the other side is closed
        while piece := os.read(ours, 1 << 16):
            said += piece
    os.close(ours)
    assert process.communicate()[0] == b"out.png\n" and process.returncode == 0
    screen = Screen(columns, lines).feed(said.decode().replace("\r\n", "\n"))
    side = min(columns, 2 * max(lines - 3, 1), 64)
    if lines > 4:                                       # else the bar may wrap over the picture
        [shown] = screen.pictures()
        expected = Image.open(tmp_path / "out.png").resize((side, side // 2 * 2))
        np.testing.assert_array_equal(shown, np.asarray(expected))


def test_a_terminal_that_does_not_know_its_size(monkeypatch):
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((0, 0)))
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    assert preview._size_of_stderr() == (80, 24)
