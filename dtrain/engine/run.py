"""A run as the user's hooks see it; see `dtrain.engine.hooks`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dtrain.engine.loop import Engine
from dtrain.errors import UsageError
from dtrain.rundir.columns import NO_METRICS, OWN

if TYPE_CHECKING:
    import pandas as pd
    from torch.optim import Optimizer


class MediaSink(Protocol):
    """Where a run keeps what is no column of its history; on rank 0."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Takes numbers of this moment."""

    def add(self, kind: str, name: str, content: Any, *, epoch: int, step: int) -> None:
        """Takes an "image", a "histogram", a "text" or a "file"."""


@dataclass
class RunState:
    """What a run's hooks share with who calls them.

    Attributes:
        folder: the run's; None where it has none.
        media: keeps images and the like; None for nobody, as on ranks other than 0.
        reason: why this rank asks for an end; None where it does not.
    """

    folder: Path | None = None
    media: MediaSink | None = None
    reason: str | None = None


class Run:
    """A run, for its hooks: where it is, and what can be asked of it. All of it may be used on every rank.

    Args:
        engine: what trains.
        state: what is known of it besides.
    """

    def __init__(self, engine: Engine, state: RunState) -> None:
        self._engine, self._state = engine, state

    @property
    def epoch(self) -> int:
        """The present epoch, 1 or more; 0 before the first."""
        return self._engine.place.epoch

    @property
    def epochs(self) -> int:
        """How many epochs the run is to have."""
        return self._engine.epochs

    @property
    def step(self) -> int:
        """Optimizer steps since the run began, also before it was resumed."""
        return self._engine.place.updates

    @property
    def rank(self) -> int:
        """This process's global rank."""
        return self._engine.world.rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self._engine.world.size

    @property
    def is_main(self) -> bool:
        """Whether this is global rank 0."""
        return self._engine.world.is_main

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._engine.world.device

    @property
    def folder(self) -> Path | None:
        """The run's folder, the same on all ranks; None where it has none, as in `train_model`."""
        return self._state.folder

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer; None before the first step of one that only the train step knows."""
        return self._engine.task.optimizer

    @property
    def history(self) -> pd.DataFrame:
        """The rows so far, a row an epoch; the same on all ranks."""
        return self._engine.history.dataframe()

    def stop(self, reason: str = "") -> None:
        """Ends training after the present epoch, whose row and checkpoint are complete. May be called on any rank.

        Args:
            reason: in words, for the log.
        """
        self._state.reason = self._state.reason or reason or "run.stop() was called"

    def status(self, text: str) -> None:
        """Shows a line below the progress bar, until the next one; where there is no bar, after the step's values.

        Args:
            text: the line; "" for none.
        """
        self._engine.facts.status[:] = [" ".join(str(text).split())] if text else []

    def log(self, values: Mapping[str, float]) -> None:
        """Sends numbers of this moment to the trackers, with the number of optimizer steps; from rank 0.

        Of each name the last value within `track.every_seconds` is sent, and the last one of an epoch and of the run.

        Args:
            values: name -> number.

        Raises:
            UsageError: a name is that of a column of dtrain's own, such as "epoch".
        """
        for name in map(str, values):
            if name in NO_METRICS or name.startswith(OWN):
                raise UsageError(
                    f"run.log got a value named {name!r}, which is a name of dtrain's own: trackers could not tell it "
                    f'from the epoch\'s. Log it under another one, such as "my/{name.removeprefix(OWN)}".'
                )
        if self._state.media is not None:
            self._state.media.log({str(name): float(value) for name, value in values.items()}, self.step)

    def image(self, name: str, image: Any) -> None:
        """Keeps an image in the run's folder, and has TensorBoard show it, where it is on; from rank 0.

        Args:
            name: what it shows; images of one name make a series over epochs.
            image: a matplotlib figure, a PIL image, or an array or tensor of shape (height, width),
                (height, width, 3 or 4) or (1, 3 or 4, height, width): integers from 0 to 255, or floats from 0 to 1.

        Raises:
            UsageError: it is none of these.
        """
        self._add("image", name, image)

    def histogram(self, name: str, values: Any) -> None:
        """Keeps the distribution of numbers in the same way.

        Args:
            name: what they are.
            values: an array or a tensor of any shape.

        Raises:
            UsageError: there is no finite number in it.
        """
        self._add("histogram", name, values)

    def text(self, name: str, text: str) -> None:
        """Keeps a text in the same way.

        Args:
            name: what it is.
            text: of any length, on any number of lines.
        """
        self._add("text", name, text)

    def file(self, path: str | Path, name: str | None = None) -> None:
        """Keeps a copy of a file in the same way.

        Args:
            path: the file.
            name: what it is; by default its own name.

        Raises:
            UsageError: there is no such file.
        """
        self._add("file", name or Path(path).name, Path(path))

    def _add(self, kind: str, name: str, content: Any) -> None:
        if self._state.media is not None:
            self._state.media.add(kind, name, content, epoch=self.epoch, step=self.step)
