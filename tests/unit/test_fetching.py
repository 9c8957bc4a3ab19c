"""Whole batches at once are, to the last property, the batches that the DataLoader makes sample by sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Subset, TensorDataset, random_split

from dtrain.data.fetch import RowsOf, fetched_by_batch, row_batches
from dtrain.data.loader import ShardedLoader
from dtrain.data.partition import ShardSpec

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
LAYOUTS = ["plain", "transposed", "every second", "channels last", "expanded"]


def tensor(n: int, dtype: torch.dtype, layout: str, width: int) -> torch.Tensor:
    shape = {"channels last": (n, 2, 3, width), "transposed": (width, n), "every second": (2 * n, width)}
    values = torch.arange(torch.Size(shape.get(layout, (n, width))).numel()).reshape(shape.get(layout, (n, width)))
    values = values.to(dtype)
    if layout == "transposed":
        return values.T
    if layout == "every second":
        return values[::2]
    if layout == "channels last":
        return values.to(memory_format=torch.channels_last)
    return values[:, :1].expand(n, width) if layout == "expanded" else values


def properties(batches: Any) -> list[Any]:
    return [
        (type(batch), [(t.tolist(), t.dtype, t.device, t.stride(), t.is_contiguous(), t.requires_grad) for t in batch])
        for batch in batches
    ]


def iter_batches(loader: DataLoader, fetch_batches: bool) -> list[Any]:
    view = ShardedLoader(loader, ShardSpec(0, 1, "global", fill=True), 1, "train", fetch_batches=fetch_batches)
    return [rank_batch.batch for rank_batch in view.iter_batches(1)]


@given(
    n=st.integers(1, 20),
    batch_size=st.integers(1, 7),
    parts=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), st.integers(0, 3)), min_size=1, max_size=3
    ),
    subset=st.lists(st.integers(0, 19), max_size=9),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_batches_are_equal_in_every_property(n, batch_size, parts, subset, shuffle, drop_last) -> None:
    data: Dataset = TensorDataset(*(tensor(n, *part) for part in parts), torch.arange(n))
    if subset:
        data = Subset(Subset(data, [index % n for index in subset]), list(range(len(subset)))[::-1])
    options: dict[str, Any] = {"batch_size": batch_size, "drop_last": drop_last}
    if shuffle:
        options |= {"shuffle": True}
    loader = DataLoader(data, **options)
    assert type(fetched_by_batch(loader)[0]) is RowsOf
    assert properties(iter_batches(loader, True)) == properties(iter_batches(loader, False))
    if not shuffle:
        assert properties(iter_batches(loader, True)) == properties(loader)


def test_negative_and_odd_indices_of_a_sampler() -> None:
    data = TensorDataset(torch.arange(10.0))
    for sampler in ([-1, 3, -10], [torch.tensor(2), torch.tensor(0)], [[1, 2], [3, 4]], [slice(0, 2), slice(2, 4)]):
        loader = DataLoader(data, batch_size=2, sampler=sampler)
        assert properties(iter_batches(loader, True)) == properties(loader)
    with pytest.raises(IndexError, match="99"):
        iter_batches(DataLoader(data, batch_size=2, sampler=[1, 99]), True)


def test_what_the_user_changes_between_epochs_counts() -> None:
    data = TensorDataset(torch.zeros(4))
    view = ShardedLoader(DataLoader(data, batch_size=2), ShardSpec(0, 1, "global", fill=True), 1, "train")
    assert [rank_batch.batch[0].sum().item() for rank_batch in view.iter_batches(1)] == [0, 0]
    data.tensors = (torch.ones(4),)
    assert [rank_batch.batch[0].sum().item() for rank_batch in view.iter_batches(2)] == [2, 2]


def test_workers_and_random_split() -> None:
    part, _ = random_split(TensorDataset(torch.arange(11.0), torch.arange(11)), [7, 4])
    loader = DataLoader(part, batch_size=3, num_workers=2)
    assert properties(iter_batches(loader, True)) == properties(loader)


class Own(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        return tuple(-part for part in super().__getitem__(index))


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Own(torch.ones(4)), batch_size=2),
        DataLoader(Subset(Own(torch.ones(4)), [1, 2]), batch_size=2),
        DataLoader(
            TensorDataset(torch.ones(4)), batch_size=2, collate_fn=lambda rows: torch.stack([r[0] for r in rows])
        ),
        DataLoader(TensorDataset(torch.ones(4)), batch_size=2, num_workers=1, worker_init_fn=print),
        DataLoader(TensorDataset(torch.ones(4).to_sparse()), batch_size=2),
        DataLoader(TensorDataset(torch.nn.Parameter(torch.ones(4))), batch_size=2),
        DataLoader([torch.ones(1), torch.ones(1)], batch_size=2),
    ],
)
def test_whatever_may_differ_keeps_the_loaders_own_way(loader: DataLoader) -> None:
    assert fetched_by_batch(loader) == (loader.dataset, loader.collate_fn)


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_of_many_batches_is_cut_some_at_a_time(shuffle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the order takes some 600 bytes: those of 5 million batches would take 3 GB."""
    rows = RowsOf(TensorDataset(torch.zeros(50_003)))
    loader = DataLoader(rows.dataset, 4, shuffle=shuffle, generator=torch.Generator().manual_seed(1))
    batches = row_batches(loader.batch_sampler, rows)
    made = []
    split = torch.split
    monkeypatch.setattr(torch, "split", lambda *given: made.append(parts := split(*given)) or parts)
    found = [next(batches)]
    assert sum(len(parts) for parts in made) < 3_000
    found += list(batches)
    assert loader.generator is not None
    loader.generator.manual_seed(1)
    assert [part.tolist() for part in found] == list(loader.batch_sampler)


def test_a_sampler_of_other_data_keeps_its_indices() -> None:
    rows = RowsOf(TensorDataset(torch.zeros(5)))
    batches = BatchSampler(RandomSampler(range(9)), 4, drop_last=True)  # type: ignore[arg-type]
    assert sorted(index for batch in row_batches(batches, rows) for index in batch)[-1] > 4
    assert list(row_batches(BatchSampler([], 4, drop_last=False), rows)) == []
