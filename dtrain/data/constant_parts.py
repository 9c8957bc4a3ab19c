"""Parts of a batch that are no samples', such as class weights: found where they would be cut as if they were."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtrain.data.batch_types import UnclearError, is_same
from dtrain.data.batches import DEFINED, BatchReader
from dtrain.errors import DataError


def refuse_constants(reader: BatchReader, batch: Any, following: Any) -> None:
    """Compares two batches before the first of them is cut.

    Args:
        reader: of the loader's batches.
        batch: one.
        following: the next one.

    Raises:
        DataError: a part that would be cut is the same in both, while others are not.
    """
    if reader.functions.split_batch is not None or reader.collated or batch is following:
        return
    try:
        one, other = (reader.cut_parts(each) for each in (batch, following))
    except UnclearError:
        return  # which is told where it is counted
    same = [path for path in one if is_same(one[path], other.get(path))]
    if not same or all(path in same or _are_equal(one[path], other.get(path)) for path in one):
        return
    shape = f" {tuple(one[same[0]].shape)}" if isinstance(one[same[0]], Tensor) else ""
    raise DataError(
        f"a batch of the {reader.name} loader cannot be cut between {reader.ranks} ranks: {same[0]}{shape} is the "
        "same in two batches, as class weights are, and as long as a batch. Keep it out of the batch (as a buffer "
        "of the model, say), or define `def split_batch(batch, sizes): ...`, which returns a list of batches of so "
        f"many samples each, {DEFINED.format('split_batch')}."
    )


def _are_equal(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return True
    return one.shape == other.shape and one.layout is torch.strided and torch.equal(one, other)
