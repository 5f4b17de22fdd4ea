"""Messages for users: the one exception for bad input, and notes, which are warnings."""
import sys
import warnings


class TinyldmError(ValueError):
    """What was expected, what came, what to do next. The command line exits with status 2."""


def note(message):
    """Warn, and name the line of the caller's own code: the first frame outside of tinyldm."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] == "tinyldm":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
