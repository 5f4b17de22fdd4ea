"""The libraries of the test extra, or a stand-in for each that is not installed.

A test that calls a stand-in is skipped. So a file that imports them from here runs what needs no
reference; a file that imports them by itself is left out. With `pip install -e '.[test]'` all run.
"""
import importlib
import importlib.util
import os
import re
from functools import cache
from pathlib import Path

import pytest

NAMES = ("torch", "diffusers", "transformers", "peft")
MISSING = [name for name in NAMES if not importlib.util.find_spec(name)]
ROOT = Path(__file__).parents[2]
IMPORT = re.compile(r"^(?:from|import) ([\w.]+)(?: import (.*))?", re.M)


class Missing:
    """Has every attribute; calling it skips the test that runs."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.name}.{name}")

    def __call__(self, *args, **options):
        if "PYTEST_CURRENT_TEST" not in os.environ:     # a decorator, while the file is read
            return args[0] if args else self
        pytest.skip(f"needs {self.name}, of the test extra")


def library(name):
    """A library or one of its modules, by its dotted name."""
    return Missing(name) if name.partition(".")[0] in MISSING else importlib.import_module(name)


def __getattr__(name):
    """`from tests.support.extra import torch, F, diffusers`: imported when somebody asks for it."""
    if name == "F":
        return library("torch").nn.functional
    if name in NAMES:
        return library(name)
    raise AttributeError(name)


@cache
def no_gpu():
    """Why no test can run on a CUDA device, or nothing."""
    try:
        import cupy
        if cupy.cuda.runtime.getDeviceCount():
            return ""
    except ImportError:
        return "no GPU: CuPy is not installed"
    except Exception:                                   # CuPy without a driver
        pass
    return "no GPU: CuPy finds no CUDA device"


@cache
def is_left_out(file):
    """Whether a test file imports a library that is missing, by itself or through tests/support."""
    for module, names in IMPORT.findall(file.read_text(encoding="utf-8")):
        if module.split(".")[0] in MISSING or module == "safetensors.torch" and "torch" in MISSING:
            return True
        inner = [f"{module}.{name}" for name in names.split(", ")] if names else []
        paths = [ROOT / f"{name.replace('.', '/')}.py" for name in (module, *inner)
                 if name.startswith("tests.")]
        if any(is_left_out(path) for path in paths if path.exists()):
            return True
    return False


def what_it_adds():
    """A line for the end of a run without the test extra."""
    files = [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if is_left_out(file)]
    return (f"without {', '.join(MISSING)}: {len(files)} files of comparisons with them were left "
            "out, and tests of other files skipped; pip install -e '.[test]' adds them")
