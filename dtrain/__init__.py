"""dtrain: your PyTorch training steps, unchanged, on one CPU or many ranks.

The public names load on first use, so that ``import dtrain`` brings in
neither torch nor pandas.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dtrain.version import __version__

_HOME_OF = {
    "Callback": "dtrain.engine.hooks",
    "ConfigError": "dtrain.errors",
    "DataError": "dtrain.errors",
    "DtrainError": "dtrain.errors",
    "KerasModel": "dtrain.api.keras",
    "History": "dtrain.rundir.history",
    "Mean": "dtrain.engine.metrics",
    "Meter": "dtrain.api.script",
    "RankError": "dtrain.errors",
    "RecipeError": "dtrain.errors",
    "Run": "dtrain.engine.run",
    "StepError": "dtrain.errors",
    "StopRequested": "dtrain.errors",
    "UsageError": "dtrain.errors",
    "WorldError": "dtrain.errors",
    "export": "dtrain.tools.export.api",
    "gather": "dtrain.model.gather",
    "is_main": "dtrain.api.here",
    "load": "dtrain.trainer.load",
    "load_weights": "dtrain.trainer.load",
    "prepare": "dtrain.api.script",
    "print_main": "dtrain.api.here",
    "rank": "dtrain.api.here",
    "read_history": "dtrain.rundir.history",
    "run": "dtrain.api.script_run",
    "save_weights": "dtrain.api.script",
    "train_model": "dtrain.api.function",
    "world_size": "dtrain.api.here",
}

if TYPE_CHECKING:
    from dtrain.api.function import train_model
    from dtrain.api.here import is_main, print_main, rank, world_size
    from dtrain.api.keras import KerasModel
    from dtrain.api.script import Meter, prepare, save_weights
    from dtrain.api.script_run import run
    from dtrain.engine.hooks import Callback
    from dtrain.engine.metrics import Mean
    from dtrain.engine.run import Run
    from dtrain.errors import (
        ConfigError,
        DataError,
        DtrainError,
        RankError,
        RecipeError,
        StepError,
        StopRequested,
        UsageError,
        WorldError,
    )
    from dtrain.model.gather import gather
    from dtrain.rundir.history import History, read_history
    from dtrain.tools.export.api import export
    from dtrain.trainer.load import load, load_weights

__all__ = [
    "Callback",
    "ConfigError",
    "DataError",
    "DtrainError",
    "History",
    "KerasModel",
    "Mean",
    "Meter",
    "RankError",
    "RecipeError",
    "Run",
    "StepError",
    "StopRequested",
    "UsageError",
    "WorldError",
    "__version__",
    "export",
    "gather",
    "is_main",
    "load",
    "load_weights",
    "prepare",
    "print_main",
    "rank",
    "read_history",
    "run",
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
