"""Where training begins, how much of the data it takes, and what is done of an epoch."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dtrain.engine.metrics import PassResult
from dtrain.errors import StopRequested
from dtrain.launch.monitor.heartbeat import Heartbeat
from dtrain.launch.signals.exiting import reserve_standard_descriptors

_RECENT = 8  # batches


@dataclass(frozen=True)
class Limits:
    """How much of the data a short run takes.

    Attributes:
        train: number of the training loader's batches, None for all.
        valid: number of the validation loader's batches, None for all.
        merge: how many of a loader's batches are joined to one before they are dealt out.
        same: whether every epoch takes the same training batches.
    """

    train: int | None = None
    valid: int | None = None
    merge: int = 1
    same: bool = False


@dataclass(frozen=True)
class FinishedPass:
    """An epoch's train pass that is done.

    Attributes:
        result: what it came to.
        steps: the rank's shares of it; as many on every rank.
    """

    result: PassResult
    steps: int


@dataclass(frozen=True)
class StartPosition:
    """Where training begins: at the first epoch, or where a checkpoint was saved.

    Attributes:
        epoch: the first one that is not whole.
        skip: the rank's shares of it that are done.
        table: what `MeanTable.state` returned after them, or None.
        seconds: how long they took.
        randomness: puts the random streams to where they were.
        trained: the epoch's train pass, where it is done and only validation is left; None else.
        aside: seconds of the pass besides, as in `PassResult`.
        untimed: samples of rank 0 in them.
    """

    epoch: int = 1
    skip: int = 0
    table: Mapping[str, Any] | None = None
    seconds: float = 0.0
    randomness: Callable[[], None] | None = None
    trained: FinishedPass | None = None
    aside: float = 0.0
    untimed: int = 0


@dataclass
class TrainPosition:
    """Where a run is: what an error message and a watchdog want to know."""

    rank: int
    epoch: int = 0
    split: str = ""
    step: int = 0
    updates: int = 0  # optimizer steps since the run began; the same number on all ranks
    taken: int = 0  # of these, in the last train step
    loader: str = ""  # of several validation loaders, the one that is read
    compared: bool = False  # whether the ranks' first batches were found equal
    heartbeat: Heartbeat | None = None  # where a supervisor reads the same
    # On a GPU, which tells of an error late: (split, step, loader, indices of the samples) of the last batches.
    recent: deque[tuple[str, int, Any, Any]] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def __str__(self) -> str:
        """Words such as "rank 1, epoch 2, train step 7"."""
        split = f"{self.split} {self.loader!r}" if self.loader else self.split
        where = f"{split} step {self.step}" if self.step else split
        return f"rank {self.rank}, epoch {self.epoch}, {where}"

    def passed(self, every: int) -> bool:
        """Whether the last train step came to a multiple of so many optimizer steps, or went past one."""
        return self.updates % every < max(self.taken, 1)

    def enter(self, split: str, epoch: int, loader: str = "") -> None:
        """A pass begins, or files are about to be written."""
        reserve_standard_descriptors()
        self.loader = loader
        self.split, self.epoch, self.step = split, epoch, 0
        if self.heartbeat is not None:
            self.heartbeat.enter(split, epoch)

    def advance(self) -> None:
        """The next step begins."""
        self.step += 1
        if self.heartbeat is not None:
            self.heartbeat.step(self.step)

    def undo_step(self) -> None:
        """There was no such step: the one before was the last."""
        self.step -= 1
        if self.heartbeat is not None:
            self.heartbeat.step(self.step)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """While inside, another pass may run; then the run is where it was. An error is left at its own place."""
        split, epoch, step = self.split, self.epoch, self.step
        stopped = None
        try:
            yield
        except StopRequested as error:
            stopped = error
        self.enter(split, epoch)
        self.step = step
        if self.heartbeat is not None:
            self.heartbeat.step(step)
        if stopped is not None:
            raise stopped
