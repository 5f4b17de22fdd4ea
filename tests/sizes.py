"""Lines of the package by room: code, docstrings, comments, blank.

    python -m tests.sizes               # prints the table
    python -m tests.sizes --fill        # and writes the sums that PAGES quote, and the lines of
                                        # code to which the links of all pages lead: tests/links.py

A page quotes a sum between two comments, which must not begin a line: of a room, rounded to
hundreds, or of files and folders, rounded to tens.

    <!-- lines: essential core -->3,900<!-- end -->   also: other systems, the rest, all, tests
    <!-- lines: models/dit.py pipelines/dit.py -->310<!-- end -->
"""
import ast
import re
import sys
from pathlib import Path

from tests import links

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tinyldm"
PAGES = ROOT / "README.md", ROOT / "docs" / "code.md", ROOT / "docs" / "systems.md"
KINDS = ("code", "docstrings", "comments", "blank")
# What a text becomes a picture with, and the gradients of it; and what only the other systems use.
# All else is the rest.
CORE = ("ops/", "tape.py", "module.py", "layers.py", "models/", "diffusion/", "text/", "noise.py",
        "pipelines/__init__.py", "pipelines/stable_diffusion.py", "pipelines/request.py",
        "pipelines/pipeline.py", "pipelines/text_pipeline.py", "pipelines/parts.py",
        "pipelines/conditioning.py", "pipelines/predictor.py")
SYSTEMS = ("ops/pool.py", "ops/gaussian.py", "ops/modulation.py", "models/unet_2d.py",
           "models/dit.py", "models/prior.py", "models/clip_vision.py", "models/clip_model.py",
           "models/inception.py", "models/discriminator.py", "models/lora.py",
           "diffusion/variational.py", "diffusion/process.py", "diffusion/timestep_sampling.py",
           "pipelines/ddpm.py", "pipelines/guided_ddpm.py", "pipelines/labels.py",
           "pipelines/dit.py", "pipelines/upscale.py", "pipelines/cascade.py",
           "pipelines/prior.py", "pipelines/unclip.py", "pipelines/zero_shot.py",
           "image_processor.py", "metrics/")
PARTS = ("essential core", "other systems", "the rest")
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


def part_of(file):
    return PARTS[1 if file.startswith(SYSTEMS) else 0 if file.startswith(CORE) else 2]


def rooms():
    """{part: {room: its four counts}}: a room is a folder or a module of the package."""
    found = {part: {} for part in PARTS}
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        room = file.split("/")[0] + "/" * ("/" in file)
        add(found[part_of(file)].setdefault(room, [0] * 4), count(path.read_text(encoding="utf-8")))
    return found


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
    named = {part: sums(found) for part, found in rooms().items()}
    return named | {"all": sums(named), "tests": tests()}


def table():
    now = totals()
    blocks = [found | {part: now.pop(part)} for part, found in rooms().items()] + [now]
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
    files = [file for path in name.split() for file in
             ((PACKAGE / path).rglob("*.py") if path.endswith("/") else [PACKAGE / path])]
    return sum(sum(count(file.read_text(encoding="utf-8"))) for file in files), 10


def fill(text):
    """A page with its quotes as counted now."""
    def quote(match):
        lines, unit = lines_of(match[1])
        return f"<!-- lines: {match[1]} -->{round(lines / unit) * unit:,}<!-- end -->"
    return QUOTE.sub(quote, text)


if __name__ == "__main__":
    print(table())
    if "--fill" in sys.argv[1:]:
        for page in links.PAGES:
            text = page.read_text(encoding="utf-8")
            text = links.fill(page, fill(text) if page in PAGES else text)
            page.write_text(text, encoding="utf-8")
