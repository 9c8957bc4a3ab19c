"""Whether map-style datasets are the same on all ranks, where the recipe built them with the rank's number.

dtrain shards these itself, by index: of a dataset that is a rank's part already, most samples would be left out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from dtrain.data.fingerprints import edge_mark
from dtrain.data.reading import read_some
from dtrain.distributed.world import World
from dtrain.errors import UsageError

logger = logging.getLogger(__name__)

_COUNT = 8  # samples that are compared


def check_whole(loaders: Mapping[str, Any], world: World) -> None:
    """Compares samples of the same index.

    Args:
        loaders: DataLoaders over map-style datasets, by split.
        world: the ranks.

    Raises:
        UsageError: they differ; every rank raises it.
    """
    if world.size == 1:
        return
    told = world.gather_json({split: _marks(loader) for split, loader in loaders.items()})
    for split in loaders:
        marks = [rank[split] for rank in told]
        for rank, other in enumerate(marks):
            index = next((i for i, mark in other.items() if marks[0].get(i, mark) != mark), None)
            if index is not None:
                raise UsageError(
                    f"sample {index} of the {split} dataset is not the same on ranks 0 and {rank}. build_dataloaders "
                    "gets the rank, but dtrain shards a map-style dataset itself, by index: give every rank the whole "
                    "one. Or set dataset.sharded_by_rank = True, so that each rank trains on batches of its own.",
                    on_all_ranks=True,
                )
        if not any(marks) and world.is_main:
            logger.warning(
                "build_dataloaders gets the rank. The %s dataset, which is map-style, must be whole on every rank all "
                "the same: dtrain shards it by index. It was not compared, since reading it may change it.",
                split,
            )


def _marks(loader: Any) -> dict[str, int]:
    """Returns the marks of some samples that are the same each time they are read."""
    both = {i: [edge_mark(sample) for sample in pair] for i, pair in read_some(loader, _COUNT, 0).items()}
    return {index: one for index, (one, two) in both.items() if one == two}
