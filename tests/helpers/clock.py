"""A clock that goes when it is told to."""

from __future__ import annotations

from types import ModuleType

import pytest


class Now:
    """Stands for the module `time`, as far as it tells how much has passed."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


def stopped(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> Now:
    """Gives modules a clock that stands, and returns it."""
    clock = Now()
    for module in modules:
        monkeypatch.setattr(module, "time", clock)
    return clock
