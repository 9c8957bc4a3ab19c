"""What a train step counts by itself: its own schedule, rates that it sets, numbers that it adds to, weights of
its own.

With accumulation it is called for each micro-batch, and what it counts are these, where it means optimizer steps.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from dtrain.errors import StepError

if TYPE_CHECKING:
    from dtrain.engine.train_step import Task

logger = logging.getLogger(__name__)

_FIRST = 4  # micro-batches in which counters are looked for; later in the one after the 4th, 8th, 16th, ...
_MOST_PARTS = 1000
_FOREIGN = ("builtins", "types")  # of what has no attributes that a step counts in


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
            return f"changes the optimizer's options itself ({', '.join(dict.fromkeys(names)) or 'its groups'})"
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
    """What the train step's own code names, and what moves with each call of it.

    These are whole numbers that grow by one, and weights outside of the net, such as an average of the net's own. They
    are looked for among the attributes of the net and its parts, the globals, the variables of the function around the
    step, the object whose method it is, and what these hold.

    Args:
        task: its step is looked at.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._calls = 0
        self._before: dict[str, int] = {}
        self._weights: dict[str, Any] = {}
        self._names = _names_of(task.train_step)
        self._told: set[str] = set()

    @property
    def _is_due(self) -> bool:
        return self._calls <= _FIRST or (self._calls - 1) & (self._calls - 2) == 0

    def begin(self) -> None:
        """A train step begins."""
        self._calls += 1
        self._before, self._weights = self._found() if self._is_due else ({}, {})

    def check(self, *, counters: bool = True) -> None:
        """A train step that was called for a micro-batch is over.

        Args:
            counters: whether one that counts its calls is refused; else it is a warning.

        Raises:
            StepError: it counts its calls, or moves weights of its own.
        """
        if not self._is_due:
            return
        now, weights = self._found()
        for name, before in self._before.items():
            if now.get(name) == before + 1:
                told = (
                    f"train.accumulation: the train step adds to {name} ({before}, then {now[name]}). It is called "
                    "once for each micro-batch, so this counts micro-batches, not optimizer steps. "
                )
                if counters:
                    raise StepError(f"{told}Move the counter out of the step, or set train.accumulation=1.")
                if name not in self._told:
                    self._told.add(name)
                    logger.warning("%sIf what it learns depends on it, set train.accumulation=1.", told)
        for name, known in self._weights.items():
            if weights.get(name, known) != known:
                raise StepError(
                    f"train.accumulation: the train step changes {name}, an average of the weights or another net? It "
                    "is called once for each micro-batch, and would do so before the optimizer has stepped. Leave it "
                    "to train.ema_decay, or set train.accumulation=1."
                )

    def _found(self) -> tuple[dict[str, int], dict[str, Any]]:
        numbers: dict[str, int] = {}
        weights: dict[str, Any] = {}
        shapes = {parameter.shape for parameter in self._task.module.parameters()}
        for name, value in self._held():
            if (number := _whole(value)) is not None:
                numbers[name] = number
            elif (state := _state(value, self._task.module, shapes)) is not None:
                weights[name] = state
        return numbers, weights

    def _held(self) -> Iterator[tuple[str, Any]]:
        """Yields by name what the step's code can reach in one step or two."""
        for name, value in self._roots():
            yield name, value
            yield from ((f"{name}{key}", part) for key, part in self._parts(value))

    def _parts(self, value: Any) -> Iterator[tuple[str, Any]]:
        if type(value) in (dict, list) and len(value) <= _MOST_PARTS:
            yield from ((f"[{key!r}]", part) for key, part in _items(value))
        elif isinstance(value, type):
            yield from ((f".{name}", part) for name, part in vars(value).items() if name in self._names)
        elif type(value).__module__ not in _FOREIGN and not isinstance(value, nn.Module):
            for name, part in dict(getattr(value, "__dict__", ())).items():
                if name in self._names or isinstance(part, (nn.Module, list, dict)):
                    yield f".{name}", part

    def _roots(self) -> Iterator[tuple[str, Any]]:
        for path, module in self._task.module.named_modules():
            for name, value in (*module.__dict__.items(), *module._buffers.items()):
                if name in self._names and not name.startswith("_"):
                    yield ".".join(filter(None, ("model", path, name))), value
        step = self._task.train_step
        if (owner := getattr(step, "__self__", None)) is not None:
            yield "self", owner
        function = inspect.unwrap(getattr(step, "__func__", step))
        if isinstance(function, FunctionType):
            yield from ((n, function.__globals__[n]) for n in self._names if n in function.__globals__)
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
                with contextlib.suppress(ValueError):  # it has no value yet
                    yield name, cell.cell_contents


def _items(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items() if isinstance(value, dict) else enumerate(value))


def _whole(value: Any) -> int | None:
    """Returns a whole number, also of a tensor with one element; None for anything else."""
    if type(value) is int:
        return value
    is_one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point()
    return int(value) if is_one and not value.is_complex() and value.dtype is not torch.bool else None


def _state(value: Any, net: nn.Module, shapes: set[Any]) -> Any:
    """Returns what changes with the weights that something holds; None where it holds none but the net's."""
    tensors: list[Tensor]
    if isinstance(value, nn.Module):
        own = {id(parameter) for parameter in net.parameters()}
        tensors = [p for p in value.parameters() if id(p) not in own]
    elif type(value) in (dict, list) and len(value) <= _MOST_PARTS:
        tensors = [p for _, p in _items(value) if isinstance(p, Tensor) and not isinstance(p, nn.Parameter)]
        tensors = [p for p in tensors if p.shape in shapes and p.numel() > 1 and p.is_floating_point()]
    else:
        return None
    return [(id(tensor), tensor._version) for tensor in tensors] or None


def _names_of(step: Any, depth: int = 2) -> set[str]:
    """Returns the names that a function's code has, and the code of the functions of its file that it calls."""
    function = inspect.unwrap(getattr(step, "__func__", step))
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
