"""The notebooks: run without Jupyter, and written anew with what their cells give.

    python -m tests.notebook            # in docs/notebooks, with the pictures that they save there

A cell gives what it prints; then the value of its last line, as a PNG if it shows itself as one
(`_repr_png_`, which Jupyter calls too), otherwise as its repr.
"""
import ast
import base64
import contextlib
import io
import json
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook, name):
    """Run the code cells, which share their names -> iterator of (printed text, last value).

    A warning is an error: Jupyter would print it between the cells.
    """
    names = {"__name__": "__main__"}
    for i, cell in enumerate(code_cells(notebook), 1):
        tree, printed, value = ast.parse("".join(cell["source"])), io.StringIO(), None
        where = f"{name}, cell {i}"
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            exec(compile(tree, where, "exec"), names)
            if last:
                value = eval(compile(ast.Expression(last.value), where, "eval"), names)
        yield printed.getvalue(), value


def png(value):
    """The PNG as which Jupyter shows a value, or None."""
    return value._repr_png_() if hasattr(value, "_repr_png_") else None


def outputs(printed, value, number):
    """A cell's outputs, as the notebook's file stores them."""
    found = []
    if printed:
        found.append({"name": "stdout", "output_type": "stream", "text": printed.splitlines(True)})
    if value is not None:
        picture = png(value)
        data = {"text/plain": [f"<{type(value).__name__}>" if picture else repr(value)]}
        if picture:
            data = {"image/png": base64.b64encode(picture).decode()} | data
        found.append({"data": data, "execution_count": number, "metadata": {},
                      "output_type": "execute_result"})
    return found


def write(path):
    notebook = read(path)
    for number, (cell, given) in enumerate(zip(code_cells(notebook), run(notebook, path.name)), 1):
        cell["execution_count"], cell["outputs"] = number, outputs(*given, number)
    text = json.dumps(notebook, ensure_ascii=False, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.chdir(FOLDER)
    for file in NOTEBOOKS:
        write(file)
        print(file.relative_to(ROOT))
