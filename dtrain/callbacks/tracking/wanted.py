"""Whether the trackers that a config asks for are installed; found out without loading them."""

from __future__ import annotations

from importlib.util import find_spec

from dtrain.config.schema import TrackConfig
from dtrain.errors import UsageError


def check_installed(track: TrackConfig) -> None:
    """Looks for the libraries of the trackers that are asked for.

    Raises:
        UsageError: one is missing; it says how to get it.
    """
    wanted = {"wandb": track.wandb, "tensorboard": track.tensorboard, "mlflow": track.mlflow, "trackio": track.trackio}
    for name, asked in wanted.items():
        if asked and find_spec(name) is None:
            raise UsageError(f"track.{name} is set, and {name} is not installed: pip install {name}, or omit it.")
