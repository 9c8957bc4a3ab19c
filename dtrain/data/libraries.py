"""What is known of other libraries' loaders and datasets, by their names and attributes: none of them is imported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

_STREAMING = ("streaming", "litdata")
_STATEFUL = "torchdata.stateful_dataloader"
_MOST = 1000  # of Hugging Face's iterables within one another


@dataclass(frozen=True)
class Split:
    """How a library's dataset shards itself over ranks.

    Attributes:
        name: what does it, in words.
        rank: for which rank it was made; None where it finds that out itself.
        size: for how many.
    """

    name: str
    rank: int | None = None
    size: int | None = None


def split_of(parts: Iterable[Any]) -> Split | None:
    """Returns how a loader's parts shard themselves; None for those of which that is not known."""
    for part in parts:
        distributed = getattr(part, "_distributed", None)  # Hugging Face's IterableDataset
        rank, size = (getattr(distributed, name, None) for name in ("rank", "world_size"))
        if isinstance(rank, int) and isinstance(size, int):
            return Split("split_dataset_by_node", rank, size)
        if any(_is(kind, "StreamingDataset", *_STREAMING) for kind in type(part).__mro__):
            return Split(type(part).__name__)
        for stage in _stages(part):
            if _is(stage, "split_by_node", "webdataset") or _is(type(stage), "ResampledShards", "webdataset"):
                return Split(getattr(stage, "__name__", type(stage).__name__))
    return None


def refuses_ranks(parts: Iterable[Any]) -> bool:
    """Whether a webdataset is among them that raises on several ranks, since it was not told how to split."""
    return any(_is(stage, "single_node_only", "webdataset") for part in parts for stage in _stages(part))


def is_stateful(loader: Any) -> bool:
    """Whether a loader is torchdata's StatefulDataLoader, which iterates in a way of its own."""
    iterates = getattr(type(loader), "__iter__", None)
    return isinstance(loader, DataLoader) and str(getattr(iterates, "__module__", "")).startswith(_STATEFUL)


def iterates_plainly(loader: Any) -> bool:
    """Whether a loader is a DataLoader that makes its batches in DataLoader's own way; torchdata's does, too."""
    return isinstance(loader, DataLoader) and (type(loader).__iter__ is DataLoader.__iter__ or is_stateful(loader))


def begins_anew(thing: Any) -> bool:
    """Whether an object's `load_state_dict({})` has it begin anew: torchdata's loader, Hugging Face's iterables."""
    return is_stateful(thing) or type(thing).__module__.partition(".")[0] == "datasets"


def shuffles_in_memory(dataset: Any) -> bool:
    """Whether it is Hugging Face's with a shuffle buffer, of which its state leaves the content out."""
    left = [getattr(dataset, "_ex_iterable", None)]
    for inner in left:
        if "Buffer" in type(inner).__name__ or len(left) > _MOST:
            return True
        left += [one for one in (getattr(inner, "ex_iterable", None),) if one is not None]
        left += getattr(inner, "ex_iterables", None) or []
    return False


def _stages(part: Any) -> Iterator[Any]:
    stages = getattr(part, "pipeline", None)
    for stage in stages if isinstance(stages, list) else ():
        yield from stage if isinstance(stage, list) else [stage]


def _is(thing: Any, name: str, *roots: str) -> bool:
    """Whether a class or function has a name, and is of one of some libraries."""
    module = str(getattr(thing, "__module__", "")).partition(".")[0]
    return getattr(thing, "__name__", None) == name and module in roots
