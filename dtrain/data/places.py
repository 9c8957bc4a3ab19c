"""Where a rank is in a stream of its own, so that a resumed run goes on there and reads nothing again.

Kept is how many batches this rank has read and, where the loader has one, or its dataset in the process that trains
does, the state (`state_dict`, `load_state_dict`) after the last of them: as torchdata's StatefulDataLoader and Hugging
Face's iterables have it. Without a state the batches are read again up to there. An object of the user's may mean
something else by its state; so the first batch that is read from it is compared with the one that came next before,
and where it is another one, the epoch is read from its beginning, as without a state.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from dtrain.data.fingerprints import edge_mark
from dtrain.data.libraries import begins_anew, shuffles_in_memory

END = object()


@dataclass(slots=True)
class Place:
    """Where a rank's stream is between two batches.

    Attributes:
        read: batches of this rank that were read in the epoch.
        seen: samples of all ranks in the global batches so far.
        state: of the loader; None where it has none.
        random: the states of the generators that the loader draws from.
        following: the batch that comes next; END where there is none.
    """

    read: int
    seen: int
    state: Any
    random: Any
    following: Any = END

    def saved(self) -> dict[str, Any]:
        """Returns it as a checkpoint contains it."""
        version, numbers, gauss = self.random[0]
        return {
            "read": self.read,
            "seen": self.seen,
            "state": self.state,
            "python": (version, np.array(numbers, dtype=np.uint32), gauss),
            "numpy": self.random[1],
            "torch": self.random[2],
            "next": mark_of(self.following),
        }


def mark_of(batch: Any) -> int:
    """Returns a number that stands for a batch; 0 where there is none."""
    return 0 if batch is END else edge_mark(batch) or 1


def random_of(saved: Mapping[str, Any]) -> tuple[Any, Any, torch.Tensor]:
    """Returns the generators' states of a saved place."""
    version, numbers, gauss = saved["python"]
    return (version, tuple(numbers.tolist()), gauss), saved["numpy"], saved["torch"]


def keeper_of(loader: Any) -> Any:
    """Returns what knows where a loader is while it is read; None where nothing does."""
    dataset = getattr(loader, "dataset", None)
    if shuffles_in_memory(dataset):
        return None
    if _has_state(loader):
        return loader
    here = isinstance(loader, DataLoader) and loader.num_workers == 0  # workers have copies, which move on elsewhere
    return dataset if here and _has_state(dataset) else None


def state_of(keeper: Any) -> Any:
    """Returns a copy of its state."""
    return None if keeper is None else copy.deepcopy(keeper.state_dict())


def begin_anew(keeper: Any) -> None:
    """Has an object forget the place that was put into it, where that is not known by its state as a pass begins."""
    if begins_anew(keeper):
        keeper.load_state_dict({})


def _has_state(thing: Any) -> bool:
    if isinstance(thing, type) or type(thing).__module__.partition(".")[0] in ("streaming", "litdata"):
        return False  # of these, the state is asked for with arguments
    return all(callable(getattr(thing, name, None)) for name in ("state_dict", "load_state_dict"))
