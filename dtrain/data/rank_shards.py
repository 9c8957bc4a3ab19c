"""Whether a loader shards itself over the ranks, so that each rank reads its own part of a stream.

Known are, by name and with nothing to inherit or import:

- `set_rank(rank, world_size)` on the loader, its dataset or a dataset within that: called before each pass, as
  `set_epoch` is, and before that;
- the attribute `sharded_by_rank`, True or False, on one of these;
- what other libraries do (`dtrain.data.libraries`);
- the config's `train.data_sharding`, and a `build_dataloaders` that takes `rank`.

A DataLoader over a map-style dataset is sharded by its indices, unless `sharded_by_rank` is True.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

from dtrain.data.libraries import refuses_ranks, split_of
from dtrain.data.partition import ShardSpec
from dtrain.data.sources import parts_of
from dtrain.errors import UsageError

DataSharding = Literal["auto", "loader", "dtrain"]

_MARK, _TELL = "sharded_by_rank", "set_rank"
PYTHON = 'data_sharding="{0}" in Python'
NO_PARITY = (
    "the {0} loader shards itself by rank, so {1} ranks don't take the global batches of one, and `dtrain check "
    "parity` cannot compare them."
)


def check_data_sharding(value: Any) -> None:
    """Looks at the argument.

    Raises:
        UsageError: it is none of the values.
    """
    if value not in get_args(DataSharding):
        raise UsageError(f"data_sharding = {value!r}: should be 'auto', 'loader' or 'dtrain'.")


def shards_itself(loader: Any, how: ShardSpec, split: str, wanted: DataSharding, *, indexed: bool) -> bool:
    """Whether each rank's loader yields batches of its own.

    Args:
        loader: the user's.
        how: the ranks.
        split: the loader's name.
        wanted: what the config says.
        indexed: whether it is a DataLoader over a map-style dataset.

    Raises:
        UsageError: it was split for other ranks than these, or the config contradicts it.
    """
    parts = list(parts_of(loader).values())
    said = _said(parts, split)
    if indexed:
        return said is True
    if how.size > 1 and refuses_ranks(parts):
        raise UsageError(
            f"the {split} loader's WebDataset has no nodesplitter, and raises an error on {how.size} ranks. Pass "
            "nodesplitter=webdataset.split_by_node, with at least one shard per rank."
        )
    library = split_of(parts)
    if library is not None:
        made_for = (library.rank, library.size)
        if library.rank is not None and made_for != (how.rank, how.size):
            raise UsageError(
                f"the {split} loader's dataset was split ({library.name}) for rank {made_for[0]} of {made_for[1]}, and "
                f"this is rank {how.rank} of {how.size}. Split it by the rank and world_size that build_dataloaders "
                "gets where it has parameters of these names."
            )
        if how.size > 1 and (said is False or (said is None and wanted == "dtrain")):
            which = f"{_MARK} = False" if said is False else "data_sharding = dtrain"
            raise UsageError(
                f"{which}, but the {split} loader's dataset shards itself ({library.name}). Remove one of the two."
            )
        return True
    if said is not None or wanted != "auto":
        return said if said is not None else wanted == "loader"
    return any(callable(getattr(part, _TELL, None)) for part in parts)


def says_whole(loader: Any) -> bool:
    """Whether a loader says that every rank is to read all of it."""
    return any(getattr(part, _MARK, None) is False for part in parts_of(loader).values())


def tell_rank(loader: Any, rank: int, size: int) -> None:
    """Calls `set_rank(rank, world_size)` of the parts that have it: inner ones first, as `set_epoch` is."""
    for part in reversed(parts_of(loader).values()):
        if not isinstance(part, type) and callable(getattr(part, _TELL, None)):
            part.set_rank(rank, size)


def refuse_global(split: str) -> UsageError:
    """Returns what is wrong with `batch="global"` for training on such a loader."""
    return UsageError(
        f"train.batch=global: the loader's batch size is the one of all ranks together, but the {split} loader shards "
        "itself: each rank reads batches of its own. Use train.batch=per_rank (the default), and divide the batch size "
        "by the number of ranks (world_size in build_dataloaders)."
    )


def whole_read(loader: Any, split: str, size: int) -> str:
    """Returns the warning that every rank reads a whole stream."""
    dataset = getattr(loader, "dataset", loader)
    return (
        f"each of {size} ranks reads all of the {split} stream ({type(dataset).__name__}) and uses 1/{size} of it, so "
        f"{size} ranks read no faster than one. If it can be sharded, give it set_rank(rank, world_size), called "
        "before __iter__, and yield that rank's part (docs/recipes.md#streams). train.data_sharding=dtrain "
        f"({PYTHON.format('dtrain')}) disables this warning."
    )


def check_first_batches(told: list[int], split: str) -> None:
    """Compares the ranks' first batches, of which no two may be equal.

    Args:
        told: each rank's fingerprint; 0 for one without a batch.
        split: the loader's name.

    Raises:
        UsageError: two are, so that nobody shards; every rank raises it.
    """
    for rank, mark in enumerate(told):
        if mark and mark in told[:rank]:
            raise UsageError(
                f"ranks {told.index(mark)} and {rank} read the same first batch of the {split} loader, which is to "
                "shard itself: each sample would count several times. Have its dataset yield the rank's part, as in "
                "paths[rank::world_size], with an order that is drawn the same on all ranks before; or have dtrain "
                f"shard it: set sharded_by_rank = False on this loader, or train.data_sharding=dtrain "
                f"({PYTHON.format('dtrain')}) for all.",
                on_all_ranks=True,
            )


def _said(parts: Iterable[Any], split: str) -> bool | None:
    for part in parts:
        said = getattr(part, _MARK, None)
        if isinstance(said, bool):
            return said
        if said is not None and not callable(said):
            raise UsageError(f"{_MARK} = {said!r} on the {split} loader: should be True or False.")
    return None
