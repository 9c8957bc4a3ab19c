"""The plain attributes of a net and its modules, which are no part of its `state_dict()`."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dtrain.errors import UsageError

_OWN = frozenset(vars(nn.Module()))
_LONGEST = 1000  # a longer list is data
_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Returns the attributes of a net and all modules in it by name, as in "model.layers.0.scaler".

    Of one that is a list, tuple or dict, its elements come besides, as in "model.teachers.0".
    """
    found: dict[str, Any] = {}
    for path, part in module.named_modules(prefix="model"):
        for name, value in vars(part).items():
            if name in _OWN:
                continue
            found[f"{path}.{name}"] = value
            if type(value) in (list, tuple, dict) and len(value) > _LONGEST:
                continue
            if type(value) in (list, tuple):
                found |= {f"{path}.{name}.{number}": inner for number, inner in enumerate(value)}
            elif type(value) is dict:
                found |= {f"{path}.{name}.{key}": inner for key, inner in value.items()}
    return found


def streams_of(module: nn.Module) -> dict[str, Any]:
    """Returns the random generators among a net's attributes, by name."""
    return {name: value for name, value in attributes_of(module).items() if type(value) in _GENERATORS}


def quantities_of(module: nn.Module) -> dict[str, float]:
    """Returns the plain numbers among a net's attributes, by name; of a tensor with one element, its value.

    Modules with an extra state (`get_extra_state`) are left out, which has theirs.
    """
    found = {}
    for path, part in module.named_modules(prefix="model"):
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            continue
        for name, value in vars(part).items():
            if type(value) in (int, float) or (_is_number(value) and not value.requires_grad):
                found[f"{path}.{name}"] = float(value)
    return found


def numbers_in(values: Mapping[str, Any]) -> dict[str, float]:
    """Returns the plain numbers among values, by name."""
    return {name: value for name, value in list(values.items()) if type(value) in (int, float)}


def modules_of(files: Iterable[Path]) -> list[ModuleType]:
    """Returns the imported modules of these files."""
    wanted = {str(file) for file in files}
    modules = (module for module in list(sys.modules.values()) if isinstance(module, ModuleType))
    return [module for module in modules if vars(module).get("__file__") in wanted]


def _is_number(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter) and value.numel() == 1


def check_materialized(module: nn.Module) -> None:
    """Looks for parameters and buffers of lazy modules that have met no batch yet.

    Raises:
        UsageError: there is one; it is named.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            path = name.rpartition(".")[0]
            raise UsageError(
                f"{name} has no shape yet: {path or 'the net'} is a lazy module "
                f"({type(module.get_submodule(path)).__name__}). Run one batch through the model first, as in "
                "model(features).",
                on_all_ranks=True,
            )
