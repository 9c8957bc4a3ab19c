"""From a config to the trackers of a run."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dtrain.config import Settings
from dtrain.config.schema import TrackConfig, WandbConfig
from dtrain.tracking.accelerated import What, backends
from dtrain.tracking.base import Tracker
from dtrain.tracking.files import ABOUT, FOLDER, IDS, StepLog, read_json, write_json
from dtrain.tracking.threaded import Threaded
from dtrain.tracking.tracking import Tracking
from dtrain.tracking.wandb_tracker import WandbTracker


def start_tracking(  # noqa: PLR0913 - keyword-only
    settings: Settings,
    folder: Path,
    *,
    about: Mapping[str, Any],
    device: torch.device,
    rows: Sequence[Mapping[str, Any]] = (),
    updates: int = 0,
    ids: Mapping[str, str] | None = None,
) -> Tracking | None:
    """Starts the trackers that the config names; call it on global rank 0 alone. It waits for no network.

    Args:
        settings: the run's config.
        folder: the run's folder.
        about: what `dtrain.tracking.about.about_run` returned.
        device: this rank's.
        rows: the history that the run goes on from.
        updates: optimizer steps up to there.
        ids: tracker's name -> the id of its run, where the folder does not say.

    Returns:
        what the engine tells; None where no tracker is asked for.
    """
    track = settings.config.track
    wandb = _wandb(track)
    if wandb is None and not (track.tensorboard or track.mlflow or track.trackio):
        return None
    log = StepLog(folder, len(rows), updates)
    known = {**(ids or {}), **read_json(folder / FOLDER / IDS)}
    config = _told(settings)
    tracking = Tracking(folder, log, every=track.every_seconds, device=device, artifacts=track.artifacts)
    if wandb is not None:
        run_id = known.get("wandb") or secrets.token_hex(4)
        content = {"wandb": {**wandb.model_dump(), "id": run_id}, "name": folder.name, "config": config, "about": about}
        write_json(folder / FOLDER / ABOUT, content)
        tracking.trackers.append(WandbTracker(folder, run_id, wandb.wait_seconds))
        tracking.note_ids()
    what = What(folder, config, about, known, updates, len(rows))
    for backend in backends(track, what):
        is_known = backend.name in known
        tracker = Threaded(backend, known.get(backend.name, ""), log.told if is_known else 0)
        tracking.trackers.append(tracker)
        if not is_known:
            _tell_before(tracker, rows)
    return tracking


def _told(settings: Settings) -> dict[str, Any]:
    """The config as trackers are told of it: not where the recipe lies on this machine, and no password."""
    config = settings.plain()
    mlflow = config["track"]["mlflow"]
    if mlflow and "@" in (mlflow["uri"] or ""):
        scheme, _, rest = mlflow["uri"].partition("://")
        mlflow["uri"] = f"{scheme}://{rest.rpartition('@')[2]}"
    return {**config, "recipe": settings.config.recipe}


def _wandb(track: TrackConfig) -> WandbConfig | None:
    """The section, with W&B's own variable for the mode, where that asks for less; None where nothing is to be done."""
    wandb, asked = track.wandb, os.environ.get("WANDB_MODE", "")
    if wandb is not None and wandb.mode == "online" and asked in ("offline", "disabled"):
        wandb = wandb.model_copy(update={"mode": asked})
    return None if wandb is None or wandb.mode == "disabled" else wandb


def _tell_before(tracker: Tracker, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows of a run that this tracker hears of only now."""
    for row in rows:
        tracker.log_epoch(row)
