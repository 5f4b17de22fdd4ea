"""Signals that stop a program: Ctrl-C, SIGTERM, and SIGHUP of a closed terminal."""
import signal
import threading
from contextlib import contextmanager


@contextmanager
def handled(handle, wanted):
    """Inside, these signals call handle(number, frame) if wanted(their handler before) is true.

    Gives a function that restores the handlers before, already inside. In other threads nothing
    changes: Python delivers signals to the main thread.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):    # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number and wanted(signal.getsignal(number)):
                before[number] = signal.getsignal(number)

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        for number in before:
            signal.signal(number, handle)
        yield restore
    finally:
        restore()
