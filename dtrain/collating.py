"""Counts the samples of a stream's batches where they are known: where they are put together.

A DataLoader over an IterableDataset hands its `collate_fn` a list of samples. How many these are cannot always be read
from the batch that comes of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, default_collate


@dataclass(frozen=True, slots=True)
class Collated:
    """A batch, with the number of samples that it was made of."""

    batch: Any
    count: int

    def pin_memory(self) -> Collated:
        """Returns it in pinned memory; a DataLoader calls this."""
        from torch.utils.data._utils import pin_memory

        return Collated(pin_memory.pin_memory(self.batch), self.count)  # type: ignore[no-untyped-call]


class CountingCollate:
    """A `collate_fn` that also counts.

    Args:
        collate_fn: the user's.
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self._collate_fn = collate_fn

    def __call__(self, samples: list[Any]) -> Collated:
        """Returns the batch of some samples, counted before the user's function may change the list."""
        count = len(samples)
        return Collated(self._collate_fn(samples), count)


def counting(loader: Any) -> Any:
    """Returns a copy of a stream's DataLoader that yields `Collated`; any other loader as it is."""
    if not collates(loader):
        return loader
    copied = copy.copy(loader)
    copied._iterator = None  # that of persistent workers is the user's loader's own
    copied.collate_fn = CountingCollate(loader.collate_fn)
    return copied


def collates(loader: Any) -> bool:
    """Whether a loader is a stream's DataLoader that puts its batches together in DataLoader's own way."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and isinstance(loader.dataset, IterableDataset)
        and loader.batch_size is not None
    )


def collates_by_default(loader: Any) -> bool:
    """Whether its batches are torch's own: each tensor has the samples as its first dimension."""
    return collates(loader) and loader.collate_fn is default_collate
