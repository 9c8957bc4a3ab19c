"""Batches of loaders without indices: counted where they are put together, dealt, and compared with what was said."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from helpers.batch_forms import IMAGES
from helpers.pages import ROOT, blocks
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    default_collate,
)

from dtrain.data.batches import BatchFunctions, BatchReader
from dtrain.data.loader import ShardedLoader
from dtrain.data.partition import ShardSpec
from dtrain.errors import DataError, UsageError


class Stream(IterableDataset):
    """Samples: an image each, of unequal size; or a sequence."""

    def __init__(self, n: int, said: int | None = None) -> None:
        self.n, self.said = n, said

    def __iter__(self) -> Any:
        return iter([(one, number) for number, one in enumerate(IMAGES[: self.n])])

    def __len__(self) -> int:
        if self.said is None:
            raise TypeError
        return self.said


def transposed(samples: list[Any]) -> Any:
    return tuple(zip(*samples, strict=True))


def time_first(samples: list[Any]) -> Any:
    return torch.stack([torch.full((7,), float(number)) for _, number in samples], 1)


def some_left_out(samples: list[Any]) -> Any:
    return torch.tensor([number for _, number in samples if number != 4])


def shares_of(loader: Any, rank: int = 0, size: int = 1, mode: Any = "global", **more: Any) -> list[Any]:
    return list(ShardedLoader(loader, ShardSpec(rank, size, mode, fill=True), 1, "train", **more).iter_batches(1))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_is_counted_where_its_batches_are_put_together(workers: int) -> None:
    loader = DataLoader(Stream(10), 3, collate_fn=transposed, num_workers=workers)
    assert [rank_batch.count for rank_batch in shares_of(loader)] == [3, 3, 3, 1]
    dealt = [shares_of(loader, rank, 2) for rank in range(2)]
    assert [[rank_batch.batch[1] for rank_batch in rank] for rank in dealt] == [
        [(0, 1), (3, 4), (6, 7), (9,)],
        [(2,), (5,), (8,), (9,)],
    ]
    assert [rank_batch.count for rank_batch in dealt[1]] == [1, 1, 1, 0]
    with pytest.raises(DataError, match="collate_fn was given 3 samples, and made of them what seems to be 2"):
        shares_of(DataLoader(Stream(10), 3, collate_fn=some_left_out))
    assert [rank_batch.count for rank_batch in shares_of(DataLoader(Stream(10), 3, collate_fn=time_first))] == [
        3,
        3,
        3,
        1,
    ]
    with pytest.raises(DataError, match=r"the first dimension of batch \(7, 3\) is not the batch's 3 samples"):
        shares_of(DataLoader(Stream(10), 3, collate_fn=time_first), 0, 2)
    own = BatchFunctions(lambda batch: batch.shape[1], lambda batch, sizes: batch.split(sizes, 1))
    for rank in range(2):
        iter_batches = shares_of(DataLoader(Stream(10), 3, collate_fn=time_first), rank, 2, functions=own)
        assert [rank_batch.batch[0].tolist() for rank_batch in iter_batches] == [
            list(rank_batch.batch[1]) for rank_batch in dealt_by(dealt, rank)
        ]


def dealt_by(dealt: list[list[Any]], rank: int) -> list[Any]:
    return dealt[rank]


class Ready(IterableDataset):
    """Batches of four images each, or of features and labels, of which the first dimensions agree by accident."""

    def __init__(self, form: type) -> None:
        self.form = form

    def __iter__(self) -> Any:
        return iter([self.form(IMAGES[:4]), self.form(IMAGES[4:8])])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_ready_tuple_is_parts_and_a_ready_list_may_be_samples(workers: int) -> None:
    """A DataLoader makes both lists."""
    for batches in (DataLoader(Ready(tuple), None, num_workers=workers), [tuple(IMAGES[:4]), tuple(IMAGES[4:8])]):
        assert [rank_batch.count for rank_batch in shares_of(batches)] == [3, 3]
        assert all(
            type(rank_batch.batch) in (list, tuple) and len(rank_batch.batch) == 4 for rank_batch in shares_of(batches)
        )
    with pytest.raises(DataError, match="Yield a tuple where it is parts"):
        shares_of(DataLoader(Ready(list), None, num_workers=workers))
    assert [rank_batch.count for rank_batch in shares_of(DataLoader(Ready(list), None), fixed=True)] == [3, 3]
    own = BatchFunctions(len)
    assert [rank_batch.count for rank_batch in shares_of(DataLoader(Ready(list), None), functions=own)] == [4, 4]


def test_a_step_may_leave_parts_out() -> None:
    """As in train_step(model, one, other=None)."""
    reader = BatchReader(fixed=True)
    assert [
        reader.size_of(batch) for batch in ([torch.ones(4, 2)] * 2, [torch.ones(3, 2)], (torch.ones(2, 2),) * 2)
    ] == [4, 3, 2]


def test_the_example_of_the_page_is_right() -> None:
    page = ROOT / "docs/steps-and-recipes.md"
    (block,) = (one for one in blocks(page, "python") if "def split_batch" in one.text)
    names: dict[str, Any] = {}
    exec(block.text, names)  # noqa: S102 - the page's own
    batch = torch.arange(14.0).reshape(7, 2, 1), torch.tensor([5, 6])
    own = BatchFunctions(names["batch_size"], names["split_batch"])
    dealt = [shares_of(iter([batch]), rank, 3, functions=own)[0] for rank in range(3)]
    assert [rank_batch.count for rank_batch in dealt] == [1, 1, 0]
    assert [rank_batch.batch[1].tolist() for rank_batch in dealt] == [[5], [6], [5]]
    assert [tuple(rank_batch.batch[0].shape) for rank_batch in dealt] == [(7, 1, 1)] * 3


def test_batches_that_are_all_there_are_looked_at_before_the_first() -> None:
    seen = ShardedLoader(
        [torch.ones(4, 2), (torch.ones(4), torch.ones(3))], ShardSpec(0, 1, "global", True), 1, "train"
    )
    with pytest.raises(DataError, match=r"batch\[0\] \(4,\), batch\[1\] \(3,\)"):
        next(seen.iter_batches(1))


@pytest.mark.parametrize("anew", [False, True])
def test_class_weights_as_long_as_the_batch_are_not_cut(anew: bool) -> None:
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def batches() -> Any:
        for n in range(3):
            yield torch.full((4, 2), float(n)), torch.arange(4), weights.clone() if anew else weights

    class Loader:
        def __iter__(self) -> Any:
            return batches()

    assert [rank_batch.count for rank_batch in shares_of(Loader())] == [4, 4, 4], "of no matter on one rank"
    with pytest.raises(DataError, match=r"batch\[2\] \(4,\) is the same in two batches, as class weights are"):
        shares_of(Loader(), 0, 2)

    def split(batch: Any, sizes: list[int]) -> list[Any]:
        return [(x, y, batch[2]) for x, y in zip(batch[0].split(sizes), batch[1].split(sizes), strict=True)]

    for rank in range(2):
        iter_batches = shares_of(Loader(), rank, 2, functions=BatchFunctions(split_batch=split))
        assert [len(rank_batch.batch[0]) for rank_batch in iter_batches] == [2, 2, 2]
        assert all(
            rank_batch.batch[2] is weights or torch.equal(rank_batch.batch[2], weights) for rank_batch in iter_batches
        )


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize(("size", "mode"), [(1, "global"), (2, "per_rank")])
def test_class_weights_as_long_as_the_batch_do_not_count_where_nothing_is_cut(anew: bool, size: int, mode: str) -> None:
    weights = torch.tensor([0.2, 0.3, 0.5, 1.5])

    def stream() -> Any:
        for start in range(0, 21, 4):
            x = torch.arange(start, min(start + 4, 21)).float()
            yield x[:, None], x + 0.5, weights.clone() if anew else weights

    for rank in range(size):
        iter_batches = shares_of(list(stream()), rank, size, mode)
        assert sum(rank_batch.count for rank_batch in iter_batches) == {(1, 0): 21, (2, 0): 12, (2, 1): 9}[size, rank]
        assert all(torch.equal(rank_batch.batch[2], weights) for rank_batch in iter_batches)
        assert [len(rank_batch.batch[0]) for rank_batch in iter_batches if rank_batch.count] == [
            s.count for s in iter_batches if s.count
        ]


def test_what_repeats_and_is_no_constant_is_cut() -> None:
    """Masks of ones, places in a sequence, labels 0 and 1 in turn."""
    one = {"x": torch.randn(4, 3), "mask": torch.ones(4, 3), "place": torch.arange(3).expand(4, 3), "y": [0.0, 1.0] * 2}
    other = {**one, "x": torch.randn(4, 3), "mask": torch.ones(4, 3), "place": torch.arange(3).repeat(4, 1)}
    one["label"], other["label"] = torch.tensor([0.0, 1.0] * 2), torch.tensor([0.0, 1.0] * 2)
    assert [rank_batch.count for rank_batch in shares_of([one, other], 1, 2)] == [2, 2]


def test_a_stream_that_yields_one_batch_again_and_again_is_refused() -> None:
    class Reusing:
        def __iter__(self) -> Any:
            batch = torch.zeros(4, 2)
            for n in range(3):
                yield batch.fill_(n + 1)

    with pytest.raises(DataError, match="changes a batch after yielding it"):
        shares_of(Reusing(), 0, 2)
    for how in (
        ShardSpec(0, 2, "per_rank", fill=True),
        *(ShardSpec(0, 1, "per_rank", True, group=2 - n, merge=1 + n) for n in (0, 1)),
    ):
        with pytest.raises(DataError, match="changes a batch after yielding it"):
            list(ShardedLoader(Reusing(), how, 1, "train").iter_batches(1))
    assert [
        float(rank_batch.batch.sum())
        for rank_batch in ShardedLoader(Reusing(), ShardSpec(0, 1, "global", True), 1, "train").iter_batches(1)
    ]


def test_a_rank_with_an_empty_batch_gets_a_batch_with_samples_to_take_part() -> None:
    batches = [torch.zeros(0, 2), torch.ones(3, 2), torch.full((2, 2), 2.0), torch.zeros(0, 2)]
    for rank, expected in enumerate(([(0, 3, 3), (2, 2, 2)], [(3, 3, 3), (0, 2, 2)])):
        iter_batches = shares_of(batches, rank, 2, "per_rank")
        assert [(rank_batch.count, rank_batch.rows, len(rank_batch.batch)) for rank_batch in iter_batches] == expected


@pytest.mark.parametrize(
    ("said", "words"), [(2, "length is 2, and it yielded more"), (6, "length is 6, and it yielded 4"), (4, "")]
)
def test_a_length_that_proves_wrong_is_said_once(said: int, words: str, caplog: Any) -> None:
    class Loader:
        def __iter__(self) -> Any:
            return iter([torch.ones(2, 1)] * 4)

        def __len__(self) -> int:
            return said

    for rank, mode in ((0, "per_rank"), (0, "global"), (1, "global")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            how = ShardSpec(rank, 2, mode, fill=True)
            sharded = ShardedLoader(Loader(), how, 1, "train", sharding="dtrain")
            for epoch in (1, 2):
                assert len(list(sharded.iter_batches(epoch))) == (2 if mode == "per_rank" else 4)
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == bool(words and rank == 0)
        assert all(words in one and "schedule" in one for one in told)


def test_a_distributed_sampler_is_replaced_aloud_and_the_steps_are_those_that_come(caplog: Any) -> None:
    data = list(range(50))
    for replicas in (1, 2, 4):
        for drop_last in (False, True):
            sampler = DistributedSampler(data, num_replicas=replicas, rank=0, shuffle=False)
            loader = DataLoader(data, 4, sampler=sampler, drop_last=drop_last)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                for size, mode in ((1, "per_rank"), (2, "per_rank"), (2, "global")):
                    sharded = ShardedLoader(loader, ShardSpec(0, size, mode, fill=True), 1, "train")
                    iter_batches = list(sharded.iter_batches(1))
                    assert sharded.steps() == len(iter_batches)
                    assert sum(rank_batch.total for rank_batch in iter_batches) == (48 if drop_last else 50)
            (told,) = [record.getMessage() for record in caplog.records]
            assert told.startswith(
                f"the train loader's DistributedSampler (num_replicas={replicas}, rank=0) is replaced by a "
                "SequentialSampler over all 50 samples"
            )


def test_samples_that_a_collate_function_leaves_out_are_told(caplog: Any) -> None:
    data = [(torch.ones(2), n) if n % 5 else None for n in range(1, 13)]

    def there(samples: list[Any]) -> Any:
        return default_collate([sample for sample in samples if sample is not None])

    with caplog.at_level(logging.WARNING):
        assert [rank_batch.count for rank_batch in shares_of(DataLoader(data, 3, collate_fn=there))] == [3, 3, 3, 3]
        shares_of(DataLoader([one for one in data if one], 3, collate_fn=there))
        shares_of(DataLoader(IMAGES, 4, collate_fn=list))
    (told,) = [record.getMessage() for record in caplog.records]
    assert "a batch of the train loader has 3 indices and 2 rows; it counts as 3 samples" in told


def test_samplers_of_the_users_own_that_deal_are_refused() -> None:
    class Weighted(DistributedSampler):
        """One that draws in a way of its own."""

    class Batches(BatchSampler):
        """One that makes batches in a way of its own."""

    data = list(range(8))
    for loader, name in (
        (DataLoader(data, 4, sampler=Weighted(data, 1, 0)), "Weighted"),
        (DataLoader(data, batch_sampler=Batches(DistributedSampler(data, 1, 0), 4, False)), "Batches"),
    ):
        with pytest.raises(UsageError, match=f"the train loader's {name} shards by a DistributedSampler"):
            shares_of(loader)


def test_batches_that_a_sampler_gives_as_lists_of_indices_are_counted_by_them() -> None:
    class Data:
        def __len__(self) -> int:
            return 10

        def __getitem__(self, indices: list[int]) -> Any:
            return [IMAGES[index] for index in indices]

    loader = DataLoader(Data(), batch_size=None, sampler=BatchSampler(SequentialSampler(range(10)), 4, False))
    assert [rank_batch.count for rank_batch in shares_of(loader)] == [4, 4, 2]
    for rank in range(3):
        iter_batches = shares_of(loader, rank, 3)
        assert [rank_batch.count for rank_batch in iter_batches] == [[2, 2, 1], [1, 1, 1], [1, 1, 0]][rank]
        assert all(torch.equal(rank_batch.batch[0], IMAGES[rank_batch.indices[0]]) for rank_batch in iter_batches)


def test_a_batch_size_that_is_not_asked_is_told_where_it_differs(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        for size in (len, lambda batch: len(batch) // 2):
            functions = BatchFunctions(size)
            loader = DataLoader([torch.ones(2, 1)] * 8, 4, collate_fn=torch.cat)
            assert [rank_batch.count for rank_batch in shares_of(loader, functions=functions)] == [4, 4]
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("batch_size(batch) is not asked for batches of the train loader") and "says 8" in told
