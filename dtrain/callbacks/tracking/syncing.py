"""`dtrain sync`: sends to W&B and to MLflow what of a run is not there yet.

What is sent comes from the run's own files, which hold it in one piece, however often the run was killed and resumed,
and wherever it was online. The server tells how far it is; the rest follows, in order, into the same run.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dtrain.callbacks.tracking import mlflow_tracker
from dtrain.callbacks.tracking.base import RunEnd, TrackedRun
from dtrain.callbacks.tracking.files import ABOUT, END, IDS, read_json, write_json
from dtrain.callbacks.tracking.values import Entry, Values
from dtrain.callbacks.tracking.wandb_run import NotSentError, WandbRun, everything_sent, noted_end, server
from dtrain.callbacks.tracking.wandb_worker import LOCK, alone
from dtrain.callbacks.tracking.wanted import check_installed
from dtrain.config.schema import MlflowConfig, TrackConfig
from dtrain.errors import DtrainError, UsageError
from dtrain.layout import CONFIG, MEDIA, TRACKING
from dtrain.masking import redacted
from dtrain.rundir.media import read_media

_URI = "DTRAIN_TRACK__MLFLOW__URI"


class SyncError(DtrainError):
    """A run could not be sent; its values are kept."""


@dataclass(frozen=True)
class Synced:
    """What became of a run.

    Attributes:
        epochs: rows of the history that the run has.
        moments: values within epochs that it has.
        sent: whether there was anything to send.
        where: W&B's page of the run, or MLflow's server; empty of a dry run.
        to: the tracker.
    """

    epochs: int
    moments: int
    sent: bool
    where: str = ""
    to: str = "W&B"

    def __str__(self) -> str:
        """Words such as "3 epochs and 12 values within epochs"."""
        moments = f" and {self.moments} sets of values within epochs" if self.moments else ""
        return f"{self.epochs} epoch{'s' * (self.epochs != 1)}{moments}"


def sync_run(run: Path, *, wait: float, dry_run: bool = False) -> list[Synced]:
    """Sends what of a run its trackers do not have yet: W&B's first, then MLflow's.

    Args:
        run: the run's folder.
        wait: seconds to wait for the server at the end.
        dry_run: look, and send nothing.

    Raises:
        UsageError: no such run, it is tracked by neither, is being sent, or nobody is logged in.
        SyncError: the server does not take it.
    """
    mlflow = _mlflow(run)
    found = [_sync_wandb(run, wait, dry_run=dry_run)] if _has_wandb(run) else []
    return [*found, _sync_mlflow(run, mlflow, dry_run=dry_run)] if mlflow is not None else found


def _has_wandb(run: Path) -> bool:
    return "wandb" in read_json(run / TRACKING / ABOUT)


def _mlflow(run: Path) -> MlflowConfig | None:
    """Returns where a run is tracked by MLflow, None where it is not.

    Raises:
        UsageError: there is no run, or it is tracked by nothing that can be sent to later.
    """
    if not (run / CONFIG).is_file():
        raise UsageError(f"{run}: no run here. Use a run's folder, such as runs/NAME.")
    about = read_json(run / TRACKING / ABOUT)
    config = about.get("config", {}).get("track", {}).get("mlflow")
    if config is None and "wandb" not in about:
        raise UsageError(f"{run}: this run is not tracked by W&B. Train with track.wandb.project=NAME.")
    if config is None:
        return None
    found = MlflowConfig(**config)  # its address without a user and password
    return found.model_copy(update={"uri": os.environ[_URI]}) if os.environ.get(_URI) else found


def _sync_wandb(run: Path, wait: float, *, dry_run: bool) -> Synced:
    values = Values(run)
    entries = values.news(everything=True)
    rows = sum(entry.is_row for entry in entries)
    found = Synced(rows, len(entries) - rows, sent=bool(entries) and not everything_sent(run, values))
    if dry_run or not found.sent:
        return found
    with _alone(run, LOCK):
        return Synced(found.epochs, found.moments, True, _send(run, entries, values, wait))


def _sync_mlflow(run: Path, options: MlflowConfig, *, dry_run: bool) -> Synced:
    check_installed(TrackConfig(mlflow=options))
    values = Values(run)
    entries = values.news(everything=True)
    done = mlflow_tracker.everything_sent(run, len(values.rows))
    rows = len(values.rows)
    found = Synced(rows, len(entries) - rows, sent=bool(entries) and not done, to="MLflow")
    if dry_run or not found.sent:
        return found
    with _alone(run, mlflow_tracker.LOCK):
        pass  # the one who sends has it from here on
    where = mlflow_tracker.without_password(options.uri or "MLflow's own store")
    try:
        _send_to_mlflow(run, options, entries, values)
    except Exception as error:
        why = redacted(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
        raise SyncError(f"{run}: not everything was sent to {where}: {why}. All values are kept; try again.") from error
    return replace(found, where=where)


def _send_to_mlflow(run: Path, options: MlflowConfig, entries: list[Entry], values: Values) -> None:
    about, ids, end = (read_json(run / TRACKING / name) for name in (ABOUT, IDS, END))
    backend = mlflow_tracker.MlflowBackend(options, TrackedRun(run, about["config"], about["about"], ids))
    backend.load()
    write_json(run / TRACKING / IDS, {**ids, backend.name: backend.start()})
    epoch, step = backend.last_epoch(), backend.last_moment()
    for entry in entries:
        if entry.is_row and entry.values["epoch"] > epoch:
            backend.log(entry.values, entry.values["epoch"], entry.at)
        elif not entry.is_row and entry.step > step:
            backend.log(entry.values, entry.step, entry.at)
    for one in read_media(run):
        backend.log_media(one, run / MEDIA)
    weights = Path(end["artifact"]) if end.get("artifact") else None  # a run that was resumed since has others
    backend.finish(
        RunEnd(
            failed=end.get("failed", True),
            complete=end.get("complete", False),
            rows=tuple(values.rows),
            weights=weights if weights is not None and weights.is_file() else None,
        )
    )


@contextlib.contextmanager
def _alone(run: Path, lock: str) -> Iterator[None]:
    """Keeps others from sending the run meanwhile.

    Raises:
        UsageError: somebody is at it.
    """
    with alone(run, 0, lock) as is_alone:
        if not is_alone:
            raise UsageError(f"{run}: it is still training, and sends or keeps its own values. Try again later.")
        yield


def _send(run: Path, entries: list[Entry], values: Values, wait: float) -> str:
    # What wandb's client has to say for itself is no affair of whoever sends ten runs; nor does it call home.
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    url, why = server()
    if why:
        kind = UsageError if "API key" in why else SyncError
        raise kind(f"{run}: not sent: {why}. All values are kept; try again later, or set WANDB_BASE_URL.")
    end = noted_end(run)
    if end.get("artifact") and not Path(end["artifact"]).is_file():
        end["artifact"] = None  # the run went on since, and has others
    with tempfile.TemporaryDirectory(prefix="dtrain-sync-", ignore_cleanup_errors=True) as folder:
        try:
            sent = WandbRun(run, online=True, patience=wait, keep_in=Path(folder))
            sent.send(entries, read_media(run))
            sent.finish(values, end)
        except NotSentError as error:
            raise SyncError(
                f"{run}: not everything was sent to {url}: {error}. All values are kept; try again."
            ) from error
    return sent.url
