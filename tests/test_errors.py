"""Errors and notes: what is printed of a file's text, and the caller's line that a note names."""
import pickle
import warnings

import pytest

from tinyldm.errors import TinyldmError, note

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


# ---- text that files say --------------------------------------------------------------------

HOSTILE = {
    "escape sequences": ("\x1b]0;title\x07\x1b[2J", "?]0;title??[2J"),
    "newlines": ("a\nb\r\n  c\td\u2028e\x85f", "a b c d e f"),
    "marks of direction": ("a\u202eb\u2066c\u200fd", "a?b?c?d"),
    "C1 controls and NUL": ("\x9b2J\0", "?2J?"),
    "half a surrogate": ("\udcff", "?"),
    "what prints stays": ("löw 漢字 日本\u3000語  x", "löw 漢字 日本 語  x"),
}


@pytest.mark.parametrize("text, expected", HOSTILE.values(), ids=HOSTILE)
def test_text_is_cleaned_in_errors_and_notes(text, expected):
    assert str(TinyldmError(f"<{text}>")) == f"<{expected}>"
    with pytest.warns(UserWarning) as said:
        note(f"<{text}>")
    assert str(said[0].message) == f"<{expected}>"


@pytest.mark.parametrize("text", ["x" * 1_000_000, "x " * 500_000, " " * 1_000_000,
                                  "\n" * 1_000_000, "\x1b" * 1_000_000, "\u2028x" * 500_000])
def test_a_megabyte_is_shortened_and_the_advice_stays(text):
    message = str(TinyldmError(f"a.safetensors: the tensor {text} is wrong: use another file"))
    assert message.startswith("a.safetensors: the tensor ")
    assert message.endswith(" is wrong: use another file")
    assert len(message) <= 2000 and message.isprintable()
    assert str(TinyldmError(message)) == message        # an error in another error


def test_one_long_word_leaves_the_rest_of_a_line():
    names = [f"down_blocks.{i}.weight" for i in range(8)]
    message = str(TinyldmError(f"missing: {', '.join(names)}, {'y' * 5000}: get it again"))
    assert message.startswith(f"missing: {', '.join(names)}, yyy") and len(message) < 600


def test_lines_of_an_error_are_its_arguments():
    """So a newline in a name makes no line of its own."""
    error = TinyldmError("a does not fit", "missing: b\n  wrong", "unexpected: none")
    assert str(error) == "a does not fit\n  missing: b wrong\n  unexpected: none"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
