"""Which view of its progress a run gets."""

from __future__ import annotations

import os
import sys
from typing import Literal

from dtrain.callbacks.progress.bar import LiveBar
from dtrain.callbacks.progress.plain import PlainLines
from dtrain.engine.callback import EngineCallback
from dtrain.errors import UsageError

View = Literal["auto", "rich", "plain"]

_CANNOT_MOVE = frozenset({"", "dumb", "unknown"})


def choose_progress(*, is_main: bool, log_step_freq: int, view: View = "auto") -> EngineCallback | None:
    """Returns what shows a rank's progress; None for nothing.

    Args:
        is_main: whether this is global rank 0; the others are silent.
        log_step_freq: train steps between two plain lines.
        view: "rich" is the live bars, "plain" are lines; "auto" is a table and a curve in a notebook, the bars on a
            terminal, and lines anywhere else.
    """
    if not is_main:
        return None
    if view == "auto" and can_display():
        from dtrain.callbacks.progress.notebook import NotebookView

        return NotebookView()
    live = can_be_live() if view == "auto" else view == "rich"
    return LiveBar() if live else PlainLines(log_step_freq)


def progress_of(verbose: bool | EngineCallback, *, is_main: bool, log_step_freq: int) -> EngineCallback | None:
    """Returns what shows a rank's progress, of a function's argument `verbose`; None for nothing.

    Args:
        verbose: whether rank 0 shows progress; or what shows it.
        is_main: whether this is global rank 0.
        log_step_freq: train steps between two plain lines.

    Raises:
        UsageError: it is neither.
    """
    if not isinstance(verbose, (bool, EngineCallback)):
        raise UsageError(
            f"verbose = {verbose!r}: should be True, False, or an object of a class derived from "
            "dtrain.engine.callback.EngineCallback."
        )
    if not verbose or not is_main:
        return None
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
