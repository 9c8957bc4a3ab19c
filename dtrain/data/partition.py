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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, Generic, Literal, TypeVar

_LEAST_VARIED = 3  # samples of a part that may be one less: BatchNorm cannot train on one alone

RANK_STRIDE = 1 << 40  # where a rank's samples begin, in validation, whose loader has no order over the ranks

BatchMode = Literal["per_rank", "global"]
T = TypeVar("T")


@dataclass(frozen=True)
class ShardSpec:
    """How batches are dealt to one rank.

    Attributes:
        rank: whose part.
        size: number of ranks.
        mode: whose batch size the loader's is.
        fill: whether a rank without a sample gets a filler (training), or no step (validation).
        group: how many of the rank's batches make one optimizer step; the epoch's last group may have fewer.
        limit: only this many of the loader's batches are dealt, None for all.
        merge: how many of the loader's batches are joined to one before they are dealt.
    """

    rank: int
    size: int
    mode: BatchMode
    fill: bool
    group: int = 1
    limit: int | None = None
    merge: int = 1


@dataclass(slots=True)
class RankBatch:
    """One rank's part of one global batch. Not frozen, since one is made and filled at every step.

    Attributes:
        batch: what the step gets (or, inside this module, the indices of its samples).
        count: its real samples; 0 for a filler.
        total: real samples of all ranks in this global batch.
        scale: what the gradient of this rank's mean loss is multiplied by, so that the average over the ranks
            is the gradient of the mean over all samples: count * size / total; with the total of the whole group
            where several batches make one optimizer step.
        first: whether it is the first one of its optimizer step.
        last: whether the optimizer steps after it.
        start: where its first sample is in the loader's order.
        indices: its samples' indices in the dataset, None where the loader has none.
        whole_start: where the first sample of its global batch is in the loader's order.
        rows: the samples in `batch`; a filler's, too.
        counts: the samples of each rank in this global batch; empty where there is one rank.
        varied: whether it is one of a global batch of which the first and the last rank have unequal parts, and each
            rank some, as is asked for in `shard_batches`.
        place: where a rank's own stream is after it; None for other loaders. See `dtrain.data.places`.
        loader: the name of the loader that it comes from, where several take turns; else "".
        parts: name -> the part that each of several loaders has in it; empty where the batch is one loader's.
    """

    batch: Any
    count: int
    total: int
    scale: float
    first: bool = True
    last: bool = True
    start: int = 0
    indices: Any = None
    whole_start: int = 0
    rows: int = 0
    varied: bool = False
    counts: Sequence[int] = ()
    place: Any = None
    loader: str = ""
    parts: Mapping[str, RankBatch] = field(default_factory=dict)

    @property
    def row_counts(self) -> dict[str, int]:
        """The samples in the batch by the name of their loader."""
        return {name: part.rows for name, part in self.parts.items()} or {self.loader: self.rows}


@dataclass(frozen=True)
class BatchOps(Generic[T]):
    """What can be done with a kind of batch: a list of indices, or a nested batch of tensors.

    Attributes:
        size_of: number of samples of a batch.
        cut: (batch, start, stop) -> the part of a batch.
        join: batches -> one batch.
    """

    size_of: Callable[[T], int]
    cut: Callable[[T, int, int], T]
    join: Callable[[list[T]], T]


def shard_batches(
    batches: Iterable[T], how: ShardSpec, form: BatchOps[T], *, varied: bool = False
) -> Iterator[RankBatch]:
    """Deals batches to one rank.

    Args:
        batches: the loader's batches, the same on every rank.
        how: rank, size and mode.
        form: what kind of batches they are.
        varied: whether the first global batch that is cut is cut into unequal parts, also where equal ones can be had,
            so that it shows what depends on their size.

    Yields:
        the rank's share of each global batch, in order.
    """
    if how.limit is not None:
        batches = islice(batches, how.limit)
    if how.merge > 1:
        batches = merged(iter(batches), how.merge, form)
    if how.size == 1:
        dealt = _take_all(batches, form)
    elif how.mode == "global":
        dealt = _cut_each(batches, how, form, varied=varied)
    else:
        dealt = _take_turns(batches, how, form, varied=varied)
    return dealt if how.group == 1 else in_groups(dealt, how)


def merged(batches: Iterator[T], length: int, form: BatchOps[T]) -> Iterator[T]:
    """Joins so many batches to one."""
    while some := list(islice(batches, length)):
        yield form.join(some)


def in_groups(iter_batches: Iterator[RankBatch], how: ShardSpec) -> Iterator[RankBatch]:
    """Puts shares into groups, one optimizer step each, and weights them by the samples of their group."""
    while group := list(islice(iter_batches, how.group)):
        total = sum(rank_batch.total for rank_batch in group)
        for number, rank_batch in enumerate(group):
            scale = rank_batch.count * how.size / total
            yield replace(rank_batch, scale=scale, first=number == 0, last=number == len(group) - 1)


def _take_all(batches: Iterable[T], form: BatchOps[T]) -> Iterator[RankBatch]:
    seen = 0
    for batch in batches:
        if count := form.size_of(batch):
            yield RankBatch(batch, count, count, 1.0, start=seen, whole_start=seen, rows=count)
        seen += count


def _take_turns(
    batches: Iterable[T], how: ShardSpec, form: BatchOps[T], *, varied: bool = False
) -> Iterator[RankBatch]:
    first: T | None = None
    mine: T | None = None
    counts: list[int] = []
    seen = 0
    if varied:
        some = list(islice(batches := iter(batches), how.size))
        sizes = [form.size_of(batch) for batch in some]
        if len(some) == how.size and sizes[0] == sizes[-1] >= _LEAST_VARIED and min(sizes) > 0:
            sizes = [sizes[0] + 1, *sizes[1:-1], sizes[-1] - 1]
            for rank_batch in cut_to(form.join(some), sizes, 0, how, form):
                rank_batch.varied = True
                yield rank_batch
            some, seen = [], sum(sizes)
        batches = chain(some, batches)
    for batch in batches:
        turn = len(counts)
        counts.append(form.size_of(batch))
        first = batch if sum(counts[:-1]) == 0 else first  # the first one with samples
        mine = batch if turn == how.rank else mine
        if len(counts) == how.size:
            yield from rank_share(mine, counts, first, seen, how)
            seen += sum(counts)
            first, mine, counts = None, None, []
    if counts:
        yield from rank_share(mine, counts + [0] * (how.size - len(counts)), first, seen, how)


def _cut_each(batches: Iterable[T], how: ShardSpec, form: BatchOps[T], *, varied: bool) -> Iterator[RankBatch]:
    seen = 0
    for batch in batches:
        total = form.size_of(batch)
        counts = [end - begin for begin, end in (part_of(total, rank, how.size) for rank in range(how.size))]
        if varied and counts[0] == counts[-1] >= _LEAST_VARIED:
            counts[0] += 1
            counts[-1] -= 1
        for rank_batch in cut_to(batch, counts, seen, how, form):
            rank_batch.varied = varied and counts[0] != counts[-1] > 0
            varied = False
            yield rank_batch
        seen += total


def cut_to(batch: T, counts: list[int], seen: int, how: ShardSpec, form: BatchOps[T]) -> Iterator[RankBatch]:
    """Cuts a global batch into parts of so many samples, and yields this rank's."""
    start = sum(counts[: how.rank])
    mine = form.cut(batch, start, start + counts[how.rank]) if counts[how.rank] else None
    filler = form.cut(batch, 0, counts[0]) if mine is None else None
    return rank_share(mine, counts, filler, seen, how)


def rank_share(mine: T | None, counts: list[int], filler: T | None, seen: int, how: ShardSpec) -> Iterator[RankBatch]:
    """Yields a rank's share of a global batch, of which each rank has so many samples.

    The filler is the batch of the first rank that has some.
    """
    total, count = sum(counts), counts[how.rank]
    if total == 0:
        return
    start = seen + sum(counts[: how.rank])
    if count > 0:
        scale = count * how.size / total
        yield RankBatch(mine, count, total, scale, start=start, whole_start=seen, rows=count, counts=counts)
    elif how.fill:
        rows = next(filter(None, counts))
        yield RankBatch(filler, 0, total, 0.0, start=start, whole_start=seen, rows=rows, counts=counts)


def part_of(total: int, rank: int, size: int) -> tuple[int, int]:
    """Returns start and stop of a rank's part of `total` samples; the first ranks get one more."""
    base, more = divmod(total, size)
    start = rank * base + min(rank, more)
    return start, start + base + (rank < more)
