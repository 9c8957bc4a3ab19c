"""Marks of data that lies in memory: a change of any one sample shows, rounding does not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from dtrain.checkpoint.samples import alike
from dtrain.checkpoint.tensor_marks import tensor_marks


class Texts(Dataset[str]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> str:
        return "x"


def big(count: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(count, 12, generator=g), torch.randint(0, 9, (count,), generator=g)


def change_one_value(x: torch.Tensor, y: torch.Tensor) -> None:
    x[1717, 5] += 1.0


def change_one_label(x: torch.Tensor, y: torch.Tensor) -> None:
    y[1717] += 1


def exchange_two(x: torch.Tensor, y: torch.Tensor) -> None:
    x[[1717, 1718]] = x[[1718, 1717]]


def round_otherwise(x: torch.Tensor, y: torch.Tensor) -> None:
    x *= 1 + 1e-6


@pytest.mark.parametrize(
    ("change", "seen"),
    [(change_one_value, True), (change_one_label, True), (exchange_two, True), (round_otherwise, False)],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize(
    "kept",
    [
        lambda x, y: DataLoader(TensorDataset(x, y), 64),
        lambda x, y: DataLoader(Subset(TensorDataset(x, y), range(4096)), 64),
        lambda x, y: DataLoader(ConcatDataset([TensorDataset(x[:9], y[:9]), TensorDataset(x, y)]), 64),
        lambda x, y: list(zip(x.split(64), y.split(64), strict=True)),
        lambda x, y: DataLoader(TensorDataset((x * 20 + 100).to(torch.uint8), y), 64),
        lambda x, y: DataLoader(TensorDataset(torch.complex(x, x), y), 64),
    ],
    ids=["tensors", "subset", "concatenated", "batches", "bytes", "complex"],
)
def test_a_change_of_one_sample_in_memory_shows(kept: Any, change: Any, seen: bool) -> None:
    x, y = big()
    before = tensor_marks(kept(x, y))
    assert before and len(json.dumps(before)) < 12_000
    change(x, y)
    after = tensor_marks(kept(x, y))
    assert any(not alike(mark, before[name]) for name, mark in after.items()) is seen


def test_other_indices_of_the_same_data_show_and_odd_data_has_no_marks() -> None:
    x, y = big(40)
    one, two = (tensor_marks(DataLoader(Subset(TensorDataset(x, y), part), 4)) for part in ([1, 2, 3], [1, 2, 4]))
    assert [name for name in one if one[name] != two[name]] == ["indices"]
    empty = DataLoader(TensorDataset(x[:0], y[:0]), 4)
    assert tensor_marks(empty).keys() == {"tensor 0", "tensor 1"}
    ragged = [(x, y), (x[:, :3], y)]
    for odd in (Texts(), [], ["text"], ragged, [{"x": x}], TensorDataset(x.to_sparse())):
        assert tensor_marks(DataLoader(odd, 4) if isinstance(odd, Dataset) else odd) == {}
