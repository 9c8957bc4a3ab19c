"""A map-style DataLoader whose indices are dealt out: each rank fetches its own samples alone."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, default_collate, default_convert

from dtrain.data.batches import BatchFunctions
from dtrain.data.dataloaders import OwnGenerator, is_torchs_own, rebuilt, reseed
from dtrain.data.device_data import DeviceRows
from dtrain.data.fetch import PlacedRows, RowsOf, row_batches
from dtrain.data.partition import BatchOps, RankBatch, ShardSpec, shard_batches
from dtrain.data.samplers import without_distributed
from dtrain.data.sources import Sources
from dtrain.data.stream import DroppedSamplesCheck, LengthCheck
from dtrain.data.worker_seeds import Seeding
from dtrain.distributed.seeding import CommonRandomness, derive
from dtrain.errors import UsageError

T = TypeVar("T")


class IndexedBatches:
    """A map-style DataLoader: the indices are dealt out, so that each rank fetches its own samples alone."""

    def __init__(  # noqa: PLR0913 - what a ShardedLoader has
        self,
        loader: DataLoader[Any],
        how: ShardSpec,
        sources: Sources,
        length: LengthCheck,
        split: str,
        *,
        functions: BatchFunctions | None,
        fetch_batches: bool,
        placed: DeviceRows | None = None,
    ) -> None:
        self._how = how
        self._sources = sources
        self._batches = without_distributed(loader, split, how.rank)
        self._length = length
        size = None if functions is None else functions.batch_size
        own = size is not None or loader.collate_fn not in (default_collate, default_convert)
        self._dropped = DroppedSamplesCheck(split, how.rank, size) if own else None
        self._begun = _Iteration(0)
        self._started: int | None = None  # in which epoch workers that live on were
        self.fingerprint = 0.0
        self._loader = rebuilt(loader, self, fetch_batches=fetch_batches)
        # Whole batches that are not made elsewhere need nothing of what else a DataLoader does at each of them.
        here = loader.num_workers == 0 and not (loader.pin_memory and placed is None)
        self._placed = placed
        self._rows = self._loader.dataset if here and isinstance(self._loader.dataset, RowsOf) else None

    @property
    def reads_ahead(self) -> bool:
        """Whether workers fetch its batches, and its order is that of one of torch's own samplers."""
        return self._loader.num_workers > 0 and is_torchs_own(self._batches)

    def __iter__(self) -> Iterator[Any]:
        """Iterates over the indices of this rank's batches; the DataLoader calls this as its batch sampler."""
        return self._indices(self._begun)

    def _indices(self, of: _Iteration) -> Iterator[Any]:
        for place, rank_batch in enumerate(self._index_shares(of)):
            number = place + (of.skip if of.before is None else of.before())
            of.dealt.append(rank_batch)
            told = of.epoch, self._started
            yield (
                rank_batch.batch
                if of.workers_seed is None
                else Seeding(rank_batch.batch, of.workers_seed, number, *told)
            )

    def _index_shares(self, of: _Iteration) -> Iterator[RankBatch]:
        if of.column is not None:
            return of.column
        source, form = self.source(of.seed, placed=of.placed)
        return islice(shard_batches(source, self._how, form, varied=of.varied), of.skip, None)

    def source(self, seed: int, *, placed: bool = False) -> tuple[Iterator[Any], BatchOps[Any]]:
        """Returns the indices of a pass's batches, and what can be done with them.

        Args:
            seed: of their order.
            placed: whether they are to be on the device, too, where its data are.
        """
        source, form = self._batches, _INDICES
        if not reseed(source, seed):
            source = under(CommonRandomness(seed), self._sources.restarting(source))
        elif self._rows is not None:
            device = self._placed.device if placed and self._placed is not None else None
            source, form = row_batches(source, self._rows, device), _ROWS if device is None else _PLACED
        self.fingerprint = 0.0
        return self._noted(self._length.checked(source, self._batches)), form

    def _noted(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Takes a fingerprint of the first batch on its way."""
        for number, batch in enumerate(batches):
            if number == 0:
                first = batch.host if isinstance(batch, PlacedRows) else batch
                indices = first.tolist() if isinstance(first, torch.Tensor) else first
                self.fingerprint = 1.0 + zlib.crc32(repr(indices).encode())
            yield batch

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def iter_batches(
        self, seed: int, epoch: int, skip: int, ready: Callable[[], None], *, varied: bool
    ) -> Iterator[RankBatch]:
        """Iterates over the rank's shares of one epoch; the arguments are those of `ShardedLoader.iter_batches`."""
        own, batches = self._begin(_Iteration(seed, skip, varied=varied), epoch)
        ready()
        yield from self._fetched(own, batches)

    def opened(
        self, seed: int, epoch: int, column: Iterator[RankBatch], before: Callable[[], int]
    ) -> Iterator[RankBatch]:
        """Begins an iteration at once, and returns it, over shares that were dealt elsewhere.

        Args:
            seed, epoch: as for `iter_batches`.
            column: this rank's shares of the indices.
            before: tells how many were left out, once the first one is asked for.
        """
        return self._fetched(*self._begin(_Iteration(seed, column=column, before=before), epoch))

    def _begin(self, own: _Iteration, epoch: int) -> tuple[_Iteration, Iterator[Any]]:
        loader = self._loader
        if loader.num_workers > 0:
            own.workers_seed = derive(own.seed, "workers", self._how.rank)
        if loader.persistent_workers:
            self._started = epoch if loader._iterator is None else self._started
            own.epoch = epoch
        self._begun = own
        if isinstance(loader.generator, OwnGenerator):
            loader.generator.manual_seed(derive(own.seed, "base", self._how.rank))
        return own, iter(loader)  # draws from the random state, also where it is not used

    def _fetched(self, own: _Iteration, batches: Iterator[Any]) -> Iterator[RankBatch]:
        if self._rows is None:
            for batch in batches:
                rank_batch = own.dealt.popleft()
                rank_batch.indices, rank_batch.batch = rank_batch.batch, batch
                if self._dropped is not None:
                    self._dropped.look(rank_batch)
                yield rank_batch
                self._refuse_mixture(own)
            return
        if self._placed is not None and self._placed.begin():
            yield from self._on_device(own, self._placed)
            return
        for rank_batch in self._index_shares(own):
            rank_batch.indices = rank_batch.batch
            rank_batch.batch = self._rows.__getitems__(rank_batch.batch)
            yield rank_batch

    def _on_device(self, own: _Iteration, placed: DeviceRows) -> Iterator[RankBatch]:
        """Yields the shares of a pass whose batches are taken on the device."""
        own.placed = True
        for rank_batch in self._index_shares(own):
            rows = rank_batch.batch
            rank_batch.indices = rows.host if isinstance(rows, PlacedRows) else rows
            rank_batch.batch = placed.fetch(rows)
            yield rank_batch

    def _refuse_mixture(self, own: _Iteration) -> None:
        if self._loader.persistent_workers and self._begun is not own:
            raise UsageError(
                "a loop over a loader goes on after another one over the same loader began, such as next(iter(loader)) "
                "in its body. With persistent_workers=True both would get the batches of the second. Read a batch "
                "before the loop, or disable persistent_workers."
            )


@dataclass(slots=True)
class _Iteration:
    """One of a DataLoader's iterations, of which several may be open at once.

    Attributes:
        seed: of its order.
        skip: so many of the first shares are left out.
        workers_seed: of its batches in workers, None where there are none.
        epoch: that workers are told of, None where they are started in it.
        varied: as for `ShardedLoader`.
        column: this rank's shares, where they are dealt elsewhere.
        before: tells how many of the first ones were left out there.
        dealt: shares of which the indices were asked for and the batches did not come yet.
        placed: whether its batches are taken on the device.
    """

    seed: int
    skip: int = 0
    workers_seed: int | None = None
    epoch: int | None = None
    varied: bool = False
    column: Iterator[RankBatch] | None = None
    before: Callable[[], int] | None = None
    dealt: deque[RankBatch] = field(default_factory=deque)
    placed: bool = False


def _cut(indices: Any, start: int, stop: int) -> Any:
    return indices[start:stop]


def _join_rows(parts: list[Any]) -> Any:
    return torch.cat(parts) if isinstance(parts[0], torch.Tensor) else _join_lists(parts)


def _join_lists(lists: list[list[Any]]) -> list[Any]:
    return [index for indices in lists for index in indices]


_INDICES: BatchOps[list[Any]] = BatchOps(len, _cut, _join_lists)


def _join_placed(parts: list[Any]) -> Any:
    if all(isinstance(part, PlacedRows) for part in parts):
        return PlacedRows(*(torch.cat(side) for side in zip(*parts, strict=True)))
    return _join_rows(parts)


def _rows_in(rows: Any) -> int:
    return len(rows.host) if isinstance(rows, PlacedRows) else len(rows)


def _cut_placed(rows: Any, start: int, stop: int) -> Any:
    return rows.cut(start, stop) if isinstance(rows, PlacedRows) else rows[start:stop]


_ROWS: BatchOps[Any] = BatchOps(len, _cut, _join_rows)
_PLACED: BatchOps[Any] = BatchOps(_rows_in, _cut_placed, _join_placed)


def under(common: CommonRandomness, source: Iterable[T]) -> Iterator[T]:
    """Iterates with the common random state active while the source draws, and only then."""
    end = object()
    with common():
        iterator = iter(source)
    while True:
        with common():
            item: Any = next(iterator, end)
        if item is end:
            return
        yield item
