"""The notebooks: run cell by cell, they print and show what their files show."""
import base64
import json
import re

import numpy as np
import pytest

from tests import links, notebook
from tests.support.shown import assert_same_output, assert_same_picture
from tinyldm.images import to_pil

each = pytest.mark.parametrize("path", notebook.NOTEBOOKS, ids=lambda path: path.stem)


def text_of(path, kind="markdown"):
    return "\n\n".join("".join(cell["source"]) for cell in notebook.read(path)["cells"]
                       if cell["cell_type"] == kind)


@each
def test_the_cells_give_what_the_notebook_shows(path, tmp_path, monkeypatch):
    """`python -m tests.notebook` writes the outputs anew."""
    monkeypatch.chdir(tmp_path)
    shown = notebook.read(path)
    for i, (cell, given) in enumerate(
            zip(notebook.code_cells(shown), notebook.run(shown, path.name)), 1):
        name = f"{path.stem}-{i}.png"
        assert_same_outputs(notebook.outputs(*given, i), cell["outputs"], tmp_path / "ours" / name,
                            tmp_path / "theirs" / name)
        assert cell["execution_count"] == i
    saved = re.findall(r'save\("(\S+)"\)', text_of(path, "code"))
    for name in saved:                                  # beside it, for other pages to show
        assert_same_picture(tmp_path / name, path.parent / name)
    assert saved == [file.name for file in path.parent.glob("*.png")]


def assert_same_outputs(ours, theirs, *files):
    """files: two paths, where the pictures are written to be compared."""
    assert [output["output_type"] for output in ours] == [o["output_type"] for o in theirs]
    for pair in zip(ours, theirs):
        data = [output.get("data", {"text/plain": output.get("text")}) for output in pair]
        assert data[0].keys() == data[1].keys(), files[0].name
        assert_same_output(*("".join(own["text/plain"]) for own in data), files[0].name)
        if "image/png" in data[0]:
            for file, own in zip(files, data):
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(base64.b64decode(own["image/png"]))
            assert_same_picture(*files)


@each
def test_the_file_is_small_and_whole(path):
    """Written as Jupyter expects it, version 4.5: https://nbformat.readthedocs.io"""
    content = notebook.read(path)
    assert path.stat().st_size < 1e6
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in content["cells"]]
    assert len(ids) == len(set(ids)) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    for cell in content["cells"]:
        extra = {"outputs", "execution_count"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | extra


@each
def test_its_links_lead_to_files_and_sections(path):
    found = links.LINK.findall(text_of(path))
    assert found
    for file, section in found:
        target = path.parent / file
        assert target.exists(), file
        assert not section or section in links.sections(target), f"{file}#{section}"


# ---- the runner -------------------------------------------------------------------------------

def run(*sources):
    cells = [{"cell_type": "code", "source": source.splitlines(True)} for source in sources]
    return list(notebook.run({"cells": [{"cell_type": "markdown", "source": []}, *cells]}, "here"))


def test_a_cell_gives_what_it_prints_and_its_last_value():
    assert run("print(1)\nx = 2", "x + 1", "for i in (1, 2):\n    print(i)", "print(x)\nx") == [
        ("1\n", None), ("", 3), ("1\n2\n", None), ("2\n", 2)]


def test_errors_and_warnings_stop_it():
    with pytest.raises(ZeroDivisionError) as error:
        run("x = 1", "1 / 0")
    assert "here, cell 2" in str(error.traceback[-1].path)
    with pytest.raises(UserWarning, match="see me"):
        run("import warnings\nwarnings.warn('see me')")


def test_outputs_are_those_that_jupyter_stores():
    black = to_pil(-np.ones((1, 4, 4, 3)))
    stream, result = notebook.outputs("a\nb\n", black, 7)
    assert stream == {"name": "stdout", "output_type": "stream", "text": ["a\n", "b\n"]}
    assert base64.b64decode(result["data"]["image/png"]) == black._repr_png_()
    assert result["data"]["text/plain"] == ["<Pictures>"] and result["execution_count"] == 7
    assert notebook.outputs("", [1], 1)[0]["data"] == {"text/plain": ["[1]"]}
    assert notebook.outputs("", None, 1) == []


@pytest.mark.parametrize("ours, theirs, same", [
    (("1.0001", None), ("1.0", None), True), (("1.01", None), ("1.0", None), False),
    (("", 3), ("", 3), True), (("", 3), ("", 4), False), (("", 3), ("3", None), False),
    (("", 0.5), ("", 0.51), True), (("", 0.5), ("", 0.9), False), (("", 0.5), ("", 3), False)])
def test_outputs_are_compared(ours, theirs, same, tmp_path):
    def outputs(printed, value):
        if isinstance(value, float):                    # a grey
            value = to_pil(np.full((1, 8, 8, 3), value))
        return json.loads(json.dumps(notebook.outputs(printed, value, 1)))

    files = tmp_path / "a" / "x-1.png", tmp_path / "b" / "x-1.png"
    if same:
        assert_same_outputs(outputs(*ours), outputs(*theirs), *files)
    else:
        with pytest.raises(AssertionError):
            assert_same_outputs(outputs(*ours), outputs(*theirs), *files)
