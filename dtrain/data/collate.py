"""Notes what is known of a batch only where a DataLoader puts it together.

It hands its `collate_fn` a list of samples, and how many these are cannot always be read from the batch that comes of
them. A batch that comes ready (`batch_size=None`) and is a tuple, which says that it is parts, it makes a list.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset, default_collate, default_convert

from dtrain.data.libraries import iterates_plainly


@dataclass(frozen=True, slots=True)
class Collated:
    """A batch, with what is known of it.

    Attributes:
        batch: the batch.
        count: the number of samples that it was made of; None where it came ready.
        parts: whether it is known to be parts, and no list of samples.
    """

    batch: Any
    count: int | None
    parts: bool = False

    def pin_memory(self) -> Collated:
        """Returns it in pinned memory; a DataLoader calls this."""
        from torch.utils.data._utils import pin_memory

        pinned = pin_memory.pin_memory(self.batch)  # type: ignore[no-untyped-call]
        return Collated(pinned, self.count, self.parts)


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


def converted(batch: Any) -> Collated:
    """Returns a batch that came ready, as torch's own `collate_fn` for such does."""
    made = default_convert(batch)  # type: ignore[no-untyped-call]
    return Collated(made, None, isinstance(batch, tuple))


def noting(loader: Any) -> Any:
    """Returns a copy of a DataLoader that yields `Collated`; a loader of which no more is known as it is."""
    counts = collates(loader)
    if not counts and not _converts(loader):
        return loader
    copied = copy.copy(loader)
    copied._iterator = None  # that of persistent workers is the user's loader's own
    copied.collate_fn = CountingCollate(loader.collate_fn) if counts else converted
    return copied


def collates(loader: Any) -> bool:
    """Whether a loader is a stream's DataLoader that puts its batches together in DataLoader's own way."""
    return iterates_plainly(loader) and isinstance(loader.dataset, IterableDataset) and loader.batch_size is not None


def collates_by_default(loader: Any) -> bool:
    """Whether its batches are torch's own: each tensor has the samples as its first dimension."""
    return collates(loader) and loader.collate_fn is default_collate


def _converts(loader: Any) -> bool:
    return iterates_plainly(loader) and loader.batch_sampler is None and loader.collate_fn is default_convert
