"""Lines in the tutorial's manner, for files, pipes and logs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from dtrain.columns import metrics_of, validated
from dtrain.progress.facts import PassFacts

if TYPE_CHECKING:
    from dtrain.metrics import MeanTable


class PlainLines:
    """One line every `log_step_freq` train steps, one after each validation within an epoch, one after each epoch.

    The means within an epoch are this rank's own so far, and marked so where there are several; those of an epoch are
    exact over all ranks.

    Args:
        log_step_freq: train steps between two lines.
        out: where to, by default the standard output.
        mark: whether lines with the values of one rank of several say so; not where each line does that anyway.
    """

    def __init__(self, log_step_freq: int, out: TextIO | None = None, *, mark: bool = True) -> None:
        self._freq = log_step_freq
        self._mark = mark
        self._out = out
        self._training = False
        self._whose = ""

    def begin(self, facts: PassFacts) -> None:
        """Prints a head line before the train pass."""
        self._training = facts.split == "train"
        self._whose = "rank 0: " if self._mark and facts.run.ranks > 1 else ""
        if self._training:
            of_steps = "" if facts.steps is None else f", {facts.steps} steps"
            self._print(f"epoch {facts.epoch}/{facts.epochs}{of_steps}")

    def step(self, table: MeanTable) -> None:
        """Prints a line at every `log_step_freq`-th train step."""
        if self._training and table.steps % self._freq == 0:
            self._print(f"[step = {table.steps}] {self._whose}{metrics_text(table.running())}")

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """Prints the epoch's line."""
        self._print(epoch_line(row))

    def validated(self, row: Mapping[str, Any]) -> None:
        """Prints the line of a validation within the epoch, whose train pass goes on."""
        self._training = True
        self._print(validation_line(row))

    def close(self) -> None:
        """Nothing is held open."""

    def _print(self, line: str) -> None:
        say(line, self._out or sys.stdout)


def say(line: str, out: TextIO) -> None:
    """Prints a line in one piece, so that lines of other processes never run into it; what the stream cannot encode
    becomes a question mark.
    """
    encoding = getattr(out, "encoding", None) or "utf-8"
    out.write(line.encode(encoding, errors="replace").decode(encoding) + "\n")
    out.flush()


def metrics_text(values: Mapping[str, float], between: str = ", ") -> str:
    """Returns "loss: 0.312, accuracy: 0.901"."""
    return between.join(f"{name}: {value:.3f}" for name, value in values.items())


def validation_line(row: Mapping[str, Any]) -> str:
    """Returns the line of a validation within an epoch: its metrics and how long it took."""
    values = metrics_text({name: row[name] for name in validated(row)})
    return f"[validation after {row['step']} optimizer steps] {values}, time: {row['seconds']:.1f}s"


def epoch_line(row: Mapping[str, Any]) -> str:
    """Returns the tutorial's line for an epoch: its metrics and how long it took."""
    parts = [f"{name} = {row[name]:.3f}" for name in metrics_of(row)]
    return f"EPOCH = {row['epoch']}, {', '.join(parts)}, time = {row['seconds']:.1f}s"
