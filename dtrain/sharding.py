"""Deals one loader's batches out to the ranks: each sample once, none padded, none dropped.

Two ways to read the loader's batch size:

- `per_rank`: it is each rank's. The ranks take the loader's batches in turn; N consecutive ones make a global batch.
- `global`: it is the whole world's. Each of the loader's batches is cut into N parts, as equal as can be.

The batches come in the same order on any number of ranks: the order depends on the seed and the epoch alone.

In a training pass every rank must take part in every step, since the gradients are averaged over all. A rank that
the last, ragged global batch leaves without a sample gets a *filler*: a batch of another rank, with weight 0.
A validation pass has no fillers; there, ranks may take different numbers of steps.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from dtrain.errors import DataError, UsageError
from dtrain.seeding import CommonRandomness, derive

BatchMode = Literal["per_rank", "global"]
T = TypeVar("T")

_SEEDABLE = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_PLAIN = (BatchSampler, SequentialSampler)


@dataclass(frozen=True)
class Dealing:
    """How batches are dealt to one rank.

    Attributes:
        rank: whose part.
        size: number of ranks.
        mode: whose batch size the loader's is.
        fill: whether a rank without a sample gets a filler (training), or no step (validation).
        group: how many of the rank's batches make one optimizer step; the epoch's last group may have fewer.
    """

    rank: int
    size: int
    mode: BatchMode
    fill: bool
    group: int = 1


@dataclass(frozen=True)
class Share:
    """One rank's part of one global batch.

    Attributes:
        batch: what the step gets (or, inside this module, the indices of its samples).
        count: its real samples; 0 for a filler.
        total: real samples of all ranks in this global batch.
        scale: what the gradient of this rank's mean loss is multiplied by, so that the average over the ranks
            is the gradient of the mean over all samples: count * size / total; with the total of the whole group
            where several batches make one optimizer step.
        first: whether it is the first one of its optimizer step.
        last: whether the optimizer steps after it.
    """

    batch: Any
    count: int
    total: int
    scale: float
    first: bool = True
    last: bool = True


def deal(
    batches: Iterable[T], how: Dealing, size_of: Callable[[T], int], cut: Callable[[T, int, int], T]
) -> Iterator[Share]:
    """Deals batches to one rank.

    Args:
        batches: the loader's batches, the same on every rank.
        how: rank, size and mode.
        size_of: number of samples of a batch.
        cut: (batch, start, stop) -> the part of a batch.

    Yields:
        the rank's share of each global batch, in order.
    """
    if how.size == 1:
        dealt: Iterator[Share] = (Share(batch, n, n, 1.0) for batch in batches if (n := size_of(batch)))
    elif how.mode == "global":
        dealt = _cut_each(batches, how, size_of, cut)
    else:
        dealt = _take_turns(batches, how, size_of)
    return dealt if how.group == 1 else _in_groups(dealt, how)


def _in_groups(shares: Iterator[Share], how: Dealing) -> Iterator[Share]:
    """Puts shares into groups, one optimizer step each, and weights them by the samples of their group."""
    while group := list(islice(shares, how.group)):
        total = sum(share.total for share in group)
        for number, share in enumerate(group):
            scale = share.count * how.size / total
            yield replace(share, scale=scale, first=number == 0, last=number == len(group) - 1)


def _take_turns(batches: Iterable[T], how: Dealing, size_of: Callable[[T], int]) -> Iterator[Share]:
    first: T | None = None
    mine: T | None = None
    counts: list[int] = []
    for batch in batches:
        turn = len(counts)
        counts.append(size_of(batch))
        first = batch if turn == 0 else first
        mine = batch if turn == how.rank else mine
        if len(counts) == how.size:
            yield from _share(mine, counts[how.rank], first, sum(counts), how)
            first, mine, counts = None, None, []
    if counts:
        count = counts[how.rank] if how.rank < len(counts) else 0
        yield from _share(mine, count, first, sum(counts), how)


def _cut_each(
    batches: Iterable[T], how: Dealing, size_of: Callable[[T], int], cut: Callable[[T, int, int], T]
) -> Iterator[Share]:
    for batch in batches:
        total = size_of(batch)
        start, stop = part_of(total, how.rank, how.size)
        mine = cut(batch, start, stop) if stop > start else None
        filler = cut(batch, *part_of(total, 0, how.size)) if mine is None else None
        yield from _share(mine, stop - start, filler, total, how)


def _share(mine: T | None, count: int, filler: T | None, total: int, how: Dealing) -> Iterator[Share]:
    if total == 0:
        return
    if count > 0:
        yield Share(mine, count, total, count * how.size / total)
    elif how.fill:
        yield Share(filler, 0, total, 0.0)


def part_of(total: int, rank: int, size: int) -> tuple[int, int]:
    """Returns start and stop of a rank's part of `total` samples; the first ranks get one more."""
    base, more = divmod(total, size)
    start = rank * base + min(rank, more)
    return start, start + base + (rank < more)


class ShardedLoader:
    """One rank's view of a loader.

    Args:
        loader: a DataLoader, or any iterable of batches that starts anew each epoch.
        how: rank, size and mode.
        seed: the run's seed; the order is derived from it and the epoch.
        split: "train" or "valid".

    Raises:
        UsageError: the loader was already sharded by another library.
    """

    def __init__(self, loader: Any, how: Dealing, seed: int, split: str) -> None:
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
        self._indexed = _IndexedBatches(loader, how, split) if _has_indices(loader) else None

    def steps(self) -> int | None:
        """Returns the number of steps of a pass, None where the loader cannot tell."""
        try:
            batches = len(self.loader)
        except TypeError:
            return None
        return batches if self._how.mode == "global" else -(-batches // self._how.size)

    @property
    def fingerprint(self) -> float:
        """A number that stands for the order of this epoch's first samples; 0 where it is not known."""
        return 0.0 if self._indexed is None else self._indexed.fingerprint

    def shares(self, epoch: int) -> Iterator[Share]:
        """Iterates over the rank's shares of one epoch; epochs count from 1."""
        if epoch > 1 and isinstance(self.loader, Iterator):
            raise UsageError(
                f"the {self._split} loader is a {type(self.loader).__name__} that is used up after one epoch. "
                "Give a DataLoader, or an object whose __iter__ starts anew."
            )
        seed = derive(self._seed, "order", self._split, epoch)
        if self._indexed is not None:
            return self._indexed.shares(seed, epoch)
        common = CommonRandomness(seed)
        _set_epoch(self.loader, epoch)
        _set_epoch(getattr(self.loader, "dataset", None), epoch)
        return deal(_under(common, self.loader), self._how, count_samples, cut_batch)


class _IndexedBatches:
    """A map-style DataLoader: the indices are dealt out, so that each rank fetches its own samples alone."""

    def __init__(self, loader: DataLoader[Any], how: Dealing, split: str) -> None:
        self._how = how
        self._batches = _without_distributed(loader)
        self._dealt: deque[Share] = deque()
        self._seed = 0
        self.fingerprint = 0.0
        self._loader = _rebuilt(loader, self)

    def __iter__(self) -> Iterator[list[Any]]:
        """Yields this rank's index lists; the DataLoader calls this as its batch sampler."""
        self._dealt.clear()
        source = self._batches
        if not _reseed(source, self._seed):
            source = _under(CommonRandomness(self._seed), source)
        for share in deal(self._noted(source), self._how, len, _cut_list):
            self._dealt.append(share)
            yield share.batch

    def _noted(self, batches: Iterable[list[Any]]) -> Iterator[list[Any]]:
        """Takes a fingerprint of the first batch on its way."""
        for number, batch in enumerate(batches):
            if number == 0:
                self.fingerprint = float(zlib.crc32(repr(batch).encode()))
            yield batch

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def shares(self, seed: int, epoch: int) -> Iterator[Share]:
        self._seed = seed
        _set_epoch(self._batches, epoch)
        _set_epoch(getattr(self._batches, "sampler", None), epoch)
        _set_epoch(self._loader.dataset, epoch)
        for batch in self._loader:
            yield replace(self._dealt.popleft(), batch=batch)


def _cut_list(indices: list[Any], start: int, stop: int) -> list[Any]:
    return indices[start:stop]


def _has_indices(loader: Any) -> bool:
    """Whether a loader draws index batches from a batch sampler and iterates in DataLoader's own way."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )


def _rebuilt(loader: DataLoader[Any], batch_sampler: Any) -> DataLoader[Any]:
    """The same DataLoader with another batch sampler."""
    workers: dict[str, Any] = {}
    if loader.num_workers > 0:
        workers = {
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers,
            "multiprocessing_context": loader.multiprocessing_context,
            "timeout": loader.timeout,
        }
    return DataLoader(
        loader.dataset,
        batch_sampler=batch_sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
        **workers,
    )


def _without_distributed(loader: DataLoader[Any]) -> Iterable[list[Any]]:
    """The loader's batch sampler; a DistributedSampler in it gives way to the plain one that it stands for."""
    batches: Any = loader.batch_sampler
    sampler = getattr(batches, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return batches  # type: ignore[no-any-return]
    if type(batches) is not BatchSampler:
        raise UsageError(
            f"the loader's {type(batches).__name__} deals to ranks by a DistributedSampler, as dtrain does itself. "
            "Give it a RandomSampler or SequentialSampler."
        )
    data: Any = sampler.dataset
    plain = RandomSampler(data) if sampler.shuffle else SequentialSampler(data)
    return BatchSampler(plain, batches.batch_size, batches.drop_last)


def _reseed(batches: Any, seed: int) -> bool:
    """Seeds torch's own samplers for one epoch, where the user gave no generator.

    Returns:
        whether all randomness of the order is now known to be equal on all ranks.
    """
    sampler = getattr(batches, "sampler", None)
    if type(batches) is not BatchSampler or type(sampler) not in (*_SEEDABLE, *_PLAIN):
        return False
    if type(sampler) in _SEEDABLE:
        generator = sampler.generator  # type: ignore[union-attr]
        if generator is None or getattr(generator, "of_dtrain", False):
            generator = sampler.generator = _Generator()  # type: ignore[union-attr]
            generator.manual_seed(seed)
    return True


class _Generator(torch.Generator):
    """A generator that dtrain put into a user's sampler, and may replace each epoch."""

    of_dtrain = True


def _set_epoch(source: Any, epoch: int) -> None:
    """Tells samplers and datasets that know epochs (they count from 0) which one it is."""
    if hasattr(source, "set_epoch"):
        source.set_epoch(epoch - 1)


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


def count_samples(batch: Any) -> int:
    """Returns the number of samples of a batch: the first dimension of its first tensor or array.

    Raises:
        DataError: there is nothing in the batch that could be counted.
    """
    found = _first_length(batch)
    if found is None:
        raise DataError(
            f"cannot count the samples of a batch of type {type(batch).__name__}: it holds no tensor or array. "
            "Use a DataLoader with a batch size over a map-style dataset, or put a tensor into the batch."
        )
    return found


def _first_length(batch: Any) -> int | None:
    shape = getattr(batch, "shape", None)
    if shape is not None and len(shape) > 0:
        return int(shape[0])
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (tuple, list)):
        return next((n for part in batch if (n := _first_length(part)) is not None), None)
    return None


def cut_batch(batch: Any, start: int, stop: int) -> Any:
    """Cuts samples start to stop out of a nested batch; what has no such length is kept whole."""
    return _cut(batch, start, stop, count_samples(batch))


def _cut(part: Any, start: int, stop: int, total: int) -> Any:
    shape = getattr(part, "shape", None)
    if isinstance(part, Tensor) or shape is not None:
        return part[start:stop] if shape is not None and len(shape) > 0 and shape[0] == total else part
    if isinstance(part, Mapping):
        return {key: _cut(value, start, stop, total) for key, value in part.items()}
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*(_cut(value, start, stop, total) for value in part))
    if isinstance(part, (tuple, list)):
        holds_samples = len(part) == total and _first_length(part) is None
        return part[start:stop] if holds_samples else type(part)(_cut(v, start, stop, total) for v in part)
    return part
