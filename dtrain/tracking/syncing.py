"""`dtrain sync`: sends to W&B what of a run is not there yet.

What is sent comes from the run's own files, which hold it in one piece, however often the run was killed and resumed,
and wherever it was online. W&B's server tells how far it is; the rest follows, in order, into the same run.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dtrain.config.saved import CONFIG
from dtrain.errors import DtrainError, UsageError
from dtrain.tracking.beside import alone
from dtrain.tracking.files import ABOUT, FOLDER, read_json
from dtrain.tracking.values import Entry, Values
from dtrain.tracking.wandb_run import NotSentError, WandbRun, everything_sent, noted_end, server


class SyncError(DtrainError):
    """A run could not be sent; its values are kept."""


@dataclass(frozen=True)
class Synced:
    """What became of a run.

    Attributes:
        epochs: rows of the history that the run has.
        moments: values within epochs that it has.
        sent: whether there was anything to send.
        where: W&B's page of the run, or, of a dry run, the server.
    """

    epochs: int
    moments: int
    sent: bool
    where: str = ""

    def __str__(self) -> str:
        """Words such as "3 epochs and 12 values within epochs"."""
        moments = f" and the values of {self.moments} moments within them" if self.moments else ""
        return f"{self.epochs} epoch{'s' * (self.epochs != 1)}{moments}"


def sync_run(run: Path, *, wait: float, dry_run: bool = False) -> Synced:
    """Sends what of a run W&B does not have yet.

    Args:
        run: the run's folder.
        wait: seconds to wait for the server at the end.
        dry_run: look, and send nothing.

    Raises:
        UsageError: there is no such run, it is not tracked by W&B, is being sent, or nobody is logged in.
        SyncError: the server does not take it.
    """
    check_tracked(run)
    values = Values(run)
    entries = values.news(everything=True)
    rows = sum(entry.is_row for entry in entries)
    found = Synced(rows, len(entries) - rows, sent=bool(entries) and not everything_sent(run, values))
    if dry_run or not found.sent:
        return found
    with alone(run, seconds=0) as is_alone:
        if not is_alone:
            raise UsageError(f"{run}: its training is going on, and sends or keeps its values itself. Try again later.")
        return Synced(found.epochs, found.moments, True, _send(run, entries, values, wait))


def check_tracked(run: Path) -> None:
    """Looks whether there is anything that could be sent.

    Raises:
        UsageError: there is not.
    """
    if not (run / CONFIG).is_file():
        raise UsageError(f"{run}: there is no run here. Give a run's folder, such as runs/NAME.")
    if "wandb" not in read_json(run / FOLDER / ABOUT):
        raise UsageError(f"{run}: this run is not tracked by W&B. Train with track.wandb.project=NAME.")


def _send(run: Path, entries: list[Entry], values: Values, wait: float) -> str:
    # What wandb's client has to say for itself is no affair of whoever sends ten runs; nor does it call home.
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    url, why = server()
    if why:
        kind = UsageError if "API key" in why else SyncError
        raise kind(f"{run}: not sent, since {why}. All is kept; try again later, or set WANDB_BASE_URL.")
    end = noted_end(run)
    if end.get("artifact") and not Path(end["artifact"]).is_file():
        end["artifact"] = None  # the run went on since, and has others
    with tempfile.TemporaryDirectory(prefix="dtrain-sync-", ignore_cleanup_errors=True) as folder:
        try:
            sent = WandbRun(run, online=True, patience=wait, keep_in=Path(folder))
            sent.send(entries)
            sent.finish(values, end)
        except NotSentError as error:
            raise SyncError(f"{run}: not all is sent to {url}, since {error}. All is kept; try again.") from error
    return sent.url
