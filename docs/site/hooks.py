"""What MkDocs builds the site of: the pages where they stand, and the code and notebooks they name.

The site mirrors the repository, so the links of a page work on a forge, on a disk and on the site.
README.md is the first page; docs/README.md says which others there are, and in which order.
"""
import html
import json
import logging
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

log = logging.getLogger("mkdocs.hooks")
ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\(([^)#\s:]+)[^)]*\)")
MADE_LINK = re.compile(r"(\]\([^)#\s:]+\.(?:py|ipynb))(?:#L(\d+))?\)")       # to a page made below
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_config(config):
    """The menu: a part for each heading of docs/README.md that lists pages."""
    first, *parts = re.split(r"^## ", (ROOT / "docs/README.md").read_text("utf-8"), flags=re.M)
    config.nav = [{"tinyldm": ["README.md", "docs/README.md", *listed(first)]}]
    for part in parts:
        if pages := listed(part):
            config.nav.append({part.partition("\n")[0]: pages})


def listed(text):
    """The pages that a part of docs/README.md links to."""
    return [f"docs/{link}" if link.endswith(".md") else f"docs/{link}.md"
            for link in LINK.findall(text)]


def on_files(files, config):
    """The pages, and each file that they show or link to; of code and notebooks, a page each."""
    paths = {ROOT / "README.md", *(ROOT / "weights").rglob("*.md"),
             *(path for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".ipynb"))}
    for page in list(paths):
        linked = {(page.parent / link).resolve() for link in LINK.findall(page.read_text("utf-8"))}
        paths |= {path for path in linked if path.is_file()}
    for path in sorted(paths):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in MADE:
            page = MADE[path.suffix](name, path.read_text("utf-8"))
            files.append(File.generated(config, f"{name}.md", content=page))
        else:
            files.append(File(name, ROOT, config.site_dir, use_directory_urls=False))
    return files


def code(name, text):
    """A file of code as Markdown: its lines, numbered; the search leaves it out."""
    return (f"---\ntitle: {name}\nhide: [toc]\nsearch: {{exclude: true}}\n---\n# {name}\n\n"
            f"`````python linenums=\"1\"\n{text}`````\n")


def notebook(_, text):
    """A notebook as Markdown: its cells, and what they printed and showed."""
    page = []
    for number, cell in enumerate(json.loads(text)["cells"]):
        source = "".join(cell["source"])
        page.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                png = "".join(data["image/png"]).replace("\n", "")
                page.append(f"![What cell {number} shows](data:image/png;base64,{png})")
            else:
                page.append("```text\n" + "".join(data["text/plain"]).rstrip("\n") + "\n```")
    return "\n\n".join(page)


MADE = {".py": code, ".ipynb": notebook}        # of such a file, the text of its page


def on_page_markdown(markdown, page, config, files):
    """Links to code and notebooks lead to their pages."""
    def link(match):
        return f"{match[1]}.md" + (f"#line-0-{match[2]}" if match[2] else "") + ")"
    return MADE_LINK.sub(link, markdown)


def on_page_content(content, page, config, files):
    """Formulas become MathML, which browsers show without a script or a font."""
    def formula(match):
        tex = html.unescape(match[2]).replace("{aligned}", "{split}")   # the same, by a known name
        mathml = convert(tex, display="inline" if match[1] == "span" else "block")
        if re.search(r">(\\|&<)", mathml):
            log.warning(f"{page.file.src_uri} has a formula that latex2mathml does not know: {tex}")
        return mathml
    return FORMULA.sub(formula, content)
