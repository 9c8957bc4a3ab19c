"""Whole batches at once, from datasets of tensors.

A DataLoader asks a TensorDataset for one sample after the other and stacks them, which takes longer than a small net's
whole train step. Here the rows of a batch are taken out of the tensors by one call. The batch is what the DataLoader
would have made: the same rows in the same order, a list of new, contiguous tensors of the same type on the same
device. Where that is not known to hold, the loader's own way stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

_PARTS = 1024  # of the order that are taken at once


class PlacedRows(NamedTuple):
    """Where a batch's samples lie in the tensors, as a tensor on the CPU and the same on the device."""

    host: Tensor
    device: Tensor

    def cut(self, start: int, stop: int) -> PlacedRows:
        """Returns a part."""
        return PlacedRows(self.host[start:stop], self.device[start:stop])


class RowsOf(Dataset[Any]):
    """A TensorDataset, or a subset of one, that is asked for a batch at a time.

    Args:
        dataset: the user's dataset; it is read anew for each batch, so that what the user changes counts.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitems__(self, indices: Sequence[Any] | Tensor) -> list[Any]:
        """Returns the rows of a batch, one tensor for each part of a sample.

        Args:
            indices: of the samples; a list as a DataLoader gives it, or what `rows` made of one.
        """
        rows = indices if isinstance(indices, Tensor) else self.rows(indices)
        if not isinstance(rows, Tensor):
            return default_collate([self.dataset[index] for index in rows])  # type: ignore[no-any-return]
        return [tensor.index_select(0, rows if tensor.is_cpu else rows.to(tensor.device)) for tensor in self.tensors()]

    def rows(self, indices: Sequence[Any]) -> Tensor | Sequence[Any]:
        """Returns where samples lie in the tensors, in a form of which a part is quickly taken.

        Indices that only the dataset itself understands (negative ones, slices), and those out of bounds, which it
        words best, come back as they are.
        """
        dataset: Any = self.dataset
        places = indices
        try:
            while type(dataset) is Subset:
                places = [dataset.indices[place] for place in places]
                dataset = dataset.dataset
            rows = torch.arange(len(places)) if places == range(len(places)) else torch.tensor(places)
        except (IndexError, RuntimeError, TypeError, ValueError):
            return indices
        if rows.ndim != 1 or rows.dtype != torch.int64 or len(rows) == 0:
            return indices
        return rows if _within(rows, len(dataset)) else indices

    def tensors(self) -> Sequence[Tensor]:
        """Returns the dataset's tensors as they are now."""
        dataset: Any = self.dataset
        while type(dataset) is Subset:
            dataset = dataset.dataset
        return dataset.tensors  # type: ignore[no-any-return]


def row_batches(batches: Any, rows_of: RowsOf, device: torch.device | None = None) -> Iterator[Any]:
    """Yields the batches of one of torch's own samplers as parts of one tensor, which are quicker to take than lists.

    An order that is no such tensor comes in lists.

    Args:
        batches: the batch sampler.
        rows_of: the dataset.
        device: where the order is to be, too, which makes the parts `PlacedRows`; None for the CPU alone.
    """
    size = batches.batch_size
    order = _order(batches.sampler, rows_of)
    if batches.drop_last:
        order = order[: len(order) // size * size]
    if isinstance(order, torch.Tensor):
        # Some at a time: a part takes about 600 bytes, whatever its length, and an epoch may have millions.
        for some in torch.split(order, size * _PARTS):
            parts = torch.split(some, size)
            if device is None:
                yield from parts
            else:
                yield from map(PlacedRows, parts, torch.split(some.to(device, non_blocking=True), size))
    else:
        yield from (order[start : start + size] for start in range(0, len(order), size))


def _order(sampler: Any, rows_of: RowsOf) -> Any:
    """Returns an epoch's order: a tensor where it can be one."""
    if type(sampler) is SequentialSampler:
        return rows_of.rows(range(len(sampler)))
    if type(sampler) is not RandomSampler or type(rows_of.dataset) is not TensorDataset:
        return rows_of.rows(list(sampler))
    rows = torch.from_numpy(np.fromiter(sampler, np.int64))  # without a list of as many numbers besides
    return rows if len(rows) and _within(rows, len(rows_of)) else rows.tolist()


def _within(rows: Tensor, length: int) -> bool:
    least, most = rows.aminmax()
    return bool(least >= 0 and most < length)


def fetched_by_batch(loader: DataLoader[Any]) -> tuple[Dataset[Any], Callable[..., Any]]:
    """Returns the dataset and collate function that give a loader's batches, by the batch where that is equal."""
    equal = (
        loader.collate_fn is default_collate
        and (loader.num_workers == 0 or loader.worker_init_fn is None)  # it may look at the dataset
        and _is_plain(loader.dataset)
    )
    return (RowsOf(loader.dataset), _as_it_is) if equal else (loader.dataset, loader.collate_fn)


def _is_plain(dataset: Any) -> bool:
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return type(dataset) is TensorDataset and all(
        type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_quantized
        for tensor in dataset.tensors
    )


def _as_it_is(batch: Any) -> Any:
    return batch
