"""What DataLoader workers are told with each batch, so that they make the same one wherever a run begins.

A worker's random streams advance with each batch that it makes, and a worker of a resumed run has made none. So each
batch gets streams of its own, which know the run's seed, the epoch, the rank and the batch's number alone: not how
many workers there are, nor which batches were made before. A worker that lives on from epoch to epoch has a copy of
the dataset, which is told of a new epoch in the worker, before the first batch of it is made there.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, get_worker_info

from dtrain.data.sources import enter_epoch, knows_epochs
from dtrain.distributed.seeding import derive, seed_everything_on_cpu


class Seeding:
    """A batch's indices on their way to a worker, where their arrival seeds the random streams.

    They arrive as they were, right before the batch is made of them, in the worker's own thread.

    Args:
        indices: of the batch's samples.
        seed: of the pass and the rank.
        number: of the batch in the pass.
        epoch: from 1; None where the worker was started in it, with a dataset that was told.
        started: in which epoch a worker that lives on was, with such a dataset.
    """

    def __init__(
        self, indices: Any, seed: int, number: int, epoch: int | None = None, started: int | None = None
    ) -> None:
        self._parts = indices, seed, number, epoch, started

    def __reduce__(self) -> Any:
        """Is unpickled as `_arrived` does it."""
        return _arrived, self._parts


class _Worker:
    """Where this worker process is; the process that trains has none of it."""

    epoch: int | None = None


def _arrived(indices: Any, seed: int, number: int, epoch: int | None, started: int | None) -> Any:
    worker = get_worker_info()
    if worker is not None:
        _Worker.epoch = started if _Worker.epoch is None else _Worker.epoch
        if epoch is not None and epoch != _Worker.epoch:
            enter_epoch(worker.dataset, epoch)
            _Worker.epoch = epoch
        seed_everything_on_cpu(derive(seed, number))
    return indices


def let_workers_go(loader: Any) -> None:
    """Ends the persistent workers of a loader that deals no indices, where its dataset is told of epochs.

    Those that are started for the next epoch have a dataset that was told.
    """
    if isinstance(loader, DataLoader) and loader.persistent_workers and knows_epochs(loader.dataset):
        if loader._iterator is not None:
            # Now, since what the new workers have of them, once forked, would be ended by these too.
            loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
        loader._iterator = None
