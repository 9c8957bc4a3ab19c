"""Random augmentation in DataLoader workers that can go on in the midst of an epoch.

A worker's random streams advance with each batch that it makes, and a worker of a resumed run has made none. So each
batch gets streams of its own, which know the run's seed, the epoch, the rank and the batch's number alone: not how
many workers there are, nor which batches were made before.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import get_worker_info

from dtrain.seeding import derive, seed_everything_on_cpu


class Seeding:
    """A batch's indices on their way to a worker, where their arrival seeds the random streams.

    They arrive as they were, right before the batch is made of them, in the worker's own thread.

    Args:
        indices: of the batch's samples.
        seed: of the pass and the rank.
        number: of the batch in the pass.
    """

    def __init__(self, indices: Any, seed: int, number: int) -> None:
        self._parts = indices, seed, number

    def __reduce__(self) -> Any:
        """Is unpickled as `_arrived` does it."""
        return _arrived, self._parts


def _arrived(indices: Any, seed: int, number: int) -> Any:
    if get_worker_info() is not None:
        seed_everything_on_cpu(derive(seed, number))
    return indices
