"""How values are shown to people: rounded where there is no room, never changed."""

from __future__ import annotations

import time

from dtrain.rundir.history import value_of
from dtrain.wording import number


def printable(text: str) -> str:
    """Returns a text without what a terminal would take for a command; names are other people's words."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def rounded(cell: str) -> str:
    """Returns a history's cell for a table: "-" where it is empty, a number of four digits, or its text."""
    value = value_of(cell)
    if value is None:
        return "-"
    if isinstance(value, float):
        return number(value)
    return printable(str(value))


def duration(seconds: float) -> str:
    """Returns "42 s", "3 min 20 s", "5 h 3 min" or "2 d 4 h"."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    for size, name, part, less in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {name}" + (f" {rest} {less}" if rest else "")
    return f"{whole} s"


def moment(at: float) -> str:
    """Returns "2026-01-31 12:00" in local time."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
    except (OverflowError, ValueError, OSError):  # a file's time may be anything
        return "-"
