"""One headless Chromium for a module of tests, told what to do over WebDriver."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from helpers.running import wait_for

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--force-device-scale-factor=1"),
    *("--no-default-browser-check", "--disable-default-apps", "--metrics-recording-only", "--disable-extensions"),
)
AXE = Path(__file__).parent.parent / "vendor/axe.min.js"


def need_browser() -> tuple[str, str]:
    """The programs; without them tests are skipped, which in CI is a failure."""
    found = shutil.which("chromium"), shutil.which("chromedriver")
    if found[0] is None or found[1] is None:
        words = "chromium and chromedriver are missing (apt-get install chromium chromium-driver)"
        if os.environ.get("CI"):
            pytest.fail(words)
        pytest.skip(words)
    return found[0], found[1]


class Browser:
    """A page in it, as a person would use it."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str, width: int = 1280, height: int = 900, *, dark: bool = False) -> None:
        """Opens a page in a window of this size, and waits until it has drawn itself."""
        self.size(width, height)
        self.cdp(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.driver.get("about:blank")
        self.logs("browser")
        self.logs("performance")
        self.driver.get(url)
        self.until("return performance.getEntriesByName('dtrain-drawn').length")

    def size(self, width: int, height: int) -> None:
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def cdp(self, command: str, **arguments: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, arguments)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, *arguments: Any, seconds: float = 90.0) -> None:
        """Waits until a script returns something true."""
        wait_for(lambda: self.run(script, *arguments), script, seconds)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.run(
            "return [...document.querySelectorAll(arguments[0])].map((n) => n.textContent)", selector
        )
        return found

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """A real event of the mouse, at a place of the window."""
        self.cdp("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def keys(self, *names: str, modifiers: int = 0) -> None:
        """Real strokes of keys, one after the other, on whatever has the focus; modifiers: 8 is Shift."""
        for name in names:
            text = {"Enter": "\r", "Space": " "}.get(name, name if len(name) == 1 else "")
            key = " " if name == "Space" else name
            code = {"Enter": 13, "Space": 32, "Tab": 9, "Escape": 27}.get(name, 0)
            more = {"key": key, "modifiers": modifiers, "windowsVirtualKeyCode": code}
            self.cdp("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **more)
            self.cdp("Input.dispatchKeyEvent", type="keyUp", **more)

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        size = self.cdp("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}} if whole else {}
        shot = self.cdp("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **clip)
        file.write_bytes(base64.b64decode(shot["data"]))

    def logs(self, kind: str) -> list[dict[str, Any]]:
        """What has come since this was asked last."""
        found: list[dict[str, Any]] = self.driver.get_log(kind)  # type: ignore[no-untyped-call]
        return found

    def errors(self) -> list[str]:
        """Warnings and errors of the console."""
        told = [entry["message"] for entry in self.logs("browser") if entry["level"] != "INFO"]
        return [words for words in told if "willReadFrequently" not in words]  # it is the tests that read pixels

    def requests(self) -> list[str]:
        """URLs that were asked for."""
        events = [json.loads(entry["message"])["message"] for entry in self.logs("performance")]
        found = [
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in found if not url.startswith(("data:", "about:"))]

    def axe(self) -> list[str]:
        """What axe-core finds wrong, in words."""
        if not self.run("return 'axe' in window"):
            self.run(AXE.read_text(encoding="utf-8"))
        script = "const done = arguments[0]; axe.run().then((r) => done(r.violations), (e) => done([{id: String(e), nodes: []}]))"
        found = self.driver.execute_async_script(script)
        return [
            f"{one['id']} ({one.get('impact')}): {[node['html'][:150] for node in one['nodes'][:4]]} {one['nodes'][0]['failureSummary'][:300] if one['nodes'] else ''}"
            for one in found
        ]


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Starts a browser with a profile of its own, and ends it with all its processes."""
    program, driver_program = need_browser()
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)  # type: ignore[no-untyped-call]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_program))
    driver.set_script_timeout(60)
    try:
        yield Browser(driver)
    finally:
        driver.quit()
