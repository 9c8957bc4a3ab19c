"""Calls a user's hooks in a run, and adds their columns to its rows; see `dtrain.engine.hooks`."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.hooks import ARGUMENTS, Hook
from dtrain.engine.loop import Engine
from dtrain.engine.metrics import Mean, Value
from dtrain.engine.position import TrainPosition
from dtrain.engine.run import Run, RunState
from dtrain.errors import StepError, UsageError
from dtrain.rundir.columns import NO_METRICS

if TYPE_CHECKING:
    from dtrain.data.partition import RankBatch

# Ranks that compute the same thing may differ by rounding, where their devices do.
_ALIKE = 1e-6

_LISTENS = {
    "on_train_start": ("before_train",),
    "on_epoch_start": ("before_epoch",),
    "on_batch_end": ("after_step",),
    "on_step_end": ("after_step",),
    "on_validation_end": ("after_validation",),
    "on_epoch_row": ("before_epoch", "after_step", "after_validation", "after_epoch"),
    "on_train_end": ("after_train",),
    "on_exception": ("on_exception",),
}


class CallHooks(EngineCallback):
    """Calls a user's hooks.

    Args:
        engine: what trains.
        hooks: at least one.

    Attributes:
        state: what they and the engine share.
    """

    order = Order.USER

    def __init__(self, engine: Engine, hooks: Sequence[Hook]) -> None:
        self.state = RunState()
        self._engine, self._run = engine, Run(engine, self.state)
        self._hooks = {name: [hook for hook in hooks if hook.name == name] for name in {hook.name for hook in hooks}}
        self._values: Mapping[str, Value] = {}
        self._given: Mapping[str, Any] = {}
        self._arguments = self._sources()
        # Who has the run may ask for an end at any time, also in a step.
        self._knows_run = any("run" in hook.takes.values() for hook in hooks)
        self._reads_values = any("values" in hook.takes.values() for hook in self._hooks.get("after_step", ()))

    def listens(self, hook: str) -> bool:
        """Whether one of the user's is called there."""
        if hook == "on_batch_end" and not self._reads_values:
            return False
        if hook == "on_epoch_row" and self._knows_run:
            return True
        return any(name in self._hooks for name in _LISTENS.get(hook, ()))

    def on_train_start(self, engine: Engine) -> None:
        """Calls `before_train`."""
        self._call("before_train")

    def on_epoch_start(self, epoch: int) -> None:
        """Calls `before_epoch`."""
        self._call("before_epoch", epoch=epoch)

    def on_batch_end(self, batch: RankBatch, values: Mapping[str, Value]) -> None:
        """Keeps a step's values for `after_step`."""
        self._values = values

    def on_step_end(self, position: TrainPosition) -> None:
        """Calls `after_step`."""
        self._call("after_step")
        self._values = {}

    def on_validation_end(self, row: Mapping[str, Any]) -> None:
        """Calls `after_validation`, with the weights that were validated."""
        module = self._engine.task.module
        modes = [(part, part.training) for part in module.modules()]
        module.eval()
        with self._engine.averaged():
            self._call("after_validation", row=dict(row))
        for part, training in modes:
            part.training = training

    def on_epoch_row(self, row: Mapping[str, Any]) -> Mapping[str, float]:
        """Calls `after_epoch`, with the weights that were validated; all ranks hear of who asked for an end.

        Returns:
            the columns that it adds.

        Raises:
            StepError: ranks do not agree on a column, or it is none.
        """
        columns: dict[str, tuple[Any, str]] = {}
        if "after_epoch" in self._hooks:
            self._engine.task.module.eval()
            with self._engine.averaged():
                for hook, returned in self._call("after_epoch", row=dict(row)):
                    _add_columns(columns, returned, hook, row)
        asked, self.state.reason = self.state.reason, None
        told = self._engine.world.gather_json(
            {"stop": asked, "columns": {name: _plain(*value) for name, value in columns.items()}}
        )
        reason = next((one["stop"] for one in told if one["stop"] is not None), None)
        if reason is not None:
            self._engine.stop(f"stopped after epoch {row['epoch']} of {self._engine.epochs}: {reason}")
        return _agreed([one["columns"] for one in told])

    def on_train_end(self) -> None:
        """Calls `after_train`."""
        self._call("after_train")

    def on_exception(self, error: BaseException) -> None:
        """Calls `on_exception`."""
        self._call("on_exception", error=error)

    def _sources(self) -> dict[str, Callable[[], Any]]:
        """Where each argument comes from; asked only for those that a hook takes."""
        engine = self._engine
        return {
            "model": lambda: engine.task.module,
            "run": lambda: self._run,
            "epoch": lambda: self._given.get("epoch", engine.place.epoch),
            "step": lambda: engine.place.updates,
            "history": lambda: self._run.history,
            "values": lambda: {name: _detached(value) for name, value in self._values.items()},
            "row": lambda: self._given["row"],
            "error": lambda: self._given["error"],
        }

    def _call(self, name: str, **given: Any) -> list[tuple[Hook, Any]]:
        """Calls the hooks of a name; one that returns False asks for an end."""
        self._given, returned = given, []
        for hook in self._hooks[name]:
            found = hook(self._arguments)
            if found is False:
                self._run.stop(f"{hook.where} returned False")
            returned.append((hook, found))
        return returned


def call_hooks(engine: Engine, names: Container[str] = ARGUMENTS) -> None:
    """Has an engine call its task's hooks.

    Args:
        engine: it has not trained yet.
        names: of those that are called.

    Raises:
        UsageError: a rank has other hooks than the others; all ranks raise it.
    """
    hooks = [hook for hook in engine.task.hooks if hook.name in names]
    told = engine.world.gather_json([hook.name for hook in hooks])
    if any(one != told[0] for one in told):
        named = "; ".join(f"rank {rank}: {', '.join(one) or 'none'}" for rank, one in enumerate(told))
        raise UsageError(
            f"the ranks have different hooks ({named}), and would wait for each other. Define them on all ranks, and "
            "ask run.is_main within.",
            on_all_ranks=True,
        )
    if hooks:
        engine.callbacks.add(CallHooks(engine, hooks))


def state_of_hooks(engine: Engine) -> RunState | None:
    """Returns what an engine shares with its hooks; None where there are none."""
    return next((one.state for one in engine.callbacks if isinstance(one, CallHooks)), None)


def _detached(value: Value) -> Any:
    if isinstance(value, Mean):
        return Mean(_detached(value.total), _detached(value.count))
    return value.detach() if isinstance(value, torch.Tensor) else value


def _add_columns(columns: dict[str, tuple[Any, str]], returned: Any, hook: Hook, row: Mapping[str, Any]) -> None:
    """Adds what one `after_epoch` returned, with where it came from.

    Raises:
        StepError: it is no mapping of columns, or there is such a column already.
    """
    if returned is None or isinstance(returned, bool):
        return
    if not isinstance(returned, Mapping):
        raise StepError(
            f"{hook.where} returned a {type(returned).__name__}. It should return None, False (to end training), or a "
            'mapping of columns: {"f1": 0.9}.'
        )
    for name, value in returned.items():
        if not isinstance(name, str) or not name.strip() or any(ord(letter) < ord(" ") for letter in name):
            raise StepError(f"{hook.where} returned a column named {name!r}. A name is a text on one line.")
        if name in row or name in columns or name in NO_METRICS:
            other = f", as does {columns[name][1]}" if name in columns else ", which the history has already"
            raise StepError(f"{hook.where} returned the column {name!r}{other}. Give it another name.")
        columns[name] = value, hook.where


def _plain(value: Any, where: str) -> list[Any]:
    """Returns a column's value as JSON has it: [where, number], or [where, total, count].

    Raises:
        StepError: it is no number.
    """
    try:
        if isinstance(value, Mean):
            return [where, _number(value.total), _number(value.count)]
        return [where, _number(value)]
    except (TypeError, ValueError, RuntimeError):
        raise StepError(
            f"{where} returned {value!r} ({type(value).__name__}) for a column. A column's value is a number, a tensor "
            "with one element, or a dtrain.Mean(total, count)."
        ) from None


def _number(value: Any) -> float:
    if isinstance(value, str):
        raise TypeError
    return float(_detached(value))


def _agreed(told: Sequence[Mapping[str, list[Any]]]) -> dict[str, float]:
    """Returns the columns that the ranks have together, from what each rank has.

    Raises:
        StepError: two ranks have two values of one column, or all counts of one are zero; all ranks raise it.
    """
    columns: dict[str, float] = {}
    for name in {name: None for one in told for name in one}:
        by_rank = {rank: one[name] for rank, one in enumerate(told) if name in one}
        first, found = next(iter(by_rank.items()))
        where, *numbers = found
        for rank, (_, *others) in by_rank.items():
            if len(others) != len(numbers) or (len(numbers) == 1 and not _alike(others[0], numbers[0])):
                raise StepError(
                    f"{where} returned {name} = {_shown(numbers)} on rank {first} and {_shown(others)} on rank {rank}. "
                    "A column has one value: return dtrain.Mean(total, count), which is averaged over the ranks, "
                    "compute the same on all of them, or return it on rank 0 alone (if run.is_main).",
                    on_all_ranks=True,
                )
        if len(numbers) == 1:
            columns[name] = numbers[0]
            continue
        total, count = (math.fsum(parts) for parts in list(zip(*by_rank.values(), strict=True))[1:])
        if count == 0:
            raise StepError(
                f"{where} returned {name} as Mean(total, count) with count 0 on all ranks.", on_all_ranks=True
            )
        columns[name] = total / count
    return columns


def _alike(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_ALIKE) or (math.isnan(one) and math.isnan(other))


def _shown(numbers: Sequence[float]) -> str:
    return f"{numbers[0]!r}" if len(numbers) == 1 else f"Mean({numbers[0]!r}, {numbers[1]!r})"
