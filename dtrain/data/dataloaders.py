"""DataLoaders like others, with another order of the samples or another batch size; torch's samplers, seeded."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from dtrain.data.fetch import fetched_by_batch
from dtrain.data.libraries import iterates_plainly
from dtrain.data.samplers import index_batches
from dtrain.data.workers import start_context
from dtrain.errors import UsageError
from dtrain.launch.signals.shield import shielded

_SEEDABLE = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_PLAIN = (SequentialSampler,)


def has_indices(loader: Any) -> bool:
    """Whether a loader draws index batches from a batch sampler and iterates in DataLoader's own way."""
    return (
        iterates_plainly(loader)
        and not isinstance(loader.dataset, IterableDataset)
        and index_batches(loader) is not None
    )


def in_data_order(loader: Any) -> Any:
    """Returns a shuffled DataLoader with each sample of its dataset once, in the dataset's order.

    What has an order of its own (a sampler of the user's, an iterable) is returned as it is.
    """
    batches = index_batches(loader) if has_indices(loader) else None
    if type(batches) is not BatchSampler:
        return loader
    sampler = batches.sampler
    whole = type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == len(loader.dataset)
    if not whole and type(sampler) not in (SequentialSampler, DistributedSampler):
        return loader
    plain: Any = SequentialSampler(loader.dataset)
    return rebuilt(loader, BatchSampler(plain, batches.batch_size, drop_last=False))


def with_batch_size(loader: Any, size: int) -> Any:
    """Returns a DataLoader over the same samples in batches of another size.

    Raises:
        UsageError: it makes its batches in a way of its own.
    """
    batches = index_batches(loader) if has_indices(loader) else None
    if type(batches) is BatchSampler:
        return rebuilt(loader, BatchSampler(batches.sampler, size, batches.drop_last))
    raise UsageError(
        f"the batch size of the training loader ({type(loader).__name__}) cannot be changed from outside: it is no "
        "DataLoader over a map-style dataset with a batch_size. Give build_dataloaders a parameter batch_size."
    )


def with_options(
    loader: Any, *, num_workers: int | None = None, pin_memory: bool | None = None, batch_size: int | None = None
) -> Any:
    """Returns a DataLoader over the same samples with some of its options changed; None leaves one as it is.

    Raises:
        UsageError: it makes its batches in a way of its own.
    """
    if batch_size is not None:
        loader = with_batch_size(loader, batch_size)
    if not has_indices(loader):
        raise UsageError(f"the training loader ({type(loader).__name__}) cannot be changed from outside.")
    workers = loader.num_workers if num_workers is None else num_workers
    pinned = loader.pin_memory if pin_memory is None else pin_memory
    return rebuilt(loader, index_batches(loader), num_workers=workers, pin_memory=pinned)


def rebuilt(
    loader: DataLoader[Any],
    batch_sampler: Any,
    *,
    fetch_batches: bool = False,
    num_workers: int | None = None,
    pin_memory: bool | None = None,
) -> DataLoader[Any]:
    """The same DataLoader with another batch sampler, and other options where they are given."""
    num_workers = loader.num_workers if num_workers is None else num_workers
    fetch_batches = fetch_batches and loader.batch_sampler is not None
    dataset, collate_fn = fetched_by_batch(loader) if fetch_batches else (loader.dataset, loader.collate_fn)
    drawn: dict[str, Any] = {"batch_sampler": batch_sampler}
    if loader.batch_sampler is None:  # the dataset gets the list itself
        drawn = {"batch_size": None, "sampler": batch_sampler}
    workers: dict[str, Any] = {}
    generator = loader.generator
    if loader.persistent_workers and num_workers > 0:
        # It draws its workers' seed when it first begins an epoch, which is another one where a run goes on. That must
        # not come from a random state that anything else depends on.
        generator = OwnGenerator()
    if num_workers > 0:
        workers = {
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers,
            "multiprocessing_context": start_context(loader),
            "timeout": loader.timeout,
        }
    return DataLoader(
        dataset,
        **drawn,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=loader.pin_memory if pin_memory is None else pin_memory,
        worker_init_fn=shielded(loader.worker_init_fn),
        generator=generator,
        **workers,
    )


def reseed(batches: Any, seed: int) -> bool:
    """Seeds torch's own samplers for one epoch, where the user gave no generator.

    Returns:
        whether all randomness of the order is now known to be equal on all ranks.
    """
    if not is_torchs_own(batches):
        return False
    sampler = batches.sampler
    if type(sampler) in _SEEDABLE:
        generator = sampler.generator
        if generator is None or getattr(generator, "of_dtrain", False):
            generator = sampler.generator = OwnGenerator()
            generator.manual_seed(seed)
    return True


def is_torchs_own(batches: Any) -> bool:
    """Whether a batch sampler and its sampler are torch's own, which draw from a generator alone."""
    return type(batches) is BatchSampler and type(batches.sampler) in (*_SEEDABLE, *_PLAIN)


class OwnGenerator(torch.Generator):
    """A generator that dtrain put into a user's sampler, and may replace each epoch."""

    of_dtrain = True

    def __reduce__(self) -> Any:
        """A copy, or what is unpickled, is dtrain's too; torch's own way gives a plain generator."""
        return OwnGenerator, ()
