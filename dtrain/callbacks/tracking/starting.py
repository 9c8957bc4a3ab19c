"""From a config to the trackers of a run."""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dtrain.callbacks.tracking.accelerated import backends
from dtrain.callbacks.tracking.base import TrackedRun
from dtrain.callbacks.tracking.files import ABOUT, END, IDS, StepLog, read_json, shown, write_json
from dtrain.callbacks.tracking.mlflow_tracker import MlflowBackend, without_password
from dtrain.callbacks.tracking.threaded import Threaded
from dtrain.callbacks.tracking.tracking import Tracking
from dtrain.callbacks.tracking.wandb_tracker import WandbTracker
from dtrain.config import Settings
from dtrain.config.schema import TrackConfig, WandbConfig
from dtrain.layout import MEDIA, TRACKING
from dtrain.rundir.media import read_media


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
        about: what `dtrain.callbacks.tracking.about.about_run` returned.
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
    known = {**(ids or {}), **read_json(folder / TRACKING / IDS)}
    config = _told(settings)
    tracking = Tracking(folder, log, every=track.every_seconds, device=device, artifacts=track.artifacts)
    content: dict[str, Any] = {"name": folder.name, "config": config, "about": about}
    write_json(folder / TRACKING / END, {})
    if wandb is not None:
        run_id = known.get("wandb") or secrets.token_hex(4)
        write_json(folder / TRACKING / ABOUT, {"wandb": {**wandb.model_dump(), "id": run_id}, **content})
        tracking.trackers.append(WandbTracker(folder, run_id, wandb.wait_seconds))
        tracking.note_ids()
    else:
        write_json(folder / TRACKING / ABOUT, content)
    what = TrackedRun(folder, config, about, known, updates)
    remedy = f"dtrain sync {shlex.quote(str(shown(folder)))}"
    threads = [
        Threaded(
            backend,
            known.get(backend.name, ""),
            rows,
            noted=tracking.note_ids,
            remedy=remedy if backend.name == MlflowBackend.name else "",
        )
        for backend in backends(track, what)
    ]
    tracking.trackers += threads
    before = [entry for entry in read_media(folder) if entry.step <= updates]  # later ones are made again
    for thread in threads:
        for entry in before:
            thread.log_media(entry, folder / MEDIA)
        thread.begin()
    return tracking


def _told(settings: Settings) -> dict[str, Any]:
    """The config as trackers are told of it: not where the recipe lies on this machine, and no password."""
    config = settings.plain()
    mlflow = config["track"]["mlflow"]
    if mlflow and "@" in (mlflow["uri"] or ""):
        mlflow["uri"] = without_password(mlflow["uri"])
    return {**config, "recipe": settings.config.recipe}


def _wandb(track: TrackConfig) -> WandbConfig | None:
    """The section, with W&B's own variable for the mode, where that asks for less; None where nothing is to be done."""
    wandb, asked = track.wandb, os.environ.get("WANDB_MODE", "")
    if wandb is not None and wandb.mode == "online" and asked in ("offline", "disabled"):
        wandb = wandb.model_copy(update={"mode": asked})
    return None if wandb is None or wandb.mode == "disabled" else wandb
