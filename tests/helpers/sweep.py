"""How much of the long sweeps is run: a part by default, all with DTRAIN_TEST_SWEEP=full."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")

FULL = os.environ.get("DTRAIN_TEST_SWEEP") == "full"


def some(few: list[T], more: list[T]) -> list[T]:
    """Returns the cases that are always run, and in a full sweep the others too."""
    return [*few, *more] if FULL else few
