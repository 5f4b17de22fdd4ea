"""The browser that pages are tried in: it sees requests and errors, and can do without scripts."""
import pytest

from tests.support import browser

PAGE = """<!doctype html><title>before</title>
<meta name=viewport content="width=device-width"><link rel=icon href="data:,">
<script>document.title = `${innerWidth} wide`; SCRIPT</script>"""


@pytest.fixture
def page(tmp_path):
    def write(script=""):
        path = tmp_path / "page.html"
        path.write_text(PAGE.replace("SCRIPT", script))
        return path.as_uri()
    return write


def test_a_browser_sees_requests_and_errors(page):
    with browser.chromium(width=360) as chromium:
        chromium.get(page())
        assert chromium.title == "360 wide"
        assert browser.requests(chromium) == browser.errors(chromium) == []
        chromium.get(page("new Image().src = 'http://127.0.0.1:9/a.png'; undefined_name"))
        assert browser.requests(chromium) == ["http://127.0.0.1:9/a.png"]
        assert "undefined_name" in "".join(browser.errors(chromium))
        assert browser.requests(chromium) == []


def test_a_browser_without_javascript(page):
    with browser.chromium(javascript=False) as chromium:
        chromium.get(page())
        assert chromium.title == "before"


def test_where_there_is_none_a_test_is_skipped(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(pytest.skip.Exception, match="no browser"), browser.chromium():
        pass
