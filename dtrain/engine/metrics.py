"""Exact means: sums and counts are kept and added up over ranks; the one division comes last."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from dtrain.engine.list_states import Update
from dtrain.engine.synced_metrics import compute_all, load_metric_state, metric_state, update
from dtrain.engine.whole_set import WholeSet
from dtrain.errors import DataError, StepError, StopRequested, UsageError, nothing_yielded

if TYPE_CHECKING:
    from dtrain.distributed.world import World

Scalar: TypeAlias = "float | Tensor"


@dataclass(frozen=True)
class Mean:
    """A value of a step that brings its own weight, where the batch size is not the right one.

    Token-level losses, `ignore_index` and class weights are such: the epoch's value is the sum of the
    totals over the sum of the counts, over all steps and ranks.

    Attributes:
        total: the sum over what was counted; a float or a 0-d tensor.
        count: how many were counted (tokens, or the sum of weights); 0 adds nothing.
    """

    total: Scalar
    count: Scalar

    @property
    def value(self) -> Scalar:
        """The mean of this step alone."""
        return self.total / self.count


@dataclass(frozen=True)
class Observed:
    """A value of a step that has no mean: what a torchmetrics object of this name is to be updated with.

    Attributes:
        arguments: those of the object's `update`, for the samples of the step: (predictions, labels).
        keywords: those that it takes by name.
    """

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)


Value: TypeAlias = "Scalar | Mean | Observed"


@dataclass(frozen=True)
class PassResult:
    """What one pass over a split came to, over all ranks.

    Attributes:
        means: name -> mean over all samples.
        samples: number of samples of all ranks.
        steps: number of steps of this rank.
        seconds: duration, the mean over ranks.
        aside: seconds that passed meanwhile with what is no part of it (validations within the epoch, steps in which
            the net was compiled), the mean over ranks.
        untimed: samples of those steps, of all ranks.
    """

    means: dict[str, float]
    samples: int
    steps: int
    seconds: float
    aside: float = 0.0
    untimed: int = 0


class MeanTable:
    """Running (total, count) of each named value of one split on one rank.

    Args:
        split: "train" or "valid", for messages.
        names: the values' names where the ranks have agreed on them in an earlier epoch.
        metrics: name -> torchmetrics object, for the values that are `Observed`; they start anew.

    Values on the CPU are added as Python floats, which are float64; values on another device are added
    there, without waiting for it.
    """

    def __init__(
        self, split: str, names: tuple[str, ...] | None = None, metrics: Mapping[str, Any] | None = None
    ) -> None:
        self.split = split
        self._metrics = {} if metrics is None else metrics
        for metric in self._metrics.values():
            metric.reset()
        self.names = names
        self._known: Set[str] = frozenset()  # names that were checked
        self._agreed = names is not None
        self.samples = 0
        self.steps = 0
        self.asked: dict[str, float] | None = None  # what `running` returned last
        self.left = False  # whether this rank left the pass before its end, since it was asked to stop
        self._sums: dict[str, _Sum] = {}
        self._updates: dict[str, list[Update]] = {}  # of torchmetrics objects with lists

    def add(self, values: Mapping[str, Value], count: int, start: int = 0) -> None:
        """Adds one step's values.

        Args:
            values: name -> the mean over the step's samples, or a `Mean`. The names must be the same each step.
            count: number of real samples of the step; 0 for a step that only keeps the ranks together.
            start: where the first of them is in the data's order.

        Raises:
            StepError: the names differ from those of the steps before.
        """
        self.steps += 1
        if values.keys() != self._known:
            self._check_names(values)
        if count == 0:
            return
        self.samples += count
        for name, value in values.items():
            if isinstance(value, Observed):
                metric = self._metrics[name]
                if isinstance(metric, WholeSet):
                    metric.add(start, count, value.arguments, value.keywords)
                else:
                    update(metric, start, value, self._updates.setdefault(name, []))
                continue
            known = self._sums.get(name)
            if known is None:
                known = self._sums[name] = _Sum()
            if isinstance(value, Mean):
                known.total = _plus(known.total, value.total, 1)
                known.count = _plus(known.count, value.count, 1)
            else:
                known.total = _plus(known.total, value, count)
                known.count += count

    @property
    def sums(self) -> Mapping[str, _Sum]:
        """The running total and count of each value, which a captured step adds to by itself."""
        return self._sums

    def count(self, values: Mapping[str, Value], count: int) -> None:
        """Counts a step whose values were added to the sums already; the arguments are those of `add`."""
        self.steps += 1
        self.samples += count
        for name, value in values.items():
            if not isinstance(value, Mean):
                self._sums[name].count += count

    def _check_names(self, values: Mapping[str, Value]) -> None:
        if self.names is not None and set(values) != set(self.names):
            raise StepError(
                f"the {self.split} step returned the values {', '.join(values)}; before, it returned "
                f"{', '.join(self.names)}. Return the same names at every step."
            )
        self.names = tuple(values) if self.names is None else self.names
        self._known = set(values)

    def state(self) -> dict[str, Any]:
        """Returns all that was added so far, to go on from in another process (`load`)."""
        return {
            "names": self.names,
            "samples": self.samples,
            "steps": self.steps,
            "sums": {name: (known.total, known.count) for name, known in self._sums.items()},
            "metrics": {name: metric_state(metric) for name, metric in self._metrics.items()},
            "updates": {name: [list(one) for one in updates] for name, updates in self._updates.items() if updates},
        }

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Goes on from what `state` returned, on this rank or, added up, on others.

        Args:
            state: what `state` returned.
            device: where this rank's values are.
        """
        self.names = self.names if state["names"] is None else tuple(state["names"])
        self.samples, self.steps = state["samples"], state["steps"]
        for name, (total, count) in state["sums"].items():
            known = self._sums[name] = _Sum()
            known.total, known.count = (p.to(device) if isinstance(p, Tensor) else p for p in (total, count))
        for name, metric in self._metrics.items():
            load_metric_state(metric, state["metrics"][name])
        known = state.get("updates", {})  # a checkpoint of before has none
        self._updates = {name: [(start, dict(by)) for start, by in updates] for name, updates in known.items()}

    def running(self) -> dict[str, float]:
        """Returns this rank's means so far, for a person to watch; waits for the device."""
        self.asked = {
            name: float(known.total) / count for name, known in self._sums.items() if (count := float(known.count)) != 0
        }
        return self.asked

    def reduce(self, world: World, seconds: float, extras: tuple[float, ...] = ()) -> tuple[PassResult, list[float]]:
        """Adds up over the ranks, in one collective (and one more, once a run, to agree on the names).

        Args:
            world: the ranks.
            seconds: how long this rank's pass took.
            extras: further numbers to be summed along.

        Returns:
            the pass's result, and the sums of `extras`; equal on all ranks.

        Raises:
            DataError: no rank had a sample, or a value's count is zero.
            StepError: ranks return different names.
            StopRequested: some rank left the pass before its end; all ranks raise it.
        """
        names = self.names = self._agree(world)
        averaged = [name for name in names if name not in self._metrics]
        own = [self._sums.get(name, _Sum()) for name in averaged]
        pairs = [float(part) for known in own for part in (known.total, known.count)]
        sums = world.all_reduce([*pairs, float(self.left), float(self.samples), seconds, *extras])
        left, samples, total_seconds, *extra_sums = sums[len(pairs) :]
        if left:
            raise StopRequested(f"on request, in the {self.split} pass")
        if samples == 0:
            raise DataError(nothing_yielded(self.split))
        means = {}
        for index, name in enumerate(averaged):
            total, count = sums[2 * index : 2 * index + 2]
            if count == 0:
                raise DataError(
                    f"the {self.split} step has no mean of {name!r} for this epoch: its Mean(total, count) had "
                    "count 0 at every step."
                )
            means[name] = total / count
        computed = compute_all(
            {name: self._metrics[name] for name in names if name in self._metrics}, world, self._updates
        )
        by_name = {name: {name: mean} for name, mean in means.items()} | computed
        means = {column: mean for name in names for column, mean in by_name[name].items()}
        return PassResult(means, round(samples), self.steps, total_seconds / world.size), extra_sums

    def _agree(self, world: World) -> tuple[str, ...]:
        """Returns the names that all ranks use; a rank that had no sample learns them here."""
        if self._agreed and self.names is not None:
            return self.names
        told, left = zip(*world.gather_json([self.names, self.left]), strict=True)
        if any(left):
            raise StopRequested(f"on request, in the {self.split} pass")
        known = next((names for names in told if names is not None), None)
        if known is None:
            raise DataError(nothing_yielded(self.split))
        for rank, names in enumerate(told):
            if names is not None and set(names) != set(known):
                raise StepError(
                    f"the {self.split} step returns {', '.join(known)} on one rank and {', '.join(names)} on rank "
                    f"{rank}. Return the same names on every rank."
                )
        return tuple(known)


def add_up(states: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Joins what the `MeanTable.state` of several ranks returned to that of one.

    Raises:
        UsageError: there is a torchmetrics object among them, whose states only their own ranks can go on from.
    """
    if any(state["metrics"] for state in states):
        raise UsageError(
            "a checkpoint within an epoch has the state of torchmetrics objects for each rank, and the number of "
            "ranks has changed: use as many as before, or a checkpoint from the end of an epoch."
        )
    sums: dict[str, tuple[float, float]] = {}
    for state in states:
        for name, (total, count) in state["sums"].items():
            before = sums.get(name, (0.0, 0))
            sums[name] = (before[0] + float(total), before[1] + float(count))
    names = next((state["names"] for state in states if state["names"] is not None), None)
    samples = sum(state["samples"] for state in states)
    return {"names": names, "samples": samples, "steps": states[0]["steps"], "sums": sums, "metrics": {}}


class _Sum:
    """A running total and count: Python floats, which are float64, or tensors on the values' device."""

    __slots__ = ("count", "total")

    def __init__(self) -> None:
        self.total: Scalar = 0.0
        self.count: Scalar = 0


def _plus(total: Scalar, value: Scalar, times: int) -> Scalar:
    """Adds without holding a graph, and on another device than the CPU without waiting for it."""
    if not isinstance(value, Tensor):
        return total + value * times
    if value.is_cpu:
        return total + value.item() * times
    if isinstance(total, Tensor) and total.device == value.device:
        return total.add_(value.detach(), alpha=times)  # one kernel; in float64 as the total is
    return value.detach().to(_sum_dtype(value)) * times + total


def _sum_dtype(value: Tensor) -> torch.dtype:
    return torch.float32 if value.device.type == "mps" else torch.float64
