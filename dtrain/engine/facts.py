"""What the engine knows of a pass besides its values: read-only, and read only when somebody wants to show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


def _none() -> None:
    return None


def _zero() -> int:
    return 0


def _no_time() -> float:
    return 0.0


@dataclass(frozen=True)
class RunFacts:
    """What holds for the whole run.

    Attributes:
        epochs: how many there are to be.
        ranks: how many work on it.
        lr: returns the learning rate of now, the first parameter group's; None where no optimizer is known.
        updates: returns the number of optimizer steps since the run began, also before it was resumed.
        status: a line of the user's own, to be shown with the progress; empty for none.
    """

    epochs: int = 1
    ranks: int = 1
    lr: Callable[[], float | None] = _none
    updates: Callable[[], int] = _zero
    status: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PassFacts:
    """What holds for one pass over a split.

    Attributes:
        split: "train", "valid" or "predict".
        epoch: 1 or more.
        steps: steps of the pass on this rank; None where the loader cannot tell.
        skipped: so many of them were done before, in the process that this one goes on from.
        seconds: how long these took.
        samples: returns the number of samples that this rank has done in the pass, the skipped ones included. All
            ranks have done about `run.ranks` times as many. Those of steps in which the net was compiled do not count.
        run: what holds for the whole run.
        aside: returns the seconds since the pass began that were no part of it: validation within it, compilation.
        within: whether it is a validation within a train pass, which goes on afterwards.
        loader: the name of its loader, where there are several; "" for a sole one.
    """

    split: str
    epoch: int
    steps: int | None = None
    skipped: int = 0
    seconds: float = 0.0
    samples: Callable[[], int] = _zero
    run: RunFacts = field(default_factory=RunFacts)
    aside: Callable[[], float] = _no_time
    within: bool = False
    loader: str = ""

    @property
    def title(self) -> str:
        """What the pass is called: its split, with the loader's name where there are several."""
        return f"{self.split} {self.loader}" if self.loader else self.split

    @property
    def epochs(self) -> int:
        """How many epochs the run is to have."""
        return self.run.epochs

    def lr(self) -> float | None:
        """Returns the learning rate of now; None where no optimizer is known."""
        return self.run.lr()

    def updates(self) -> int:
        """Returns the number of optimizer steps since the run began."""
        return self.run.updates()
