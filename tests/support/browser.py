"""A real browser: Debian's Chromium without a window, driven by selenium through its chromedriver.

    with chromium() as browser:
        browser.get(page.as_uri())
        assert requests(browser) == [] and errors(browser) == []

Where there is none, the test is skipped. Nothing is downloaded.
"""
import json
import os
import shutil
from contextlib import contextmanager

import pytest

LOCAL = ("file:", "data:", "blob:", "about:", "chrome:", "devtools:")


def programs():
    """(chromium, chromedriver), or a skipped test."""
    found = [next(filter(None, map(shutil.which, names)), None)
             for names in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))]
    if None in found:
        pytest.skip("no browser: needs Chromium and chromedriver (apt-get install chromium "
                    "chromium-driver)")
    return found


@contextmanager
def chromium(width=1280, height=900, javascript=True):
    """A browser whose page is width x height pixels."""
    program, driver = programs()
    selenium = pytest.importorskip("selenium.webdriver", reason="no selenium, of the test extra")
    options = selenium.ChromeOptions()
    options.binary_location = program
    for argument in ("headless=new", f"window-size={width},{height}", "hide-scrollbars",
                     "force-device-scale-factor=1", "disable-dev-shm-usage",
                     "disable-background-networking", "disable-component-update", "no-first-run"):
        options.add_argument("--" + argument)
    if getattr(os, "geteuid", lambda: 1)() == 0:            # Chromium has no sandbox for root
        options.add_argument("--no-sandbox")
    if not javascript:
        options.add_experimental_option(
            "prefs", {"profile.managed_default_content_settings.javascript": 2})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = selenium.Chrome(options, selenium.ChromeService(driver))
    try:
        # A window has a least width. What is set here has none, so a phone can be tried.
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": False})
        yield browser
    finally:
        browser.quit()


def requests(browser):
    """The addresses outside this machine's files that were asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"].get("request", event["params"])["url"] for event in events
             if event["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated")]
    return [url for url in asked if not url.startswith(LOCAL)]


def errors(browser):
    """The errors and warnings in the browser's console since the last call."""
    return [entry["message"] for entry in browser.get_log("browser")
            if entry["level"] in ("SEVERE", "WARNING")]
