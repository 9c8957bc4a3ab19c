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
    "Mean": "dtrain.metrics",
    "RecipeError": "dtrain.errors",
    "StepError": "dtrain.errors",
    "UsageError": "dtrain.errors",
    "WorldError": "dtrain.errors",
    "read_history": "dtrain.history",
    "train_model": "dtrain.training",
}

if TYPE_CHECKING:
    from dtrain.errors import (
        ConfigError,
        DataError,
        DtrainError,
        RecipeError,
        StepError,
        UsageError,
        WorldError,
    )
    from dtrain.history import read_history
    from dtrain.keras import KerasModel
    from dtrain.metrics import Mean
    from dtrain.training import train_model

__all__ = [
    "ConfigError",
    "DataError",
    "DtrainError",
    "KerasModel",
    "Mean",
    "RecipeError",
    "StepError",
    "UsageError",
    "WorldError",
    "__version__",
    "read_history",
    "train_model",
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
