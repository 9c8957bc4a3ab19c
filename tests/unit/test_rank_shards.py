"""Which loaders shard themselves over the ranks, by the names that say so; libraries are stood in for."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from dtrain.data.batches import BatchFunctions
from dtrain.data.loader import ShardedLoader, is_own
from dtrain.data.partition import ShardSpec
from dtrain.errors import UsageError


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(torch.arange(12.0).reshape(12, 1))


class Told(Stream):
    rank: tuple[int, int] | None = None

    def set_rank(self, rank: int, world_size: int) -> None:
        self.rank = rank, world_size


class Wrapper(Stream):
    def __init__(self, inner: Any) -> None:
        self.inner = inner


def with_attributes(dataset: Any, **attributes: Any) -> Any:
    vars(dataset).update(attributes)
    return dataset


def split_by_node(source: Any) -> Any:
    return source


def single_node_only(source: Any) -> Any:
    return source


class ResampledShards(Stream):
    pass


class StreamingDataset(Stream):
    pass


class Mine(StreamingDataset):
    pass


for thing in (split_by_node, single_node_only, ResampledShards):
    thing.__module__ = "webdataset.shardlists"
StreamingDataset.__module__ = "streaming.base.dataset"


def own(dataset: Any, rank: int = 1, size: int = 2, sharding: Any = "auto") -> bool:
    return is_own(DataLoader(dataset, 2), "train", rank, size, sharding)


def test_a_stream_says_that_it_shards_itself_and_others_are_known() -> None:
    assert not own(Stream())
    assert own(Told())
    assert own(Wrapper(Told()))
    assert own(with_attributes(Stream(), sharded_by_rank=True))
    assert not own(with_attributes(Told(), sharded_by_rank=False))
    assert own(Stream(), sharding="loader")
    assert not own(Told(), sharding="dtrain")
    assert own(with_attributes(Stream(), _distributed=SimpleNamespace(rank=1, world_size=2)))
    assert not own(with_attributes(Stream(), _distributed=None))
    assert own(with_attributes(Stream(), pipeline=[Stream(), split_by_node, len]))
    assert own(with_attributes(Stream(), pipeline=[ResampledShards()]))
    assert own(Mine())
    loader = DataLoader(Stream(), 2)
    loader.sharded_by_rank = True
    assert is_own(loader, "train", 0, 2, "auto")
    data = TensorDataset(torch.arange(4.0))
    assert not own(data, sharding="loader"), "of these the indices are dealt"
    assert own(with_attributes(data, sharded_by_rank=True))


@pytest.mark.parametrize(
    ("dataset", "sharding", "words"),
    [
        (with_attributes(Stream(), _distributed=SimpleNamespace(rank=0, world_size=2)), "auto", "for rank 0 of 2, and"),
        (with_attributes(Stream(), _distributed=SimpleNamespace(rank=1, world_size=4)), "auto", "this is rank 1 of 2"),
        (with_attributes(Stream(), pipeline=[Stream(), single_node_only]), "auto", "nodesplitter=webdataset.split_by"),
        (with_attributes(Stream(), pipeline=[Stream(), split_by_node]), "dtrain", "shards itself (split_by_node)"),
        (with_attributes(Mine(), sharded_by_rank=False), "auto", "sharded_by_rank = False, but"),
        (with_attributes(Stream(), sharded_by_rank="yes"), "auto", "sharded_by_rank = 'yes'"),
    ],
)
def test_what_contradicts_itself_is_refused(dataset: Any, sharding: Any, words: str) -> None:
    with pytest.raises(UsageError) as told:
        own(dataset, sharding=sharding)
    assert words in str(told.value)


def test_where_such_a_loader_cannot_be_used_the_remedy_is_named() -> None:
    loader = DataLoader(Told(), 2)
    for how, words in (
        (ShardSpec(0, 2, "global", fill=True), "Use train.batch=per_rank"),
        (ShardSpec(0, 1, "per_rank", fill=True, merge=2), "`dtrain check parity` cannot compare"),
    ):
        with pytest.raises(UsageError, match=words):
            ShardedLoader(loader, how, 1, "train")
    view = ShardedLoader(loader, ShardSpec(0, 2, "per_rank", fill=False), 1, "predict")
    assert view.steps() is None
    with pytest.raises(UsageError, match="its samples over 2 ranks is not known"):
        view.iter_batches(1)


def test_on_one_rank_it_is_told_so_and_reads_all() -> None:
    dataset = Told()
    view = ShardedLoader(DataLoader(dataset, 5), ShardSpec(0, 1, "per_rank", fill=True), 1, "train")
    assert [share.count for share in view.iter_batches(1)] == [5, 5, 2]
    assert dataset.rank == (0, 1)
    assert view.steps() is None or view.steps() == 3


def test_ranks_that_read_a_whole_stream_are_told_of_once(caplog: Any) -> None:
    def warnings(loader: Any, rank: int = 0, size: int = 2, **more: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            view = ShardedLoader(loader, ShardSpec(rank, size, "per_rank", fill=True), 1, "train", **more)
            for epoch in (1, 2):
                assert list(view.iter_batches(epoch))
        return [record.getMessage() for record in caplog.records]

    (told,) = warnings(DataLoader(Stream(), 2))
    assert "each of 2 ranks reads all of the train stream (Stream)" in told
    assert "set_rank(rank, world_size)" in told
    assert warnings(DataLoader(Stream(), 2), rank=1) == []
    assert warnings(DataLoader(Stream(), 2), size=1) == []
    assert warnings(DataLoader(Stream(), 2), sharding="dtrain") == []
    assert warnings(DataLoader(with_attributes(Stream(), sharded_by_rank=False), 2)) == []
    assert warnings([torch.ones(2, 1)] * 4) == [], "it lies in memory"
    assert warnings(DataLoader(TensorDataset(torch.ones(4, 1)), 2)) == []


class StatefulDataLoader(DataLoader):
    """As torchdata's: a DataLoader that iterates in its own way."""

    def __iter__(self) -> Any:
        raise AssertionError("its indices are dealt")


StatefulDataLoader.__iter__.__module__ = "torchdata.stateful_dataloader.stateful_dataloader"


def test_a_stateful_loader_over_a_map_style_dataset_is_sharded_by_index() -> None:
    loader = StatefulDataLoader(TensorDataset(torch.arange(10.0)), 4)
    dealt = []
    for rank in range(2):
        view = ShardedLoader(loader, ShardSpec(rank, 2, "global", fill=True), 1, "train")
        assert view.indexed
        dealt.append([share.batch[0].tolist() for share in view.iter_batches(1)])
    assert dealt == [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [9]]]


def test_a_builder_that_got_the_rank_makes_streams_of_its_own() -> None:
    made = BatchFunctions(by_rank=True)
    how = ShardSpec(0, 1, "per_rank", fill=True)
    assert ShardedLoader(DataLoader(Stream(), 2), how, 1, "train", functions=made).own
    assert not ShardedLoader(DataLoader(Stream(), 2), how, 1, "train", functions=made, sharding="dtrain").own
    assert not ShardedLoader(DataLoader(TensorDataset(torch.ones(4)), 2), how, 1, "train", functions=made).own


class Placed(Stream):
    """Knows where it is; its state begins anew once its iterator is closed, or does not."""

    def __init__(self, resets: bool) -> None:
        self.at, self.resets = 0, resets

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise AssertionError

    def __iter__(self) -> Any:
        try:
            for self.at in range(1, 13):
                yield torch.ones(1) * self.at
        finally:
            self.at = 0 if self.resets else self.at


@pytest.mark.parametrize("resets", [True, False])
@pytest.mark.parametrize("fill", [True, False])
def test_a_state_that_stays_within_a_pass_that_was_left_is_told_of_once(resets: bool, fill: bool, caplog: Any) -> None:
    """A resumed run would go on there, and one that was not interrupted begins at the start."""
    dataset = Placed(resets)
    dataset.sharded_by_rank = True
    view = ShardedLoader(DataLoader(dataset, 2), ShardSpec(0, 1, "per_rank", fill=fill, limit=3), 1, "valid")
    view.sources.kept = True
    with caplog.at_level(logging.WARNING):
        for epoch in (1, 2):
            assert len(list(view.iter_batches(epoch))) == 3
    assert ["the state of Placed is still within the valid pass" in one for one in caplog.messages] == [True][resets:]
    assert dataset.at == (0 if resets else 6)
