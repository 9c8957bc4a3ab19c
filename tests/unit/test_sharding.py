"""Dealing batches to ranks: each sample once, in one order, with weights that add up."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

from dtrain.data.batches import BatchReader
from dtrain.data.loader import ShardedLoader
from dtrain.data.partition import RankBatch, ShardSpec, part_of
from dtrain.errors import DataError, UsageError


class Stream(IterableDataset):
    """The numbers 0 to n - 1, shuffled by the global generator, as many a user's stream is."""

    def __init__(self, n: int, shuffled: bool = False) -> None:
        self.n, self.shuffled = n, shuffled

    def __iter__(self):
        order = torch.randperm(self.n) if self.shuffled else torch.arange(self.n)
        return iter(order.float())


class OddBatches(Sampler):
    """A batch sampler of the user's own, with batches of unequal size in random order."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self):
        order = torch.randperm(self.n).tolist()
        for start, stop in ((0, 1), (1, 4), (4, 6), (6, self.n)):
            yield order[start:stop]

    def __len__(self) -> int:
        return 4


def numbers(n: int) -> TensorDataset:
    return TensorDataset(torch.arange(n).float())


def shares_of(loader, size: int, mode: str, fill: bool, epoch: int = 1, seed: int = 5) -> list[list[RankBatch]]:
    """Each rank's shares; each rank has a global random state of its own, as in a run."""
    found = []
    for rank in range(size):
        torch.manual_seed(1000 + rank)
        made = loader() if callable(loader) else loader
        found.append(list(ShardedLoader(made, ShardSpec(rank, size, mode, fill), seed, "train").iter_batches(epoch)))
    return found


def values(rank_batch: RankBatch) -> list[float]:
    batch = rank_batch.batch[0] if isinstance(rank_batch.batch, (list, tuple)) else rank_batch.batch
    return batch.tolist()


def global_order(ranks: list[list[RankBatch]], mode: str) -> list[list[float]]:
    """The global batches: at each step, the real samples of rank 0, then rank 1, and so on."""
    steps = max(map(len, ranks), default=0)
    return [
        [v for rank in ranks if step < len(rank) and rank[step].count for v in values(rank[step])]
        for step in range(steps)
    ]


@given(
    n=st.integers(0, 60),
    batch=st.integers(1, 17),
    size=st.integers(1, 5),
    mode=st.sampled_from(["per_rank", "global"]),
    drop_last=st.booleans(),
    stream=st.booleans(),
    fill=st.booleans(),
)
def test_each_sample_is_dealt_once_with_weights_that_add_up(n, batch, size, mode, drop_last, stream, fill) -> None:
    data = Stream(n) if stream else numbers(n)
    ranks = shares_of(lambda: DataLoader(data, batch, drop_last=drop_last), size, mode, fill)
    expected = list(range(n // batch * batch if drop_last else n))
    dealt = [v for step in global_order(ranks, mode) for v in step]
    assert dealt == expected, "the same samples in the same order as on one rank"
    if fill:
        assert len({len(rank) for rank in ranks}) == 1, "every rank takes part in every step"
        for step in zip(*ranks, strict=True):
            total = sum(rank_batch.count for rank_batch in step)
            assert all(rank_batch.total == total for rank_batch in step)
            assert sum(rank_batch.scale for rank_batch in step) == pytest.approx(size)
            assert all(rank_batch.scale == pytest.approx(rank_batch.count * size / total) for rank_batch in step)
    else:
        assert all(rank_batch.count > 0 for rank in ranks for rank_batch in rank)
    for rank in ranks:
        for rank_batch in rank:
            assert rank_batch.count in (0, len(values(rank_batch)))


@pytest.mark.parametrize("mode", ["per_rank", "global"])
@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(numbers(23), 4, shuffle=True),
        lambda: DataLoader(numbers(23), 4, sampler=WeightedRandomSampler(torch.ones(23), 23)),
        lambda: DataLoader(numbers(23), 4, sampler=RandomSampler(numbers(23), replacement=True)),
        lambda: DataLoader(numbers(23), batch_sampler=OddBatches(23)),
        lambda: DataLoader(Stream(23, shuffled=True), 4),
        lambda: DataLoader(numbers(23), 4, sampler=DistributedSampler(numbers(23), num_replicas=2, rank=0)),
        lambda: DataLoader(numbers(23), 4, shuffle=True, generator=torch.Generator().manual_seed(9)),
    ],
    ids=["shuffle", "weighted", "replacement", "own-batches", "stream", "distributed", "own-generator"],
)
def test_random_order_is_the_same_on_any_number_of_ranks_and_new_each_epoch(loader, mode) -> None:
    alone = shares_of(loader, 1, mode, True)
    flat = [v for step in global_order(alone, mode) for v in step]
    for size in (2, 3):
        ranks = shares_of(loader, size, mode, True)
        assert [v for step in global_order(ranks, mode) for v in step] == flat
    assert flat != sorted(flat)
    if loader().generator is None:
        later = [v for step in global_order(shares_of(loader, 1, mode, True, epoch=2), mode) for v in step]
        assert later != flat
        other = [v for step in global_order(shares_of(loader, 1, mode, True, seed=6), mode) for v in step]
        assert other != flat


def test_drawing_the_order_leaves_the_users_random_stream_alone() -> None:
    for loader in (DataLoader(numbers(9), batch_sampler=OddBatches(9)), DataLoader(Stream(9, shuffled=True), 2)):
        sharded = ShardedLoader(loader, ShardSpec(0, 1, "per_rank", True), 0, "train")
        torch.manual_seed(3)
        expected = torch.rand(3)
        torch.manual_seed(3)
        iter_batches = sharded.iter_batches(1)
        next(iter_batches)
        seen = torch.rand(3)
        list(iter_batches)
        # A map-style DataLoader draws its workers' base seed from the global stream, as it always does.
        assert isinstance(loader.dataset, TensorDataset) or torch.equal(seen, expected)


def test_workers_and_persistent_workers_keep_the_counts_straight() -> None:
    loader = DataLoader(
        numbers(11), batch_sampler=BatchSampler(range(11), 3, False), num_workers=2, persistent_workers=True
    )
    sharded = ShardedLoader(loader, ShardSpec(1, 2, "per_rank", True), 0, "train")
    for epoch in (1, 2):
        assert [(values(s), s.count, s.total) for s in sharded.iter_batches(epoch)] == [
            ([3.0, 4.0, 5.0], 3, 6),
            ([9.0, 10.0], 2, 5),
        ]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_iteration_within_another_one_takes_nothing_from_it(workers: int) -> None:
    """A batch to look at, as in next(iter(loader)), in the body of a loop over the same loader."""
    data = list(torch.arange(40.0).split(1))
    sharded = ShardedLoader(DataLoader(data, 16, num_workers=workers), ShardSpec(0, 1, "per_rank", True), 0, "train")
    seen = []
    for rank_batch in sharded.iter_batches(1):
        peeked = next(sharded.iter_batches(2, skip=1))
        assert (peeked.count, peeked.start, len(peeked.batch)) == (16, 16, 16)
        seen.append([rank_batch.count, rank_batch.start, rank_batch.batch.flatten().tolist(), rank_batch.indices])
    assert seen == [
        [stop - start, start, [float(number) for number in range(start, stop)], list(range(start, stop))]
        for start, stop in ((0, 16), (16, 32), (32, 40))
    ]


def test_with_persistent_workers_the_outer_iteration_says_that_its_batches_are_gone() -> None:
    """torch has one iterator for such a loader, which begins anew for both."""
    loader = DataLoader(list(range(40)), 16, num_workers=1, persistent_workers=True)
    sharded = ShardedLoader(loader, ShardSpec(0, 1, "per_rank", True), 0, "train")
    outer = sharded.iter_batches(1)
    next(outer)
    assert next(sharded.iter_batches(2)).count == 16
    with pytest.raises(UsageError, match="persistent_workers"):
        next(outer)


def test_any_iterable_of_batches_is_a_loader() -> None:
    batches = [{"x": torch.ones(2, 3), "name": ["a", "b"]}, {"x": torch.ones(1, 3), "name": ["c"]}]
    (zero, one) = shares_of(batches, 2, "global", True)
    assert [(s.count, s.total, s.scale) for s in zero] == [(1, 2, 1.0), (1, 1, 2.0)]
    assert [(s.count, s.total, s.scale) for s in one] == [(1, 2, 1.0), (0, 1, 0.0)]
    assert one[0].batch["name"] == ["b"]


def test_nested_batches_are_counted_and_cut() -> None:
    batch = ({"ids": torch.arange(12).reshape(4, 3), "text": list("abcd")}, [torch.arange(4), 7])
    reader = BatchReader()
    assert reader.size_of(batch) == 4
    part = reader.cut(batch, 1, 3)
    assert part[0]["ids"].tolist() == [[3, 4, 5], [6, 7, 8]]
    assert part[0]["text"] == ["b", "c"]
    assert part[1][0].tolist() == [1, 2]
    assert part[1][1] == 7
    joined = reader.join([reader.cut(batch, 0, 1), reader.cut(batch, 1, 4)])
    assert joined[0]["ids"].tolist() == batch[0]["ids"].tolist()
    assert joined[0]["text"] == list("abcd")
    assert joined[1][0].tolist() == [0, 1, 2, 3]


def test_a_batch_without_anything_to_count_is_refused() -> None:
    with pytest.raises(DataError, match="holds no tensor"):
        BatchReader().size_of({"text": "abc"})


@given(total=st.integers(0, 200), size=st.integers(1, 20))
def test_parts_are_contiguous_and_as_equal_as_can_be(total: int, size: int) -> None:
    parts = [part_of(total, rank, size) for rank in range(size)]
    assert parts[0][0] == 0
    assert parts[-1][1] == total
    assert all(before[1] == after[0] for before, after in itertools.pairwise(parts))
    lengths = [stop - start for start, stop in parts]
    assert max(lengths) - min(lengths) <= 1


class Permuting(Sampler):
    """An order by the epoch that it is told, and by a stream and a state of its own."""

    def __init__(self) -> None:
        self.epoch, self.passes, self.rng = 0, 0, np.random.default_rng(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        return {"passes": self.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.passes = state["passes"]

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter([self.epoch, self.passes, *self.rng.permutation(10).tolist()])

    def __len__(self) -> int:
        return 12


def test_the_same_batches_in_each_epoch_whatever_draws_their_order() -> None:
    data = TensorDataset(torch.arange(20))
    seeded: dict[str, Any] = {"shuffle": True, "generator": torch.Generator().manual_seed(1)}
    for how in (seeded, {"sampler": Permuting()}):
        loader = DataLoader(data, 4, **how)
        sharded = ShardedLoader(loader, ShardSpec(0, 1, "global", fill=True, limit=2), 1, "train", same_order=True)
        epochs = [[rank_batch.batch[0].tolist() for rank_batch in sharded.iter_batches(epoch)] for epoch in (1, 2, 3)]
        again = ShardedLoader(loader, ShardSpec(0, 1, "global", fill=True, limit=2), 1, "train", same_order=True)
        again.sources.load(sharded.sources.after_epoch())  # as a run that is resumed after the third
        epochs.append([rank_batch.batch[0].tolist() for rank_batch in again.iter_batches(4)])
        assert epochs == epochs[:1] * 4
