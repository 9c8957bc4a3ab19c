"""Samplers that deal to ranks themselves, which dtrain does in their place."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from dtrain.errors import UsageError

logger = logging.getLogger(__name__)

_REPLACED = "_dtrain_replaced"


def index_batches(loader: DataLoader[Any]) -> Any:
    """Returns what draws a loader's batches as lists of indices; None where it draws single ones, or none.

    With `batch_size=None` it may be the sampler, of which the dataset gets each list as an index.
    """
    if loader.batch_sampler is not None:
        return loader.batch_sampler
    return loader.sampler if isinstance(loader.sampler, BatchSampler) else None


def without_distributed(loader: DataLoader[Any], split: str, rank: int) -> Iterable[list[Any]]:
    """The loader's batch sampler; a DistributedSampler in it gives way to the plain one that it stands for.

    Raises:
        UsageError: what it stands for is not known.
    """
    batches = index_batches(loader)
    sampler = getattr(batches, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return batches  # type: ignore[no-any-return]
    if type(batches) is not BatchSampler or type(sampler) is not DistributedSampler:
        kind = type(batches if type(sampler) is DistributedSampler else sampler).__name__
        raise UsageError(
            f"the {split} loader's {kind} shards by a DistributedSampler, but dtrain shards the data "
            "itself. Use a RandomSampler or SequentialSampler."
        )
    data: Any = sampler.dataset
    plain = RandomSampler(data) if sampler.shuffle else SequentialSampler(data)
    if rank == 0 and not hasattr(sampler, _REPLACED):
        setattr(sampler, _REPLACED, True)  # a loader may be read by several
        logger.warning(
            "the %s loader's DistributedSampler (num_replicas=%d, rank=%d) is replaced by a %s over all %d samples: "
            "dtrain shards the data itself.",
            *(split, sampler.num_replicas, sampler.rank, type(plain).__name__, len(plain)),
        )
    return BatchSampler(plain, batches.batch_size, batches.drop_last)
