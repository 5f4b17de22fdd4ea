"""Links in the pages: the headings that they lead to, and the lines where a name is defined.

A link to code shows a name, and leads to the line that defines it:

    [`ddim`](../../tinyldm/diffusion/samplers/ddim.py#L12)
    [`ResBlock.forward`](../../tinyldm/models/blocks.py#L60)

`python -m tests.sizes --fill` writes the line numbers.
"""
import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)#\s]*)#?([^)\s]*)\)")                   # file, section
CODE_LINK = re.compile(r"(\[`?([\w.]+)(?:\(\))?`?\]\(([^)#\s]+\.py))#L\d*\)")
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


@cache
def sections(page):
    """The names by which links reach the headings of a page, as forges derive them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", re.sub(r"\]\(.*?\)", "]", text), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@cache
def definitions(file):
    """[(dotted name in the file, its line)] of every class, function and first assignment."""
    found = {}

    def visit(node, outer):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                found.setdefault((*outer, child.name), child.lineno)
                visit(child, (*outer, child.name))
            else:
                if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                    found.setdefault((*outer, child.id), child.lineno)
                visit(child, outer)

    visit(ast.parse(file.read_text(encoding="utf-8")), ())
    return list(found.items())


def line_of(name, file):
    """The line where `name` is defined. Of several, the outermost, if there is one.

    The name may begin with the class around it, `ResBlock.forward`, or with folders and the module.
    """
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in file.with_suffix("").parts:
        del parts[0]
    found = sorted((len(path), line) for path, line in definitions(file)
                   if list(path[-len(parts):]) == parts)
    if not found or found[1:] and found[0][0] == found[1][0]:
        problem = "defines several" if found else "does not define"
        raise ValueError(f"{file.name} {problem} {name}; the link says NAME or CLASS.NAME")
    return found[0][1]


def fill(page, text):
    """A page's text, its links to code with the lines where the names stand now."""
    def link(match):
        return f"{match[1]}#L{line_of(match[2], page.parent / match[3])})"
    return CODE_LINK.sub(link, text)
