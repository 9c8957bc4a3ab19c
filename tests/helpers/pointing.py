"""The report's curves, pointed at as with a mouse."""

from __future__ import annotations

from helpers.browser import Browser

SHIFT = 8


def place(browser: Browser, panel: str, share: float) -> tuple[float, float]:
    """A place in the window, so far from the left of a panel's curve to its right."""
    script = """const over = document.querySelector(`[data-panel="${arguments[0]}"] .u-over`);
    over.scrollIntoView({block: "center"}); const r = over.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]"""
    left, top, width, height = browser.run(script, panel)
    return left + min(share, 0.999) * width, top + height / 2


def hover(browser: Browser, panel: str, share: float) -> None:
    x, y = place(browser, panel, share)
    browser.mouse("mouseMoved", x, y)
    browser.until("return !document.querySelector(`[data-panel='${arguments[0]}'] .tip`).hidden", panel)


def told(browser: Browser, panel: str) -> dict[str, dict[str, str]]:
    """What the tip says: run -> column -> value."""
    script = """const found = {};
    for (const row of document.querySelectorAll(`[data-panel="${arguments[0]}"] .tip tbody tr`))
        found[row.dataset.run] = Object.fromEntries([...row.querySelectorAll("td")].map((cell) => [cell.dataset.column, cell.textContent]));
    return found"""
    found: dict[str, dict[str, str]] = browser.run(script, panel)
    return found


def where(browser: Browser, panel: str) -> str:
    return browser.texts(f'[data-panel="{panel}"] .tip > div')[0]


def drag(browser: Browser, panel: str, start: float, end: float, modifiers: int = 0) -> None:
    (x, y), (to, _) = place(browser, panel, start), place(browser, panel, end)
    more = {"button": "left", "modifiers": modifiers}
    browser.mouse("mouseMoved", x, y, modifiers=modifiers)
    browser.mouse("mousePressed", x, y, clickCount=1, **more)
    for step in range(1, 11):
        browser.mouse("mouseMoved", x + (to - x) * step / 10, y, buttons=1, **more)
    browser.mouse("mouseReleased", to, y, clickCount=1, **more)


def ends(browser: Browser, panel: str) -> tuple[int, int]:
    """The first and the last epoch that a panel shows."""
    found = []
    for share in (0.001, 0.999):
        hover(browser, panel, share)
        found.append(int(where(browser, panel).removeprefix("epoch ")))
    return found[0], found[1]
