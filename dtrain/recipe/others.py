"""What a recipe has besides net, optimizer and schedule: what else has a state, several training loaders."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset, Sampler

from dtrain.config import Settings
from dtrain.data.loader_group import grouped
from dtrain.data.sources import parts_of
from dtrain.engine.train_step import Task
from dtrain.engine.valid_loaders import by_name
from dtrain.model.attributes import attributes_of


def others_with_state(of_file: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Returns what else has a state, by its name: objects of the recipe's file, attributes of the net and its modules.

    What belongs to the loaders is kept with them, see `dtrain.data.sources`.

    Args:
        of_file: the names of the recipe's module.
        task: the recipe's objects.
    """
    named = dict(of_file) | attributes_of(task.module)
    own = (*task.module.modules(), task.optimizer, task.scheduler, *task.metrics.values())
    loaders = (part for one in (task.dl_train, *by_name(task.dl_valid).values()) for part in parts_of(one).values())
    known = {id(thing) for thing in (*own, *loaders)}
    found = {}
    for name, thing in named.items():
        if id(thing) not in known and _has_state(thing):
            known.add(id(thing))
            found[name] = thing
    return found


def combined(dl_train: Any, where: object, settings: Settings) -> Any:
    """Returns a mapping of training loaders as one, combined as the config says; see `dtrain.data.loader_group`.

    Raises:
        UsageError: the config does not say how, or there is one loader alone.
    """
    combine = settings.config.train.combine
    place = f" ({settings.place_of('train.combine')})" if combine else ""
    return grouped(dl_train, combine, f"train.combine{place}", str(where))


def _has_state(thing: Any) -> bool:
    methods = (getattr(thing, name, None) for name in ("state_dict", "load_state_dict"))
    elsewhere = (type, ModuleType, Optimizer, DataLoader, Sampler, IterableDataset)
    return not isinstance(thing, elsewhere) and all(callable(method) for method in methods)
