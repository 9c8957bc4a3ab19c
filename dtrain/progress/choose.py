"""Which view of its progress a run gets."""

from __future__ import annotations

import sys

from dtrain.progress.bar import LiveBar
from dtrain.progress.base import Progress, Silent
from dtrain.progress.plain import PlainLines


def choose_progress(*, is_main: bool, epochs: int, log_step_freq: int) -> Progress:
    """Returns the live bar for a terminal, plain lines for anything else, silence for other ranks."""
    if not is_main:
        return Silent()
    if sys.stdout.isatty():
        return LiveBar(epochs)
    return PlainLines(epochs, log_step_freq)
