"""Lines of the package by room: code, docstrings, comments, blank.

    python -m tests.sizes               # prints the table
    python -m tests.sizes --fill        # and writes the sums that PAGES quote

A page quotes a sum between two comments, which must not begin a line: of a room, rounded to
hundreds, or of files, rounded to tens.

    <!-- lines: essential core -->3,900<!-- end -->           also: the rest, all, tests
    <!-- lines: models/dit.py pipelines/dit.py -->310<!-- end -->
"""
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tinyldm"
PAGES = ROOT / "README.md", ROOT / "docs" / "systems.md"
KINDS = ("code", "docstrings", "comments", "blank")
# What a text becomes a picture with, and the gradients of it. All else is the rest, with the other
# systems.
CORE = ("ops", "layers.py", "models/__init__.py", "models/blocks.py", "models/unet.py",
        "models/vae.py", "models/clip.py", "diffusion", "text", "noise.py",
        "pipelines/__init__.py", "pipelines/stable_diffusion.py", "pipelines/request.py",
        "pipelines/pipeline.py",
        "pipelines/parts.py", "pipelines/conditioning.py", "pipelines/predictor.py")
QUOTE = re.compile(r"<!-- lines: (.+?) -->(.*?)<!-- end -->")


def count(source):
    """[lines of code, of docstrings, of comments alone, blank ones] of a source text."""
    documented = set()
    for node in ast.walk(ast.parse(source)):
        documentable = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documentable and ast.get_docstring(node):
            text = node.body[0]
            documented.update(range(text.lineno, text.end_lineno + 1))
    found = [0, 0, 0, 0]
    for number, line in enumerate(source.splitlines(), 1):
        line = line.strip()
        kind = 1 if number in documented else 3 if not line else 2 if line.startswith("#") else 0
        found[kind] += 1
    return found


def is_core(file):
    return file.startswith(tuple(name if name.endswith(".py") else f"{name}/" for name in CORE))


def rooms():
    """{room: its four counts}: the folders and modules of the package, the core's first."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        room = file.split("/")[0] + "/" * ("/" in file)
        if room in ("pipelines/", "models/"):
            room += " the core" if is_core(file) else " the rest"
        add(found.setdefault(room, [0] * 4), count(path.read_text(encoding="utf-8")))
    core = {room: lines for room, lines in found.items()
            if room.endswith(" the core") or is_core(room.replace(" ", ""))}
    return core, {room: lines for room, lines in found.items() if room not in core}


def add(total, lines):
    total[:] = map(sum, zip(total, lines))


def sums(parts):
    total = [0] * 4
    for lines in parts.values():
        add(total, lines)
    return total


def tests():
    total = [0] * 4
    for path in (ROOT / "tests").rglob("*.py"):
        add(total, count(path.read_text(encoding="utf-8")))
    return total


def totals():
    core, rest = rooms()
    named = {"essential core": sums(core), "the rest": sums(rest)}
    return named | {"all": sums(named), "tests": tests()}


def table():
    core, rest = rooms()
    blocks = [core, {"essential core": sums(core)}, rest, totals()]
    blocks[-1].pop("essential core")
    lines = [f"{'':26}" + "".join(f"{kind:>11}" for kind in (*KINDS, "all"))]
    for block in blocks:
        lines += [f"{room:26}" + "".join(f"{number:11,}" for number in (*counts, sum(counts)))
                  for room, counts in block.items()] + [""]
    return "\n".join(lines)


def lines_of(name):
    """What a quote names -> its lines now, and to what they are rounded."""
    now = totals()
    if name in now:
        return sum(now[name]), 100
    files = [(PACKAGE / file).read_text(encoding="utf-8") for file in name.split()]
    return sum(sum(count(file)) for file in files), 10


def fill(text):
    """A page with its quotes as counted now."""
    def quote(match):
        lines, unit = lines_of(match[1])
        return f"<!-- lines: {match[1]} -->{round(lines / unit) * unit:,}<!-- end -->"
    return QUOTE.sub(quote, text)


if __name__ == "__main__":
    print(table())
    if "--fill" in sys.argv[1:]:
        for page in PAGES:
            page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
