"""Callbacks made of functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dtrain.engine.callback import EngineCallback, Order


def on(order: Order = Order.USER, **hooks: Callable[..., Any]) -> EngineCallback:
    """Returns a callback whose hooks are these functions."""

    def method(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda _self, *args, **kwargs: function(*args, **kwargs)

    return type("On", (EngineCallback,), {"order": order, **{name: method(one) for name, one in hooks.items()}})()
