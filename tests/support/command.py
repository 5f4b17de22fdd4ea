"""python -m tinyldm in a process of its own."""
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def command(*arguments):
    return [sys.executable, "-m", "tinyldm", *map(str, arguments)]


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT)}


def run(*arguments, folder):
    return subprocess.run(command(*arguments), cwd=folder, env=environment(), capture_output=True,
                          text=True, timeout=300)


def assert_one_line(status, err, said):
    """A command in this process ended with status 2 and one line, in which `said` is found."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and re.search(said, lines[0]), err


def assert_refused(process, message, folder):
    """One clear line, exit status 2, no traceback, nothing written."""
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    assert process.stdout == ""
    error = process.stderr[process.stderr.index("error: "):]
    assert re.search(message, error), error
    lists = error.count("\n  ")                         # weights that do not fit: three lists
    assert error.count("\n") == 1 + lists and lists in (0, 3), error
    assert list(folder.iterdir()) == []
