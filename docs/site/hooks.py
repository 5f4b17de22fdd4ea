"""What MkDocs builds the site of: the pages where they stand, and the code that they link to.

The site mirrors the repository, so the links of a page work on a forge, on a disk and on the site.
README.md is the first page; docs/README.md says which others there are, and in which order.
"""
import html
import logging
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

log = logging.getLogger("mkdocs.hooks")
ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\(([^)#\s:]+)[^)]*\)")
CODE_LINK = re.compile(r"(\]\([^)#\s:]+\.py)(?:#L(\d+))?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
CODE_PAGE = """---
title: {path}
hide: [toc]
search: {{exclude: true}}
---
# {path}

`````python linenums="1"
{source}`````
"""


def on_config(config):
    """The menu: a part for each heading of docs/README.md that lists pages."""
    parts = re.findall(r"^## (.+)\n([^#]*)", (ROOT / "docs/README.md").read_text("utf-8"), re.M)
    config.nav = [{"tinyldm": ["README.md", "docs/README.md"]}]
    for heading, text in parts:
        if pages := [f"docs/{page}" for page in LINK.findall(text) if page.endswith(".md")]:
            config.nav.append({heading: pages})


def on_files(files, config):
    """The pages, and each file that they show or link to; of code, a page with its lines."""
    paths = {ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "weights").rglob("*.md")}
    for page in list(paths):
        linked = {(page.parent / link).resolve() for link in LINK.findall(page.read_text("utf-8"))}
        paths |= {path for path in linked if path.is_file()}
    for path in sorted(paths):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".py":
            page = CODE_PAGE.format(path=name, source=path.read_text("utf-8"))
            files.append(File.generated(config, f"{name}.md", content=page))
        else:
            files.append(File(name, ROOT, config.site_dir, use_directory_urls=False))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to code lead to its page."""
    def link(match):
        return f"{match[1]}.md" + (f"#line-0-{match[2]}" if match[2] else "") + ")"
    return CODE_LINK.sub(link, markdown)


def on_page_content(content, page, config, files):
    """Formulas become MathML, which browsers show without a script or a font."""
    def formula(match):
        tex = html.unescape(match[2]).replace("{aligned}", "{split}")   # the same, by a known name
        mathml = convert(tex, display="inline" if match[1] == "span" else "block")
        if re.search(r">(\\|&<)", mathml):
            log.warning(f"{page.file.src_uri} has a formula that latex2mathml does not know: {tex}")
        return mathml
    return FORMULA.sub(formula, content)
