"""The book: every snippet runs and prints what its page shows, and all that is named exists."""
import contextlib
import importlib
import io
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tests import links, sizes
from tests.support import extra
from tests.support.reference import has_avx2
from tests.support.shown import assert_same_output, assert_same_picture

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *(DOCS / "book").glob("*.md")])
ALL = [*PAGES, ROOT / "README.md"]

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
PICTURE = re.compile(r"!\[[^]]*\]\(([\w-]+\.png)\)")          # beside its page: drawn by it
DOTTED = re.compile(r"\btinyldm(?:\.\w+)+")
PATH = re.compile(r"\b(?:tinyldm|tests|docs|weights)/[\w./-]*\w")


def each(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


@each(ALL)
def test_snippets_print_what_the_page_shows(page, tmp_path, monkeypatch):
    """A page's blocks share their names, as if pasted into Python one after another."""
    if page.stem == "noise" and not has_avx2():
        pytest.skip("without AVX2, torch.randn has other last digits than the page shows")
    monkeypatch.chdir(tmp_path)                                     # the README saves a picture
    text = page.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    for name in (*extra.NAMES, "matplotlib"):
        if re.search(rf"^(?:import|from) {name}\b", text, re.M) and not find_spec(name):
            pytest.skip(f"the page imports {name}, of the test extra")
    assert text.count("```") == 2 * len(blocks), "a fence is not closed, or says no language"
    names = {"__name__": page.stem}
    for block, following in zip(blocks, [*blocks[1:], None]):
        if block[1] != "python":
            continue
        line = text.count("\n", 0, block.start(2))                  # errors point into the page
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + block[2], str(page), "exec"), names)
        shown = following[2] if following and following[1] == "text" else ""
        assert_same_output(printed.getvalue(), shown, f"{page.name}, snippet in line {line + 1}")
    for picture in PICTURE.findall(text):
        assert_same_picture(tmp_path / picture, page.parent / picture)
    if "matplotlib" in text:
        importlib.import_module("matplotlib.pyplot").close("all")


@pytest.mark.parametrize("printed, shown, same", [
    ("error 3e-16\n", "error 1e-16\n", True), ("error 0e+00\n", "error 1e-16\n", True),
    ("error 2e-15\n", "error 1e-16\n", False), ("a 1.0003\n", "a 1.0\n", True),
    ("a 1.01\n", "a 1.0\n", False), ("a 1\nb", "a 1\n", False), ("a 1\n", "", False),
    ("-1", "1", False)])
def test_outputs_are_compared(printed, shown, same):
    if same:
        assert_same_output(printed, shown, "here")
    else:
        with pytest.raises(AssertionError):
            assert_same_output(printed, shown, "here")


@pytest.mark.parametrize("name, everywhere, at_one_pixel, software, same", [
    ("here.png", 8, 32, None, True), ("here.png", 9, 0, None, False),
    ("here.png", 0, 33, None, False), ("a-b.png", 0, 0, "plot 2", True),
    ("a-b.png", 9, 0, "plot 2", False), ("a-b.png", 9, 0, "plot 3", True)])
def test_pictures_are_compared(name, everywhere, at_one_pixel, software, same, tmp_path):
    def save(path, pixels, software):
        signed = PngImagePlugin.PngInfo()
        if software:
            signed.add_text("Software", software)
        Image.fromarray(pixels).save(path, pnginfo=signed)

    assert PICTURE.findall(f"![What it\nshows]({name})") == [name]
    shown, drawn = tmp_path / name, tmp_path / "drawn.png"
    pixels = np.zeros((30, 30, 3), np.uint8)
    save(shown, pixels, software and "plot 2")
    pixels += np.uint8(everywhere)
    pixels[3, 4, 1] = max(everywhere, at_one_pixel)
    save(drawn, pixels, software)
    if same:
        assert_same_picture(drawn, shown)
    else:
        with pytest.raises(AssertionError, match=name):
            assert_same_picture(drawn, shown)


@each(ALL)
def test_links_lead_to_files_and_sections(page):
    for file, section in links.LINK.findall(links.FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in file:
            continue
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name} links to {file}"
        if section and target.suffix == ".md":
            assert section in links.sections(target), f"{page.name} links to {file}#{section}"


@each(ALL)
def test_links_lead_to_the_line_of_the_code(page):
    """`python -m tests.sizes --fill` writes the numbers of the lines."""
    text = page.read_text(encoding="utf-8")
    assert len(links.CODE_LINK.findall(text)) == text.count(".py#"), "a link to code shows one name"
    assert links.fill(page, text) == text


def test_lines_of_code_are_found(tmp_path):
    file, page = tmp_path / "code.py", tmp_path / "page.md"
    file.write_text("import a\nX = a.b\n\n@a\ndef f(x):\n    y = x\n\n\nclass C:\n"
                    "    def f(self):\n        y = X\n\n    def g(self):\n        pass\n")
    text = ("[X](code.py#L), [`f`](code.py#L99) [`code.f()`](code.py#L1), [`C.f`](code.py#L5), "
            "[g](code.py#L)")
    lines = re.findall(r"#L(\d+)", links.fill(page, text))
    assert lines == ["2", "5", "5", "10", "13"]
    for name in ("h", "g.y", "C.x", "D.f"):
        with pytest.raises(ValueError, match=f"code.py .* {name};"):
            links.fill(page, f"[`{name}`](code.py#L1)")


@each(ALL)
def test_named_code_exists(page):
    text = page.read_text(encoding="utf-8")
    for path in PATH.findall(text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for name in DOTTED.findall(text):
        assert resolve(name), f"{page.name} names {name}"


def resolve(name):
    """Whether a dotted name is a module, or something in one."""
    module, rest = importlib.import_module("tinyldm"), name.split(".")[1:]
    for i, part in enumerate(rest):
        if not hasattr(module, part):
            try:
                importlib.import_module(".".join(["tinyldm", *rest[:i + 1]]))
            except ImportError:
                return False
        module = getattr(module, part)
    return True


def test_pages_named_in_the_code_exist():
    for file in (ROOT / "tinyldm").rglob("*.py"):
        for path in re.findall(r"(?<!/)\bdocs/[\w/-]+\.md", file.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{file.relative_to(ROOT)} names {path}"


# ---- docs/code.md ---------------------------------------------------------------------------

def tree():
    """Every path in the tree of docs/code.md: two spaces more are one folder deeper."""
    text = (DOCS / "code.md").read_text(encoding="utf-8")
    block = re.search(r"^    tinyldm/\n(?:    .*\n)+", text, re.M)[0]
    folders, found = [], []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip()) - 4) // 2
        for name in re.split(r"\s{2,}", line.strip()):
            if not re.fullmatch(r"[\w./]+(\.py|/)", name):
                break                                   # what follows describes it
            folders[depth:] = [name.rstrip("/")]
            found.append("/".join(folders))
    return found


def test_all_paths_in_the_tree_exist():
    named = tree()
    assert len(named) > 50 and len(named) == len(set(named))
    for path in named:
        assert (ROOT / path).exists(), path


def test_the_tree_leaves_nothing_out():
    """Where it names a module of a folder, it names all modules there, and so with folders."""
    named = set(tree())
    parents = {path.rpartition("/")[0] for path in named if path.startswith("tinyldm/")}
    for parent in sorted(parents):
        inside = [path for path in (ROOT / parent).iterdir() if path.name != "__init__.py"]
        for paths in ([path for path in inside if path.suffix == ".py"],
                      [path for path in inside if path.is_dir() and any(path.rglob("*.py"))]):
            paths = {path.relative_to(ROOT).as_posix() for path in paths}
            assert not paths & named or paths <= named, sorted(paths - named)


def test_the_lines_quoted_are_those_counted():
    """To a hundred, or of files to ten: `python -m tests.sizes --fill` writes them."""
    for page in sizes.PAGES:
        quotes = sizes.QUOTE.findall(page.read_text(encoding="utf-8"))
        assert quotes
        for name, shown in quotes:
            lines, unit = sizes.lines_of(name)
            assert abs(int(shown.replace(",", "")) - lines) <= unit, name


def test_lines_are_counted_by_kind():
    source = ('"""Two\n\nlines."""\n# one\n\nx = 1  # code\n\n\n'
              'def f():\n    """One."""\n    return """\nno\n"""\n')
    assert sizes.count(source) == [5, 4, 1, 3]


def test_every_page_is_in_the_order_to_read():
    first = DOCS / "README.md"
    listed = [file for file, _ in links.LINK.findall(first.read_text(encoding="utf-8"))
              if file.endswith(".md")]
    assert sorted(listed) == [page.relative_to(DOCS).as_posix() for page in PAGES if page != first]
