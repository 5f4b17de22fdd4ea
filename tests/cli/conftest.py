"""Fixtures of several tests of the command line."""
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def bad_weights(weights, tmp_path):
    """A copy for the test to damage."""
    return Path(shutil.copytree(weights, tmp_path / "bad-weights"))


@pytest.fixture
def out(tmp_path):
    """The folder to write pictures in."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"
