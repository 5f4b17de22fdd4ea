"""The pages as a site: it builds without a warning, is whole, and asks for nothing elsewhere."""
import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests import links
from tests.support import browser

ROOT = Path(__file__).parents[1]
for library in ("mkdocs", "material", "latex2mathml"):
    pytest.importorskip(library, reason=f"no {library}, of the docs extra")


class Html(HTMLParser):
    """What a page's elements are named, where its links lead, and what it loads."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded, self.next = {""}, [], [], None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids |= {attributes.get("id"), attributes.get("name")}
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
            if "md-footer__link--next" in attributes.get("class", ""):
                self.next = attributes["href"]
        elif url := attributes.get("src") or attributes.get("href"):
            self.loaded.append(url)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", "docs/site/mkdocs.yml",
         "-d", str(folder)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Html(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_links_lead_to_files_and_places(pages):
    for path, page in pages.items():
        for link in page.links + page.loaded:
            if re.match(r"https?:|javascript:|mailto:|data:", link):
                continue
            file, _, place = link.partition("#")
            target = (path.parent / unquote(file.partition("?")[0])).resolve() if file else path
            assert target.exists(), f"{path.name} links to {link}"
            if target.suffix == ".html":
                assert unquote(place) in pages[target].ids, f"{path.name} links to {link}"


def test_nothing_is_loaded_from_elsewhere(site, pages):
    assert pages
    for path, page in pages.items():
        assert not [url for url in page.loaded if re.match(r"(https?:)?//", url)], path.name
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)[\"' ]*(https?:)?//", path.read_text("utf-8")), path


def test_the_pages_follow_each_other_as_docs_readme_lists_them(site, pages):
    first = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    listed = [f"{file.removesuffix('.md')}.html" for file, _ in links.LINK.findall(first)]
    path, found = site / "docs" / "index.html", []
    while pages[path].next:
        path = (path.parent / pages[path].next).resolve()
        found.append(path.relative_to(site / "docs").as_posix())
    assert found == listed


def test_formulas_become_mathml(caplog):
    import markdown
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "site" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)

    def shown(text):
        content = markdown.markdown(text, extensions=["pymdownx.arithmatex"], extension_configs={
            "pymdownx.arithmatex": {"generic": True}})
        page = type("page", (), {"file": type("file", (), {"src_uri": "page.md"})})
        return hooks.on_page_content(content, page, None, None)

    line = shown(r"If $a < b_t$, it costs $5, not $ 6.")
    assert line.count("<math") == 1 and "<msub><mi>b</mi><mi>t</mi></msub>" in line
    assert "it costs $5, not $ 6." in line
    block = shown("$$\n\\begin{aligned} a &= b \\\\ c &= d \\end{aligned}\n$$")
    assert 'display="block"' in block and block.count("<mtr>") == 2 and not caplog.messages
    shown(r"$\unknown x$")
    assert "page.md has a formula" in caplog.text and "unknown x" in caplog.text


def test_in_a_browser_nothing_is_asked_for_and_the_search_finds(site, pages):
    code = [path for path in pages if path.name.endswith(".py.html")]
    with browser.chromium(width=1280) as chromium:
        for path in (site / "index.html", site / "docs" / "convolution.html", *code[:1]):
            chromium.get(path.as_uri())
            chromium.implicitly_wait(10)
            chromium.find_element("css selector", "h1")
            assert browser.requests(chromium) == [] and browser.errors(chromium) == [], path
        chromium.execute_script("document.querySelector('[data-md-toggle=search]').click()")
        chromium.find_element("css selector", ".md-search__input").send_keys("winograd")
        first = chromium.find_element("css selector", ".md-search-result__link")
        assert "docs/convolution.html" in first.get_attribute("href")
        assert browser.requests(chromium) == [] and browser.errors(chromium) == []


def test_the_book_fits_on_a_phone(site, pages):
    first = {site / "index.html", site / "docs" / "index.html"}
    with browser.chromium(width=360) as chromium:
        for path in sorted(first | {path for path in pages if path.parent.name == "book"}):
            chromium.get(path.as_uri())
            assert chromium.execute_script("return document.body.scrollWidth") <= 360, path
