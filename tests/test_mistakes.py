"""What people do wrong from Python ends in a TinyldmError, in one line, also without asserts."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tinyldm
from tests.support.mistakes import MISTAKES, said


@pytest.fixture(scope="module")
def bundled():
    return tinyldm.load()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name, bundled, tmp_path):
    expression, expected = MISTAKES[name]
    answer = said(expression, bundled, tmp_path / "folder")
    assert re.search(expected, answer) and "TinyldmError" not in answer, answer
    assert "\n" not in answer or "missing" in expected
    assert not list(tmp_path.iterdir())


def test_mistakes_are_named_without_asserts():
    """`python -O` leaves asserts out: what a user can do wrong must not depend on them."""
    done = subprocess.run([sys.executable, "-O", "-m", "tests.support.mistakes"], timeout=300,
                          cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0), done.stdout + done.stderr
