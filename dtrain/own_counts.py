"""What a train step counts by itself: its own schedule, rates that it sets, numbers that it adds to.

With accumulation it is called for each micro-batch, and what it counts are these, where it means optimizer steps.
"""

from __future__ import annotations

import gc
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from dtrain.errors import StepError

if TYPE_CHECKING:
    from dtrain.learning import Task

_FIRST = 4  # micro-batches in which counters are looked for


class Rates:
    """The options of the optimizer's groups, and the schedules of the user's own.

    Args:
        task: its own scheduler is dtrain's to step.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._schedulers = _schedulers_of(task)
        self._before: list[Any] = []
        self._counted: list[int] = []

    def begin(self) -> None:
        """A train step begins."""
        self._before = self._options()
        self._counted = [scheduler.last_epoch for scheduler in self._schedulers]

    def changed(self) -> str:
        """Returns what the step has changed since, in words; nothing where all is as it was."""
        for scheduler, counted in zip(self._schedulers, self._counted, strict=True):
            if scheduler.last_epoch != counted:
                return f"steps a scheduler of its own ({type(scheduler).__name__}), which then counts micro-batches"
        now = self._options()
        if now != self._before:
            names = [
                name
                for one, other in zip(self._before, now, strict=False)
                for name in one
                if one[name] != other.get(name)
            ]
            return f"changes the optimizer's options by itself ({', '.join(dict.fromkeys(names)) or 'its groups'})"
        return ""

    def _options(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [] if self._task.optimizer is None else self._task.optimizer.param_groups
        return [
            {name: (id(v), v._version) if isinstance(v, Tensor) else v for name, v in group.items() if name != "params"}
            for group in groups
        ]


def _schedulers_of(task: Task) -> list[Any]:
    """Returns the schedulers of the task's optimizer besides the task's; each has wrapped its step() on being made."""
    if not hasattr(getattr(task.optimizer, "step", None), "_wrapped_by_lr_sched"):
        return []
    # Not isinstance, which runs the code of whatever there is.
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), LRScheduler)]
    return [s for s in found if s is not task.scheduler and getattr(s, "optimizer", None) is task.optimizer]


class OwnCounts:
    """Whole numbers that the train step's own code names, and that grow with each call of it.

    They are the attributes of the net and its parts, the globals and the variables of the function around it.

    Args:
        task: its step is looked at.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._calls = 0
        self._before: dict[str, int] = {}
        self._names = _names_of(task.train_step)

    def begin(self) -> None:
        """A train step begins."""
        self._calls += 1
        self._before = self._found() if self._calls <= _FIRST else {}

    def check(self) -> None:
        """A train step that was called for a micro-batch is over.

        Raises:
            StepError: it counts its calls.
        """
        if self._calls > _FIRST:
            return
        now = self._found()
        for name, before in self._before.items():
            if now.get(name, before) > before:
                raise StepError(
                    f"train.accumulation: the train step adds to {name} ({before}, then {now[name]}). It is called "
                    "once for each micro-batch, so that this counts micro-batches, not optimizer steps. Move the "
                    "counter out of the step, or set train.accumulation=1."
                )

    def _found(self) -> dict[str, int]:
        found: dict[str, int] = {}
        step = self._task.train_step
        for path, module in self._task.module.named_modules():
            for name, value in module.__dict__.items():
                if type(value) is int and name in self._names and not name.startswith("_"):
                    found[".".join(filter(None, ("model", path, name)))] = value
        function = getattr(step, "__func__", step)
        if isinstance(function, FunctionType):
            found |= {n: v for n in self._names if type(v := function.__globals__.get(n)) is int}
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
                try:
                    if type(cell.cell_contents) is int:
                        found[name] = cell.cell_contents
                except ValueError:  # it has no value yet
                    continue
        return found


def _names_of(step: Any, depth: int = 2) -> set[str]:
    """Returns the names that a function's code has, and the code of the functions of its file that it calls."""
    function = getattr(step, "__func__", step)
    if not isinstance(function, FunctionType):
        return set()
    names = _names_in(function.__code__)
    for name in list(names) if depth else ():
        called = function.__globals__.get(name)
        if isinstance(called, FunctionType) and called.__globals__ is function.__globals__:
            names |= _names_of(called, depth - 1)
    return names


def _names_in(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names_in(constant)
    return names
