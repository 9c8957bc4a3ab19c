"""One rank's view of a loader: its own part of each batch, in an order that is the same on any number of ranks.

How batches are dealt out is in `dtrain.dealing`; here is what they are dealt from: a map-style DataLoader, of which
the indices are dealt, so that a rank fetches its own samples alone, or any other iterable of batches.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, default_collate, default_convert

from dtrain.batches import BatchFunctions
from dtrain.dealing import Dealing, Form, Share, deal
from dtrain.errors import UsageError
from dtrain.fetching import RowsOf, row_batches
from dtrain.fingerprints import sample_fingerprints
from dtrain.loaders import OwnGenerator, has_indices, rebuilt, reseed
from dtrain.samplers import without_distributed
from dtrain.seeding import CommonRandomness, derive
from dtrain.sources import Sources
from dtrain.streams import Dropped, Length, Stream, length_of
from dtrain.worker_start import Started, check_workers_find_recipe, has_workers
from dtrain.workers import Seeding, let_workers_go

T = TypeVar("T")


def _nothing() -> None:
    """Does nothing."""


class ShardedLoader:
    """One rank's view of a loader.

    Args:
        loader: a DataLoader, or any iterable of batches that starts anew each epoch.
        how: rank, size and mode.
        seed: the run's seed; the order is derived from it and the epoch.
        split: "train" or "valid".
        fetch_batches: whether whole batches are fetched at once where that gives the same.
        same_order: whether every epoch has the first one's order.
        functions: what the user says of the batches of a loader without indices.
        fixed: whether a batch that is a list is known to be parts; see `dtrain.batches`.

    Raises:
        UsageError: the loader was already sharded by another library.
    """

    def __init__(  # noqa: PLR0913 - keyword-only after what is dealt, and how
        self,
        loader: Any,
        how: Dealing,
        seed: int,
        split: str,
        *,
        fetch_batches: bool = True,
        same_order: bool = False,
        functions: BatchFunctions | None = None,
        fixed: bool = False,
    ) -> None:
        self._same_order = same_order
        if type(loader).__module__.startswith("accelerate."):
            raise UsageError(
                f"the {split} loader was prepared by Accelerate already ({type(loader).__name__}) and would be "
                "sharded twice. Give dtrain your own DataLoader, not the prepared one."
            )
        self.loader = loader
        self._how = how
        self._seed = seed
        self._split = split
        if isinstance(loader, Dataset):
            raise UsageError(
                f"the {split} loader is a dataset ({type(loader).__name__}), which yields single samples. "
                "Wrap it: DataLoader(dataset, batch_size=32)."
            )
        if not hasattr(loader, "__iter__"):
            raise UsageError(
                f"the {split} loader is a {type(loader).__name__}, which cannot be iterated over. Give a DataLoader, "
                "or any iterable of batches."
            )
        self.sources = Sources(loader, same=same_order)
        self._length = Length(split, how.rank)
        self._stream = Stream(loader, how, split, functions, fixed=fixed)
        self._indexed = None
        if has_indices(loader):
            more: dict[str, Any] = {"functions": functions, "fetch_batches": fetch_batches}
            self._indexed = _IndexedBatches(loader, how, self.sources, self._length, split, **more)
        check_workers_find_recipe(loader, split)

    def steps(self) -> int | None:
        """Returns the number of steps of a pass, None where the loader cannot tell."""
        batches = length_of(self.loader if self._indexed is None else self._indexed)
        if batches is None:
            return None
        batches = batches if self._how.limit is None else min(batches, self._how.limit)
        return batches if self._how.mode == "global" else -(-batches // self._how.size)

    def steps_of_epochs(self, epochs: int) -> list[int] | None:
        """Returns the steps of each epoch's pass, which `set_epoch` may change; None where the loader cannot tell."""
        found = self.sources.over_epochs(epochs, self.steps)
        return [steps for steps in found if steps is not None] if None not in found else None

    @property
    def fingerprint(self) -> float:
        """A number that stands for the order of this epoch's first samples; 0 where it is not known."""
        return self._stream.fingerprint if self._indexed is None else self._indexed.fingerprint

    def rows(self, share: Share) -> list[int]:
        """Returns a fingerprint of each real sample of a share; of its index where it is not known what a sample is."""
        known = sample_fingerprints(self._stream.reader, share.batch, share.count) if share.count else []
        indices = share.indices.tolist() if isinstance(share.indices, torch.Tensor) else share.indices
        return known or [zlib.crc32(repr(index).encode()) for index in indices or () if share.count]

    def shares(self, epoch: int, skip: int = 0, ready: Callable[[], None] = _nothing) -> Iterator[Share]:
        """Iterates over the rank's shares of one epoch.

        Args:
            epoch: counts from 1.
            skip: so many of the first ones are left out. A map-style loader deals their indices and reads no sample
                of them; any other is read up to there.
            ready: called when the iteration has begun, and drawn what it draws, before the first share is fetched.
        """
        self.sources.begin(epoch)
        epoch = 1 if self._same_order else epoch
        seed = derive(self._seed, "order", self._split, epoch)
        if self._indexed is not None:
            if skip and self.sources.replays:
                self.sources.rewind()
                return _after(self._indexed.shares(seed, epoch, 0, _nothing), skip, ready)
            return self._indexed.shares(seed, epoch, skip, ready)
        let_workers_go(self._stream.loader)
        source: Iterable[Any] = self._stream.loader
        source = Started(source) if has_workers(source) else source  # type: ignore[arg-type]
        source = self.sources.restarting(source)
        if not isinstance(source, (list, tuple)):  # a list of batches draws nothing at random
            source = _under(CommonRandomness(seed), source)
        source = self._length.checked(source, self.loader)
        return _after(self._stream.plain(deal(self._stream.noted(source), self._how, self._stream.form)), skip, ready)

    def generators(self) -> list[torch.Generator]:
        """Returns the random generators that the user gave the loader or its sampler, which go on over epochs."""
        batches = getattr(self.loader, "batch_sampler", None)
        holders = (self.loader, getattr(self.loader, "sampler", None), batches, getattr(batches, "sampler", None))
        found = [getattr(holder, "generator", None) for holder in holders]
        users = [g for g in found if isinstance(g, torch.Generator) and not getattr(g, "of_dtrain", False)]
        return list({id(generator): generator for generator in users}.values())


class _IndexedBatches:
    """A map-style DataLoader: the indices are dealt out, so that each rank fetches its own samples alone."""

    def __init__(  # noqa: PLR0913 - what a ShardedLoader has
        self,
        loader: DataLoader[Any],
        how: Dealing,
        sources: Sources,
        length: Length,
        split: str,
        *,
        functions: BatchFunctions | None,
        fetch_batches: bool,
    ) -> None:
        self._how = how
        self._sources = sources
        self._batches = without_distributed(loader, split, how.rank)
        self._length = length
        size = None if functions is None else functions.batch_size
        own = size is not None or loader.collate_fn not in (default_collate, default_convert)
        self._dropped = Dropped(split, how.rank, size) if own else None
        self._begun = _Iteration(0)
        self._started: int | None = None  # in which epoch workers that live on were
        self.fingerprint = 0.0
        self._loader = rebuilt(loader, self, fetch_batches=fetch_batches)
        # Whole batches that are not made elsewhere need nothing of what else a DataLoader does at each of them.
        here = loader.num_workers == 0 and not loader.pin_memory
        self._rows = self._loader.dataset if here and isinstance(self._loader.dataset, RowsOf) else None

    def __iter__(self) -> Iterator[Any]:
        """Iterates over the indices of this rank's batches; the DataLoader calls this as its batch sampler."""
        return self._indices(self._begun)

    def _indices(self, of: _Iteration) -> Iterator[Any]:
        for number, share in enumerate(islice(self._index_shares(of.seed), of.skip, None), of.skip):
            of.dealt.append(share)
            told = of.epoch, self._started
            yield share.batch if of.workers_seed is None else Seeding(share.batch, of.workers_seed, number, *told)

    def _index_shares(self, seed: int) -> Iterator[Share]:
        source, form = self._batches, _INDICES
        if not reseed(source, seed):
            source = _under(CommonRandomness(seed), self._sources.restarting(source))
        elif self._rows is not None:
            source, form = row_batches(source, self._rows), _ROWS
        self.fingerprint = 0.0
        return deal(self._noted(self._length.checked(source, self._batches)), self._how, form)

    def _noted(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Takes a fingerprint of the first batch on its way."""
        for number, batch in enumerate(batches):
            if number == 0:
                indices = batch.tolist() if isinstance(batch, torch.Tensor) else batch
                self.fingerprint = 1.0 + zlib.crc32(repr(indices).encode())
            yield batch

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def shares(self, seed: int, epoch: int, skip: int, ready: Callable[[], None]) -> Iterator[Share]:
        workers_seed = derive(seed, "workers", self._how.rank) if self._loader.num_workers > 0 else None
        if self._loader.persistent_workers and self._loader._iterator is None:
            self._started = epoch
        own = self._begun = _Iteration(seed, skip, workers_seed, epoch if self._loader.persistent_workers else None)
        if isinstance(self._loader.generator, OwnGenerator):
            self._loader.generator.manual_seed(derive(seed, "base", self._how.rank))
        batches = iter(self._loader)  # draws from the random state, also where it is not used
        ready()
        if self._rows is None:
            for batch in batches:
                share = own.dealt.popleft()
                share.indices, share.batch = share.batch, batch
                if self._dropped is not None:
                    self._dropped.look(share)
                yield share
                self._refuse_mixture(own)
            return
        for share in islice(self._index_shares(seed), skip, None):
            share.indices = share.batch
            share.batch = self._rows.__getitems__(share.batch)
            yield share

    def _refuse_mixture(self, own: _Iteration) -> None:
        if self._loader.persistent_workers and self._begun is not own:
            raise UsageError(
                "a loop over a loader goes on after another one over the same loader began, such as next(iter(loader)) "
                "in its body. With persistent_workers=True both would get the batches of the second. Look at a batch "
                "before the loop, or make the DataLoader without persistent_workers."
            )


@dataclass(slots=True)
class _Iteration:
    """One of a DataLoader's iterations, of which several may be open at once.

    Attributes:
        seed: of its order.
        skip: so many of the first shares are left out.
        workers_seed: of its batches in workers, None where there are none.
        epoch: that workers are told of, None where they are started in it.
        dealt: shares of which the indices were asked for and the batches did not come yet.
    """

    seed: int
    skip: int = 0
    workers_seed: int | None = None
    epoch: int | None = None
    dealt: deque[Share] = field(default_factory=deque)


def _after(shares: Iterator[Share], skip: int, ready: Callable[[], None]) -> Iterator[Share]:
    """Reads the first shares and drops them."""
    next(islice(shares, skip, skip), None)
    ready()
    yield from shares


def _cut(indices: Any, start: int, stop: int) -> Any:
    return indices[start:stop]


def _join_rows(parts: list[Any]) -> Any:
    return torch.cat(parts) if isinstance(parts[0], torch.Tensor) else _join_lists(parts)


def _join_lists(lists: list[list[Any]]) -> list[Any]:
    return [index for indices in lists for index in indices]


_INDICES: Form[list[Any]] = Form(len, _cut, _join_lists)
_ROWS: Form[Any] = Form(len, _cut, _join_rows)


def _under(common: CommonRandomness, source: Iterable[T]) -> Iterator[T]:
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
