"""One rank's view of several training loaders, whose batches are combined to steps.

A step with a batch of each loader has one loss, and so one weight on each rank. It is the gradient of the whole step
only if a rank has the same share of every loader's batch. Where batches cannot be cut like that into as many parts as
there are ranks, some ranks get a zero-weight padding batch::

    40 and 64 samples on 3 ranks, in 8 units of 5 and 8:    15, 15, 10  and  24, 24, 16
    3 and 8 samples on 2 ranks:                             3, 0        and  8, 0

So that this can be known, the loaders' indices (or batches, of what has no indices) are dealt together, step by step,
and each loader fetches its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from dtrain.data.batches import BatchFunctions
from dtrain.data.combined_deal import Deal, DealInTurn, DealTogether
from dtrain.data.combined_sources import CombinedSources
from dtrain.data.continued import ContinuedLoader
from dtrain.data.loader import ShardedLoader, do_nothing
from dtrain.data.loader_group import LoaderGroup, combined_length, mixes
from dtrain.data.partition import (
    RankBatch,
    ShardSpec,
    in_groups,
)
from dtrain.errors import UsageError

logger = logging.getLogger(__name__)


class CombinedLoader(ShardedLoader):
    """One rank's view of several loaders.

    Args:
        loader: them.
        how: rank, size and mode, for each of them.
        seed: the run's seed; each loader's order is derived from it, its name and the epoch.
        split: "train".
        functions: what the user says of the batches of loaders without indices.
        read: further arguments of `ShardedLoader`, for each of them.

    Attributes:
        children: name -> the rank's view of it.

    Raises:
        UsageError: one of them cannot be combined with others.
    """

    def __init__(  # as ShardedLoader's, which is not called: what it would look at are the loaders
        self,
        loader: LoaderGroup,
        how: ShardSpec,
        seed: int,
        split: str,
        *,
        functions: BatchFunctions | None = None,
        **read: Any,
    ) -> None:
        self.loader, self.combine, self._how = loader, loader.combine, how
        self.varied, self.own, self.prefetch = False, False, True
        self.order_state: dict[int, torch.Tensor] = {}
        self.on_pass: Callable[[int], object] = lambda _: None
        self._split = split
        self._same_order = bool(read.get("same_order"))
        self._told = how.rank > 0
        self.children = {
            name: ShardedLoader(one, how, seed, f"{split}.{name}", functions=functions, **read)
            for name, one in loader.loaders.items()
        }
        for name, child in self.children.items():
            if child.own and how.size > 1:
                raise UsageError(
                    f"the {split} loader {name!r} shards itself by rank, and loaders that do cannot be combined with "
                    "others (train.combine). Mix the streams in the __iter__ of one dataset, and return one loader."
                )
        self.on_device = "; ".join(child.on_device for child in self.children.values() if child.on_device)
        parts = {name: child.sources for name, child in self.children.items()}
        self.sources = CombinedSources(loader, parts, same=self._same_order)

    @property
    def reads_ahead(self) -> bool:
        """False: the loaders' batches are dealt together, step by step."""
        return False

    @property
    def place(self) -> None:
        """None: what was read is read again."""

    def resume_at(self, place: Any) -> None:
        """Does nothing, since there is no `place`."""

    @property
    def indexed(self) -> bool:
        """Whether the indices of all loaders are dealt."""
        return all(child.indexed for child in self.children.values())

    def steps(self) -> int | None:
        """Returns the number of steps of a pass, None where a loader cannot tell its length."""
        return combined_length([child.steps() for child in self.children.values()], self.combine)

    @property
    def fingerprint(self) -> float:
        """A number that stands for the order of this epoch's first samples."""
        return sum(place * child.fingerprint for place, child in enumerate(self.children.values(), start=1))

    def views(self, split: str) -> dict[str, ShardedLoader]:
        """Returns the loaders that it is made of, by what they are called."""
        return {f"{split}.{name}": child for name, child in self.children.items()}

    def generators(self) -> list[torch.Generator]:
        """Returns the random generators that the user gave the loaders or their samplers."""
        found = [generator for child in self.children.values() for generator in child.generators()]
        return list({id(generator): generator for generator in found}.values())

    def rows(self, rank_batch: RankBatch) -> list[int]:
        """Returns a fingerprint of each real sample of a share."""
        return [row for child, part in self._parts(rank_batch) for row in child.rows(part)]

    def index_rows(self, rank_batch: RankBatch) -> list[int]:
        """Returns a fingerprint of the index of each real sample of a share; none where a loader has no indices."""
        found = [child.index_rows(part) for child, part in self._parts(rank_batch)]
        return [row for rows in found for row in rows] if all(found) else []

    def _parts(self, rank_batch: RankBatch) -> list[tuple[ShardedLoader, RankBatch]]:
        parts = rank_batch.parts or {rank_batch.loader: rank_batch}
        return [(self.children[name], part) for name, part in parts.items()]

    def iter_batches(self, epoch: int, skip: int = 0, ready: Callable[[], None] = do_nothing) -> Iterator[RankBatch]:
        """Iterates over the rank's shares of one epoch; the arguments are those of `ShardedLoader.iter_batches`."""
        self.sources.begin(epoch)
        dealt = self._combined(epoch, skip, ready)
        return dealt if self._how.group == 1 else in_groups(dealt, self._how)

    def _combined(self, epoch: int, skip: int, ready: Callable[[], None]) -> Iterator[RankBatch]:
        reads_again = skip > 0 and self.sources.replays
        if reads_again:
            self.sources.rewind()
        what = (self.children, self._how, epoch, 0 if reads_again else skip)
        cycles = self.combine == "max_cycle"
        deal: Deal = (
            DealTogether(*what, cycles=cycles, idle=self._warn_of_idle)
            if mixes(self.loader)
            else DealInTurn(*what, varied=self.varied)
        )
        # All are begun, and have drawn what they draw, before random streams are put back and the first one fetches.
        children = self.children.items()
        opened = {name: child.opened(epoch, deal.column(name), deal.left_out(name)) for name, child in children}
        deal.begin()
        found = deal.combined(opened)
        if reads_again:
            next(islice(found, skip, skip), None)
        ready()
        yield from found

    def _warn_of_idle(self, totals: Sequence[int], parts: int) -> None:
        """Says once, on rank 0, that batches cannot be cut into parts of one ratio for all ranks."""
        if self._told:
            return
        self._told = True
        sizes = " and ".join(str(total) for total in totals)
        logger.warning(
            "train.combine=%s: a step has %s samples of %s, which can be cut in one ratio into %d part%s only, so "
            "of %d ranks %s idle in it, and a rank takes more samples than usual. Use batch sizes with a common factor "
            "of %d or more, and drop_last=True where the last batch is smaller.",
            *(self.combine, sizes, " and ".join(self.children), parts, "s" * (parts > 1), self._how.size),
            *(f"{self._how.size - parts} {'are' if self._how.size - parts > 1 else 'is'}", self._how.size),
        )


class ContinuedCombinedLoader(ContinuedLoader, CombinedLoader):
    """One rank's view of several loaders that go on over the ends of epochs."""


def sharded(loader: Any, how: ShardSpec, seed: int, split: str, **read: Any) -> ShardedLoader:
    """Returns the rank's view of a training loader, or of several; the arguments are those of `ShardedLoader`.

    With those of `ContinuedLoader`, it goes on over the ends of epochs.
    """
    several, goes_on = isinstance(loader, LoaderGroup), "steps" in read
    kinds: tuple[type[ShardedLoader], type[ShardedLoader]] = (
        (CombinedLoader, ContinuedCombinedLoader) if several else (ShardedLoader, ContinuedLoader)
    )
    return kinds[goes_on](loader, how, seed, split, **read)
