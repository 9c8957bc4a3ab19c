"""How a DataLoader's workers start: forked, on Linux, where nobody chose another way.

Python 3.14 no longer forks by default. A worker that is not forked imports everything anew, may lack what cannot be
imported by its name, and does not outlive the signals of `dtrain.launch.signals.shield`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from dtrain.config.recipe_file import UNIMPORTABLE
from dtrain.errors import UsageError
from dtrain.launch.signals.shield import shielded


def start_context(loader: DataLoader[Any]) -> Any:
    """Returns how a loader's workers shall start, as its `multiprocessing_context`: the loader's and user's choice."""
    chosen = loader.multiprocessing_context
    nobody_chose = chosen is None and multiprocessing.get_start_method(allow_none=True) is None
    return "fork" if nobody_chose and sys.platform == "linux" else chosen


class WorkerStarter:
    """A DataLoader whose workers start as those of a rebuilt one do, and which else is iterated as it is.

    Args:
        loader: the user's; it is changed only while it starts its workers.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        """Starts the workers."""
        loader = self._loader
        before = loader.multiprocessing_context, loader.worker_init_fn
        loader.multiprocessing_context, loader.worker_init_fn = start_context(loader), shielded(loader.worker_init_fn)
        try:
            return iter(loader)
        finally:
            loader.multiprocessing_context, loader.worker_init_fn = before


def has_workers(loader: Any) -> bool:
    """Whether a loader is a DataLoader that starts workers."""
    return isinstance(loader, DataLoader) and loader.num_workers > 0


def check_workers_find_recipe(loader: Any, split: str) -> None:
    """Looks for what the workers that are not forked would fail to import, which torch tells as their sudden end.

    Args:
        loader: only a DataLoader with workers is looked at.
        split: the loader's name.

    Raises:
        UsageError: they need the recipe's module, and its file has a name by which it cannot be imported.
    """
    if not has_workers(loader) or not any(name.startswith(UNIMPORTABLE) for name in list(sys.modules)):
        return
    way = _way_of(loader)
    if way == "fork":
        return
    needed = _RecipeReferences()
    # What cannot be pickled is told by torch, in this process.
    with contextlib.suppress(Exception):
        needed.dump((loader.dataset, loader.collate_fn, loader.worker_init_fn))
    if needed.name is not None:
        raise UsageError(
            f"the {split} loader's workers start by {way}, and so cannot find {needed.name} of the recipe "
            f"{sys.modules[needed.module].__file__}: by its name Python imports another module, or none. Rename the "
            "file, as in my_recipe.py, or give the DataLoader multiprocessing_context='fork'."
        )


def _way_of(loader: DataLoader[Any]) -> str:
    """Asks for no default, which would then stand for a choice."""
    context = start_context(loader)
    if context is None:
        return multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return context if isinstance(context, str) else str(context.get_start_method())


class _RecipeReferences(pickle.Pickler):
    """Notes a class or function of an unimportable recipe among what would be sent to a worker; keeps nothing."""

    def __init__(self) -> None:
        super().__init__(self, protocol=pickle.HIGHEST_PROTOCOL)
        self.name: str | None = None
        self.module = ""

    def write(self, data: bytes) -> int:
        """Drops what is pickled."""
        return len(data)

    def persistent_id(self, thing: Any) -> str | None:
        """Leaves numbers out, which would be copied for nothing."""
        if isinstance(thing, (type, FunctionType)) and str(thing.__module__).startswith(UNIMPORTABLE):
            self.name, self.module = thing.__qualname__, thing.__module__
        return "numbers" if isinstance(thing, (torch.Tensor, np.ndarray)) else None
