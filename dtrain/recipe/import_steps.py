"""Optimizer steps that are taken while a recipe is imported: the net that is to be trained has been trained by then."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dtrain.errors import RecipeError


@dataclass(frozen=True)
class ImportStep:
    """An optimizer's first step while a recipe was imported.

    Attributes:
        place: file and line of the statement outside of functions that led to it.
        optimizer: whose.
    """

    place: str
    optimizer: Optimizer

    def check(self, model: nn.Module) -> None:
        """Looks whether it was a step of this net.

        Raises:
            RecipeError: it was.
        """
        own = {id(parameter) for parameter in model.parameters()}
        if any(id(parameter) in own for group in self.optimizer.param_groups for parameter in group["params"]):
            raise RecipeError(
                f"{self.place}: trains the model while the recipe is imported, and "
                "dtrain would train it again. Put the "
                'training under `if __name__ == "__main__":`, which dtrain does not run.'
            )


@contextlib.contextmanager
def import_steps() -> Iterator[list[ImportStep]]:
    """Notes the optimizers that step on gradients while a recipe is imported, each once.

    Raises:
        RecipeError: it is the net of a file without build_model; at once, before the whole training is done.
    """
    found: list[ImportStep] = []

    def note(optimizer: Optimizer, *_: Any) -> None:
        if any(optimizer is step.optimizer for step in found):
            return
        if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
            return
        frame = _outside_of_functions()
        if frame is None:
            return
        found.append(step := ImportStep(f"{frame.f_code.co_filename}:{frame.f_lineno}", optimizer))
        net = frame.f_globals.get("model") or frame.f_globals.get("net")
        if isinstance(net, nn.Module) and "build_model" not in frame.f_globals:
            step.check(net)

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def _outside_of_functions() -> FrameType | None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    return frame
