"""Previews while a picture is drawn, animations, and pictures in the terminal.

Every state of a sampler has a prediction of the clean latents, State.pred_x0; a preview shows it.
"""
import os
import shutil
import sys
import warnings

import numpy as np
from tqdm import tqdm

from ..backend import to_host
from ..images import save, to_pil

DECODED = 256 * 256         # pixels: up to this size the VAE is fast enough for previews
PATCHES = 8                 # per side, of one colour each, to which the linear map is fitted
FRAME, LAST_FRAME = 120, 2000   # milliseconds
BAR = 2                     # lines below a picture in the terminal: two progress bars


class Preview:
    """Pictures of predicted latents: by the VAE if they are small, else by a fast linear map.

    Colours are nearly a linear function of a latent's channels. When the map is first needed, it is
    fitted to the pipeline's own VAE: least squares between patches of random latents and the mean
    colours of the decoded patches.
    """

    def __init__(self, pipe):
        self.pipe, self.map = pipe, None

    def __call__(self, latents):
        """Clean latents (1,h,w,C) -> a PIL image of the picture's size."""
        _, h, w, C = latents.shape
        factor = self.pipe.scale_factor
        if factor == 1 or h * w * factor ** 2 <= DECODED:
            return to_pil(self.pipe.decode(latents))[0]
        if self.map is None:
            self.map = self._fit(C)
        image, = to_pil(with_ones(to_host(latents)) @ self.map)
        return image.resize((w * factor, h * factor))                   # bicubic

    def _fit(self, C):                                  # -> (C+1,3)
        patches = np.random.default_rng(0).standard_normal((1, PATCHES, PATCHES, C), np.float32)
        images = to_host(self.pipe.decode(patches.repeat(2, axis=1).repeat(2, axis=2)))
        side = images.shape[1] // PATCHES
        colours = images.reshape(PATCHES, side, PATCHES, side, 3).mean(axis=(1, 3))
        return np.linalg.lstsq(with_ones(patches).reshape(-1, C + 1), colours.reshape(-1, 3))[0]


def with_ones(x):
    """x (...,C) -> (...,C+1): a column of ones for the map's constant."""
    return np.concatenate([x, np.ones_like(x[..., :1])], axis=-1)


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
