"""What all programs share: their exit status, and output that cannot be written.

    def run(): ...; say("a line of the result")
    sys.exit(status(run))

It imports nothing that takes time: what runs inside `run`, imports too, can be interrupted.
"""
import os
import signal
import sys
import warnings
from contextlib import contextmanager, redirect_stderr, suppress
from importlib import import_module

from ..errors import TinyldmError, clean
from ..signals import handled


class Stopped(KeyboardInterrupt):
    """A signal that ends the program: whoever saves or cleans after Ctrl-C does so for all.

    It is a class of its own because Python, at its exit, sends itself the signal of a plain
    KeyboardInterrupt that went through an `exec`, as in the imports of many libraries.
    """


def status(run, interrupted="interrupted"):
    """Run a program -> exit status; what stops it is said in one line on standard error.

    2 for bad input, 130 for Ctrl-C and 143 for SIGTERM, 141 where the reader of standard output
    left. interrupted: what to say after Ctrl-C.
    """
    with redirect_stderr(Lenient(sys.stderr)), _signals() as came:
        try:
            return _run(run)
        except BaseException as error:
            # An import that a signal stopped may end in another exception, such as ImportError.
            if came or isinstance(error, KeyboardInterrupt):
                number = came[0] if came else signal.SIGINT
                said = interrupted if number == signal.SIGINT else "terminated"
                print(f"\n{said}", file=sys.stderr)
                return 128 + number                     # as in shells
            if isinstance(error, BrokenPipeError):      # the output's reader, such as head, left
                discard(sys.stdout)
                return 141                              # 128 + SIGPIPE
            if isinstance(error, TinyldmError):
                print(f"error: {error}", file=sys.stderr)
                return 2
            raise


def start(module, arguments, interrupted="interrupted"):
    """Run a program's run(arguments) -> exit status. module: its full name, imported only now, so
    that Ctrl-C may come. arguments: None for the process's own."""
    return status(lambda: import_module(module).run(arguments), interrupted)


def _run(run):
    try:
        run()
        code = 0
    except SystemExit as exit:                          # argparse, after --help
        code = exit.code or 0
    with _writing():
        if sys.stdout:
            sys.stdout.flush()
    return code


@contextmanager
def _signals():
    """Inside, Ctrl-C, SIGTERM and SIGHUP raise Stopped, unless the caller has set them otherwise.

    Gives the list of the signals that came.
    """
    came = []

    def stop(number, _):
        came.append(number)
        raise Stopped(number)

    with handled(stop, (signal.SIG_DFL, signal.default_int_handler).__contains__):
        yield came


@contextmanager
def notes():
    """Inside, warnings are notes on standard error: in one line, once, without the source."""
    shown = set()

    def show_warning(message, *_):
        message = clean(message)                        # other libraries warn, too
        if message not in shown:
            from tqdm import tqdm  # which prints above its own progress bars
            tqdm.write(f"note: {message}", file=sys.stderr)
        shown.add(message)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show_warning
        yield


# ---- output -----------------------------------------------------------------------------------

def say(text, exact=False):
    """Print on standard output.

    Characters that its encoding lacks become escapes such as \\u56f3. exact: the text is a path,
    which other programs read, so they are an error.
    Raises TinyldmError if the text cannot be written.
    """
    with _writing():
        if sys.stdout is None:
            raise OSError("it is closed")
        if hasattr(sys.stdout, "reconfigure"):
            # surrogateescape: the bytes of a path that is no valid text
            sys.stdout.reconfigure(errors="surrogateescape" if exact else "backslashreplace")
        print(text, flush=True)


@contextmanager
def _writing():
    """Errors of standard output become a TinyldmError; only BrokenPipeError stays."""
    try:
        yield
    except BrokenPipeError:
        raise
    except UnicodeEncodeError:
        raise TinyldmError(f"standard output cannot take every character in its encoding "
                           f"{sys.stdout.encoding}: set PYTHONIOENCODING=utf-8") from None
    except (OSError, ValueError) as error:              # full; closed
        discard(sys.stdout)
        reason = getattr(error, "strerror", None) or error
        raise TinyldmError(f"standard output cannot be written ({reason}): send it elsewhere"
                           ) from None


class Lenient:
    """Standard error that drops what cannot be written: it is closed, full, or nobody reads it.

    The program goes on: its pictures are worth more than its progress bar.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        return self._try("write", text)

    def flush(self):
        return self._try("flush")

    def _try(self, method, *arguments):
        try:
            return getattr(self.stream, method)(*arguments)
        except (AttributeError, OSError, ValueError):   # None where the process began without one
            discard(self.stream)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def discard(stream):
    """Send what is still in the stream's buffer nowhere, or Python complains of it at exit."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
