"""Several training loaders as one: a mapping of names to loaders, and how their batches are combined to steps.

::

    min          a step has a batch of each; the pass ends with the first loader that does    {"easy": ..., "hard": ...}
    max_cycle    the same; the pass ends with the last one, and a shorter one begins anew     {"easy": ..., "hard": ...}
    alternate    a step has one loader's batch: the loaders take turns until all have ended   that batch
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dtrain.data.stream import length_of
from dtrain.errors import UsageError

Combine = Literal["min", "max_cycle", "alternate"]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # also the key of a step's batch
_WAYS = (
    '"min": a step gets a batch of each loader, as a mapping, until the shortest one ends; "max_cycle": until the '
    'longest one ends, and the others begin anew; "alternate": the loaders take turns'
)


@dataclass(frozen=True)
class LoaderGroup:
    """Several training loaders.

    Attributes:
        loaders: name -> loader.
        combine: how their batches make steps.
    """

    loaders: Mapping[str, Any]
    combine: Combine

    def __len__(self) -> int:
        lengths = [length_of(loader) for loader in self.loaders.values()]
        total = combined_length(lengths, self.combine)
        if total is None:
            raise TypeError("a loader has no length")
        return total

    @property
    def batch_size(self) -> int | None:
        """The samples of a step; None where a loader cannot tell, or the loaders that take turns differ."""
        sizes = {batch_size_of(loader) for loader in self.loaders.values()}
        if None in sizes or (self.combine == "alternate" and len(sizes) > 1):
            return None
        one_of_each = [size for loader in self.loaders.values() if (size := batch_size_of(loader)) is not None]
        return one_of_each[0] if self.combine == "alternate" else sum(one_of_each)


def mixes(loader: Any) -> bool:
    """Whether a step has a batch of each of several training loaders."""
    return isinstance(loader, LoaderGroup) and loader.combine != "alternate"


def combined_length(lengths: list[int | None], combine: Combine) -> int | None:
    """Returns the steps of a pass over loaders of these lengths; None where it is not known."""
    known = [length for length in lengths if length is not None]
    if len(known) < len(lengths):
        return None
    return sum(known) if combine == "alternate" else min(known) if combine == "min" else max(known)


def batch_size_of(loader: Any) -> int | None:
    """Returns the batch size of a loader; None where it cannot tell."""
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def check_combine(combine: Any) -> None:
    """Checks how loaders are to be combined.

    Raises:
        UsageError: it is none of the ways.
    """
    if combine is not None and combine not in get_args(Combine):
        raise UsageError(f"combine = {combine!r}: should be {_WAYS}.")


def grouped(loaders: Any, combine: Combine | None, key: str = "combine", where: str = "") -> Any:
    """Returns a mapping of training loaders as a group, and a sole loader as it is.

    Args:
        loaders: what the user gave.
        combine: how they are combined.
        key: what sets this, as the user writes it.
        where: the file and line, or the argument, that the loaders come from, in words.

    Raises:
        UsageError: it is not said how they are combined, a name is no name, or there is one loader alone.
    """
    if isinstance(loaders, LoaderGroup):
        return loaders
    start = f"{where}: " if where else ""
    if not isinstance(loaders, Mapping):
        if combine is not None:
            raise UsageError(
                f"{start}{key} = {combine!r}, but there is one training loader. Remove {key}, or give a mapping of "
                'names to loaders, such as {"easy": dl_easy, "hard": dl_hard}.'
            )
        return loaders
    if not loaders:
        raise UsageError(f"{start}the mapping of training loaders is empty.")
    for name, loader in loaders.items():
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            raise UsageError(
                f"{start}{name!r} is the name of a training loader: it should be made of letters, digits and '_', and "
                "begin with a letter or '_'."
            )
        if loader is None:
            raise UsageError(f"{start}the training loader {name!r} is None. Remove it from the mapping.")
    if combine is None:
        raise UsageError(
            f"{start}the training data is a mapping of {len(loaders)} loaders ({', '.join(loaders)}), and it is not "
            f"said how their batches are combined. Set {key}. {_WAYS}."
        )
    return LoaderGroup(dict(loaders), combine)


def train_by_name(loader: Any) -> dict[str, Any]:
    """Returns the training loaders by name; "" is the name of a sole one."""
    return dict(loader.loaders) if isinstance(loader, LoaderGroup) else {"": loader}


def train_splits(loader: Any) -> dict[str, Any]:
    """Returns the training loaders by what they are called in messages and checkpoints: "train", or "train.NAME"."""
    return {f"train.{name}" if name else "train": one for name, one in train_by_name(loader).items()}


def has_iterator(loader: Any) -> bool:
    """Whether a training loader is an iterator, which can be read once."""
    return any(isinstance(one, Iterator) for one in train_by_name(loader).values())
