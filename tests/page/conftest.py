"""One browser for all tests here; it is started by the first one that asks for it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.browser import Browser, chromium
from helpers.commands import Dtrain


@pytest.fixture(scope="session")
def _browser(temporary_files: None) -> Iterator[Browser]:
    with chromium(Path(tempfile.mkdtemp(prefix="chromium-"))) as browser:
        yield browser


@pytest.fixture
def browser(_browser: Browser) -> Iterator[Browser]:
    """A browser; each test finds it without a page, and leaves no complaint in its console."""
    yield _browser
    errors = _browser.errors()
    _browser.driver.get("about:blank")
    assert errors == []


@pytest.fixture
def page(browser: Browser, dtrain: Dtrain) -> Callable[..., Browser]:
    """Writes the page of the runs in `runs` with the command itself, and opens it."""

    def open_page(*words: object, width: int = 1280, dark: bool = False) -> Browser:
        done = dtrain("report", *words, "-o", "report.html")
        assert (done.code, done.out) == (0, "report: report.html\n"), done.text
        browser.open((dtrain.folder / "report.html").as_uri(), width, dark=dark)
        return browser

    return open_page
