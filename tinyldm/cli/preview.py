"""Pictures in the terminal, while one is drawn, and animations.

The pictures come from pipelines/preview.py.
"""
import os
import shutil
import sys
import warnings

import numpy as np
from tqdm import tqdm

from ..images import save

FRAME, LAST_FRAME = 120, 2000   # milliseconds
BAR = 2                     # lines below a picture in the terminal: two progress bars


# ---- the terminal -----------------------------------------------------------------------------

class Live:
    """The picture in the terminal, drawn again at the same place at every step, above the bar."""

    def __init__(self):
        self.lines = self.room = 0                      # of the frame that may be drawn over
        warn = warnings.showwarning

        def warn_and_go_on_below(*warning):
            warn(*warning)
            self.lines = 0
        warnings.showwarning = warn_and_go_on_below

    def show(self, image, below=0):
        """Draw a PIL image. below: how many lines are between it and the cursor."""
        room = shutil.get_terminal_size(_size_of_stderr())
        if room != self.room:                           # resized: the old lines may have wrapped
            self.lines, self.room = 0, room
        text = half_blocks(image, room.columns, max(room.lines - BAR - 1, 1))
        up, down = f"\x1b[{self.lines + below}A\r", f"\x1b[{below}B"
        if not self.lines:
            up = down = ""
        with tqdm.external_write_mode(file=sys.stderr):
            sys.stderr.write(f"{up}{text}\n{down if below else ''}")
        self.lines = text.count("\n") + 1

    def finish(self, image):
        """Draw the finished picture in the place of its last frame; it stays."""
        self.show(image, BAR)
        self.lines = 0


def obstacle():
    """Why the terminal cannot show a picture; None if it can."""
    if os.environ.get("NO_COLOR"):                      # see no-color.org
        return "NO_COLOR is set"
    if os.environ.get("TERM") == "dumb":
        return "TERM is dumb"
    try:
        "\u2580".encode(sys.stderr.encoding)
        if sys.stderr.isatty():
            return None
    except (AttributeError, TypeError, ValueError):     # None, closed, or another encoding
        pass
    return "standard error is no terminal that takes it"


def _size_of_stderr():
    """(columns, lines), for shutil to use where standard output is no terminal."""
    try:
        columns, lines = os.get_terminal_size(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):
        columns = lines = 0
    return columns or 80, lines or 24                   # some terminals do not know theirs


def half_blocks(image, columns, rows):
    """A PIL image as text for a terminal with 24-bit colours, two pixels per character.

    A character's upper half has the foreground colour, the lower half the background colour.
    """
    scale = min(columns / image.width, 2 * rows / image.height, 1)
    width, height = max(1, int(image.width * scale)), max(2, int(image.height * scale) // 2 * 2)
    pixels = np.asarray(image.convert("RGB").resize((width, height)))   # (2*lines, width, 3)
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2]):
        cells = ("\x1b[38;2;{};{};{};48;2;{};{};{}m\u2580".format(*a, *b)
                 for a, b in zip(upper, lower))
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


# ---- animations -------------------------------------------------------------------------------

def save_film(frames, path, text):
    """Write PIL images as an animated GIF or WebP, whole or not at all; text: see images.save."""
    durations = [FRAME] * (len(frames) - 1) + [LAST_FRAME]
    save(frames[0], path, text, save_all=True, append_images=frames[1:], duration=durations, loop=0)
