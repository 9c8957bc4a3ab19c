"""Experiment trackers, behind one small interface. Only global rank 0 has any."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from dtrain.config import RunConfig


class Tracker(Protocol):
    """What the engine tells a tracker."""

    name: str

    def run_id(self) -> str:
        """What a resumed run needs to go on with the same one."""

    def log_epoch(self, row: dict[str, Any]) -> None:
        """Takes one epoch's row of the history."""

    def finish(self, *, failed: bool) -> None:
        """Ends the tracker's run."""


class WandbTracker:
    """Weights & Biases: one run, its metrics per epoch, its config; never the environment or the command line.

    Args:
        config: the run's config; `track.wandb` must be set.
        folder: the run's folder, where W&B writes.
        name: the run's name.
        run_id: of the W&B run that is gone on with, None for a new one.
    """

    name = "wandb"

    def __init__(self, config: RunConfig, folder: Path, name: str, run_id: str | None = None) -> None:
        import wandb

        options = config.track.wandb
        if options is None:
            raise ValueError("track.wandb is not set")
        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            mode=options.mode,
            name=name,
            id=run_id,
            resume=None if run_id is None else "allow",
            dir=str(folder),
            config=config.model_dump(mode="json"),
            # x_disable_meta: host, user, command line and git state stay here; so does the console.
            settings=wandb.Settings(x_disable_meta=True, console="off", save_code=False, silent=True),
        )
        self._run.define_metric("epoch", hidden=True)
        self._run.define_metric("*", step_metric="epoch")

    def run_id(self) -> str:
        """Returns W&B's own id of the run."""
        return str(self._run.id)

    def log_epoch(self, row: dict[str, Any]) -> None:
        """Sends one row; the step that W&B counts is the epoch."""
        self._run.log(row, step=row["epoch"])

    def finish(self, *, failed: bool) -> None:
        """Ends the run with exit code 0 or 1."""
        self._run.finish(exit_code=int(failed))


def make_trackers(config: RunConfig, folder: Path, name: str, ids: Mapping[str, str]) -> list[Tracker]:
    """Starts the trackers that the config names; call it on global rank 0 alone.

    Args:
        config: the run's.
        folder: the run's folder.
        name: the run's name.
        ids: tracker's name -> the id of its run, where that is gone on with.
    """
    return [WandbTracker(config, folder, name, ids.get("wandb"))] if config.track.wandb is not None else []
