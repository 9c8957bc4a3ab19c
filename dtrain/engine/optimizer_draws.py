"""What optimizers draw is for the parameters, and common to the ranks, whatever its shape is.

Langevin dynamics and noise that is added to gradients draw in `step()`, where a bias of two numbers looks like one
number for each of a rank's two samples. Closures, which run the model again, have their rows led as ever.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dtrain.engine.random_rows import put_part
from dtrain.engine.row_rule import Part


class OptimizerDraws:
    """Has random functions draw as they are called while any optimizer steps, from `open` to `close`."""

    def __init__(self) -> None:
        self._parts: list[Part | None] = []  # of the steps that run, one within the other
        self._handles: list[Any] = []

    def open(self) -> None:
        """A step begins that draws for a part of a batch."""
        self._handles = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]

    def close(self) -> None:
        """It is over; closing twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._parts.clear()

    def _before(self, _: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any]:
        part = put_part(None)
        self._parts.append(part)
        args = tuple(_led(one, part) if place == 1 else one for place, one in enumerate(args))
        return args, {name: _led(one, part) if name == "closure" else one for name, one in kwargs.items()}

    def _after(self, *_: Any) -> None:
        if self._parts:
            put_part(self._parts.pop())


def _led(closure: Any, part: Part | None) -> Any:
    """Returns a closure that draws for a part of a batch; what is none as it is."""
    if not callable(closure):
        return closure

    def run(*args: Any, **kwargs: Any) -> Any:
        outside = put_part(part)
        try:
            return closure(*args, **kwargs)
        finally:
            put_part(outside)

    return run
