"""dtrain: your PyTorch training steps, unchanged, on one CPU or many ranks.

The public names load on first use, so that ``import dtrain`` brings in
neither torch nor pandas.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME_OF = {
    "ConfigError": "dtrain.errors",
    "DataError": "dtrain.errors",
    "DtrainError": "dtrain.errors",
    "KerasModel": "dtrain.keras",
    "History": "dtrain.history",
    "Mean": "dtrain.metrics",
    "Meter": "dtrain.script",
    "RankError": "dtrain.errors",
    "RecipeError": "dtrain.errors",
    "StepError": "dtrain.errors",
    "UsageError": "dtrain.errors",
    "WorldError": "dtrain.errors",
    "is_main": "dtrain.here",
    "prepare": "dtrain.script",
    "print_main": "dtrain.here",
    "rank": "dtrain.here",
    "read_history": "dtrain.history",
    "save_weights": "dtrain.script",
    "train_model": "dtrain.training",
    "world_size": "dtrain.here",
}

if TYPE_CHECKING:
    from dtrain.errors import (
        ConfigError,
        DataError,
        DtrainError,
        RankError,
        RecipeError,
        StepError,
        UsageError,
        WorldError,
    )
    from dtrain.here import is_main, print_main, rank, world_size
    from dtrain.history import History, read_history
    from dtrain.keras import KerasModel
    from dtrain.metrics import Mean
    from dtrain.script import Meter, prepare, save_weights
    from dtrain.training import train_model

__all__ = [
    "ConfigError",
    "DataError",
    "DtrainError",
    "History",
    "KerasModel",
    "Mean",
    "Meter",
    "RankError",
    "RecipeError",
    "StepError",
    "UsageError",
    "WorldError",
    "__version__",
    "is_main",
    "prepare",
    "print_main",
    "rank",
    "read_history",
    "save_weights",
    "train_model",
    "world_size",
]


def __getattr__(name: str) -> Any:
    """Loads a public name on first use (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'dtrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the public names, the ones not loaded yet included."""
    return sorted(__all__)
