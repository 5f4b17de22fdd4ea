"""Notes: a warning names the caller's own line, however deep in the package it arises."""
import warnings

from tinyldm.errors import note

DEEP = """
def inner():
    return [note("careful") for _ in range(2)]          # a comprehension has its own frame

def outer():
    yield inner()
"""


def inside(module):
    """What DEEP defines, as if it stood in a module of that name."""
    names = {"__name__": module, "note": note}
    exec(compile(DEEP, f"{module}.py", "exec"), names)
    return names


def said_by(module):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        next(inside(module)["outer"]())
    return said


def test_a_note_names_the_first_line_outside_of_the_package():
    said = said_by("tinyldm.deep.down")
    assert [str(warning.message) for warning in said] == ["careful"] * 2
    assert {warning.filename for warning in said} == {__file__}
    assert {warning.category for warning in said} == {UserWarning}


def test_a_package_whose_name_begins_alike_is_outside():
    assert {warning.filename for warning in said_by("tinyldm_more")} == {"tinyldm_more.py"}
