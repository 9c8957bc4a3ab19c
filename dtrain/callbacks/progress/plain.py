"""Lines in the tutorial's manner, for files, pipes and logs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.facts import PassFacts
from dtrain.launch.terminal.guarded import put
from dtrain.rundir.columns import metrics_of, validated
from dtrain.wording import counted, number

if TYPE_CHECKING:
    from dtrain.engine.metrics import MeanTable


class PlainLines(EngineCallback):
    """One line every `log_step_freq` train steps, one after each validation within an epoch, one after each epoch.

    The means within an epoch are this rank's own so far, and marked so where there are several; those of an epoch are
    exact over all ranks.

    Args:
        log_step_freq: train steps between two lines.
        out: where to, by default the standard output.
        mark: whether lines with the values of one rank of several say so; not where each line does that anyway.
    """

    order = Order.PROGRESS

    def __init__(self, log_step_freq: int, out: TextIO | None = None, *, mark: bool = True) -> None:
        self._freq = log_step_freq
        self._mark = mark
        self._out = out
        self._training = False
        self._whose = ""
        self._status: Sequence[str] = ()

    def on_pass_start(self, facts: PassFacts) -> None:
        """Prints a head line before the train pass."""
        self._training = facts.split == "train"
        self._status = facts.run.status
        self._whose = "rank 0: " if self._mark and facts.run.ranks > 1 else ""
        if self._training:
            of_steps = "" if facts.steps is None else f", {counted(facts.steps, 'step')}"
            self._print(f"epoch {facts.epoch}/{facts.epochs}{of_steps}")

    def on_progress(self, table: MeanTable) -> None:
        """Prints a line at every `log_step_freq`-th train step."""
        if self._training and table.steps % self._freq == 0:
            values = " | ".join((metrics_text(table.running()), *self._status))
            self._print(f"[step = {table.steps}] {self._whose}{values}")

    def on_epoch_end(self, row: Mapping[str, Any]) -> None:
        """Prints the epoch's line."""
        self._print(epoch_line(row))

    def on_validation_end(self, row: Mapping[str, Any]) -> None:
        """Prints the line of a validation within the epoch, whose train pass goes on."""
        self._training = True
        self._print(validation_line(row))

    def _print(self, line: str) -> None:
        say(line, self._out or sys.stdout)


def say(line: str, out: TextIO | None) -> None:
    """Prints a line; see `dtrain.launch.terminal.guarded.put`."""
    put(f"{line}\n", out)


def metrics_text(values: Mapping[str, float], between: str = ", ") -> str:
    """Returns "loss: 0.312, accuracy: 0.901"."""
    return between.join(f"{name}: {number(value)}" for name, value in values.items())


def validation_line(row: Mapping[str, Any]) -> str:
    """Returns the line of a validation within an epoch: its metrics and how long it took."""
    values = metrics_text({name: row[name] for name in validated(row)})
    return f"[validation after {counted(row['step'], 'optimizer step')}] {values}, time: {row['seconds']:.1f}s"


def epoch_line(row: Mapping[str, Any]) -> str:
    """Returns the tutorial's line for an epoch: its metrics and how long it took."""
    parts = [f"{name} = {number(row[name])}" for name in metrics_of(row)]
    return f"EPOCH = {row['epoch']}, {', '.join(parts)}, time = {row['seconds']:.1f}s"
