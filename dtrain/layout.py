"""The names of what is in a run's folder, and of its checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

CONFIG = "config.yaml"
HISTORY = "history.csv"
VALIDATIONS = "validations.csv"  # those within epochs
NORMS = "norms.csv"
STARTS = "starts.jsonl"
OWNER = "owner.lock"
SECRETS = "secrets.json"
STOP = "STOP"  # where it lies, training is to stop
FAILURE = "failure.json"

CHECKPOINTS = "checkpoints"
PROFILE = "profile"
TRACKING = "tracking"
MEDIA = "media"  # images and the like of the user's hooks
INITIAL = "initial-weights"  # the weights that the run began with, where they were another run's or a file's
CODE = "code"  # copies of the sources that the run trains with

SLURM = "slurm"
JOB = "job.json"  # in that folder
SCRIPT = "train.sbatch"

_CHECKPOINT = re.compile(r"epoch-(\d{1,18})(?:-step-(\d{1,18}))?")


def checkpoint_name(epoch: int, step: int | None) -> str:
    """Returns a checkpoint's name: of an epoch's end, or within one."""
    return f"epoch-{epoch}" if step is None else f"epoch-{epoch}-step-{step}"


def checkpoint_place(name: str) -> tuple[int, int | None] | None:
    """Returns epoch and step of a checkpoint's name, None where it is no such name; see `checkpoint_name`."""
    match = _CHECKPOINT.fullmatch(name)
    if match is None:
        return None
    place = int(match[1]), None if match[2] is None else int(match[2])
    return place if checkpoint_name(*place) == name else None  # neither epoch-04 nor other writings of a number


def checkpoints_in(folder: Path) -> dict[Path, tuple[int, int | None]]:
    """Returns all that have a checkpoint's name, whole or not, with epoch and step, in their order in the run.

    Args:
        folder: of the checkpoints.
    """
    found: dict[Path, tuple[int, int | None]] = {}
    for path in folder.glob("epoch-*"):
        place = checkpoint_place(path.name)
        if place is not None and (path.is_dir() or path.is_symlink()):
            found[path] = place
    return dict(sorted(found.items(), key=lambda item: _order(item[1])))


def _order(place: tuple[int, int | None]) -> tuple[int, float]:
    """Of one epoch, its end comes last."""
    return place[0], float("inf") if place[1] is None else place[1]
