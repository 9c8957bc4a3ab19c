"""What else of a user's objects has a state that a run goes on from: weight averages, scalers and the like."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset, Sampler

from dtrain.data.sources import parts_of
from dtrain.engine.train_step import Task
from dtrain.model.attributes import attributes_of


def stateful_in(values: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Returns what has a state, by its name: of some objects, and of the attributes of the net and its modules.

    What belongs to the loaders is kept with them, see `dtrain.data.sources`.

    Args:
        values: name -> object.
        task: what is trained.
    """
    named = dict(values) | attributes_of(task.module)
    own = (*task.module.modules(), task.optimizer, task.scheduler, *task.metrics.values())
    loaders = (part for loader in (task.dl_train, task.dl_valid) for part in parts_of(loader).values())
    known = {id(thing) for thing in (*own, *loaders)}
    found = {}
    for name, thing in named.items():
        if id(thing) not in known and _has_state(thing):
            known.add(id(thing))
            found[name] = thing
    return found


def _has_state(thing: Any) -> bool:
    methods = (getattr(thing, name, None) for name in ("state_dict", "load_state_dict"))
    elsewhere = (type, ModuleType, Optimizer, DataLoader, Sampler, IterableDataset)
    return not isinstance(thing, elsewhere) and all(callable(method) for method in methods)
