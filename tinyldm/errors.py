"""Messages for users: the one exception for bad input, and notes, which are warnings."""
import re
import sys
import warnings

LONGEST_WORD, LONGEST_LINE = 300, 2000                  # characters; a path may have 255 per folder
NAMES_SHOWN = 8                                         # of a list of names


class TinyldmError(ValueError):
    """What was expected, what came, what to do next. The command line exits with status 2.

    Each argument is one line of the message: a sentence, and seldom lists of names after it.
    """

    def __init__(self, *lines):
        super().__init__(*map(clean, lines))

    def __str__(self):
        return "\n  ".join(self.args)


def note(message):
    """Warn, and name the line of the caller's own code: the first frame outside of tinyldm."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] == "tinyldm":
        frame, level = frame.f_back, level + 1
    warnings.warn(clean(message), stacklevel=level)


def clean(text, longest=LONGEST_LINE):
    """One line that is safe to print, from text that a file or a user may have chosen.

    Names in files may hold escape sequences, newlines, marks that turn the direction of writing,
    or a million letters. Newlines and tabs become a space, whatever else does not print becomes
    "?". The middle is left out of words longer than LONGEST_WORD, and of a line longer than
    `longest`. Cleaning twice changes nothing.
    """
    text = _cut(str(text), 50 * longest)                # bounds the work of the next lines
    text = re.sub(r"\s+", lambda gap: " " if gap[0].strip(" ") else gap[0], text)
    text = re.sub(r"\S+", lambda word: _cut(word[0], LONGEST_WORD), text)
    return "".join(char if char.isprintable() else "?" for char in _cut(text, longest))


def shorten(names):
    """How many names there are, and the first few; or "none"."""
    if not names:
        return "none"
    rest = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{len(names)}: {', '.join(map(str, names[:NAMES_SHOWN]))}{rest}"


def _cut(text, longest):
    """Keep the beginning and the end; a sentence's advice stands at its end."""
    head, tail = longest * 2 // 3, longest // 3 - 5
    return text if len(text) <= longest else f"{text[:head]} ... {text[len(text) - tail:]}"
