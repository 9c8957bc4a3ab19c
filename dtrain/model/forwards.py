"""A net's forward replaced for a while; the net's names, attributes and hooks stay what they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def forward_replaced(net: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While inside, calls of a net run another forward; then it has the one that it had."""
    before = net.__dict__.get("forward")
    net.__dict__["forward"] = forward
    try:
        yield
    finally:
        del net.__dict__["forward"]
        if before is not None:
            net.__dict__["forward"] = before
