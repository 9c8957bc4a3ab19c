"""Which view of its progress a run gets."""

from __future__ import annotations

import os
import sys
from typing import Literal

from dtrain.progress.bar import LiveBar
from dtrain.progress.base import Progress, Silent
from dtrain.progress.plain import PlainLines

View = Literal["auto", "rich", "plain"]

_CANNOT_MOVE = frozenset({"", "dumb", "unknown"})


def choose_progress(*, is_main: bool, log_step_freq: int, view: View = "auto") -> Progress:
    """Returns what a rank tells its progress to.

    Args:
        is_main: whether this is global rank 0; the others are silent.
        log_step_freq: train steps between two plain lines.
        view: "rich" is the live bars, "plain" are lines; "auto" is a table and a curve in a notebook, the bars on a
            terminal, and lines anywhere else.
    """
    if not is_main:
        return Silent()
    if view == "auto" and can_display():
        from dtrain.progress.notebook import NotebookView

        return NotebookView()
    live = can_be_live() if view == "auto" else view == "rich"
    return LiveBar() if live else PlainLines(log_step_freq)


def progress_of(verbose: bool | Progress, *, is_main: bool, log_step_freq: int) -> Progress:
    """Returns what a rank tells its progress to, of a function's argument `verbose`.

    Args:
        verbose: whether rank 0 shows progress; or what it tells it to.
        is_main: whether this is global rank 0.
        log_step_freq: train steps between two plain lines.
    """
    if not verbose or not is_main:
        return Silent()
    if not isinstance(verbose, bool):
        return verbose
    return choose_progress(is_main=True, log_step_freq=log_step_freq)


def can_be_live() -> bool:
    """Whether the standard output is a terminal that can move its cursor."""
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM", "").lower() not in _CANNOT_MOVE


def can_display() -> bool:
    """Whether this is a notebook's own process, which shows more than lines."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    session = getattr(kernel, "session", None)
    return session is not None and getattr(session, "pid", None) == os.getpid()  # and none that was forked off
