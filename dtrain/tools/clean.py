"""What of the folder of runs may be deleted: runs that ended before their first epoch, and checkpoints beyond a rule.

Looking changes nothing. Deleting owns the run first, as training does, and looks again: a run that somebody has started
meanwhile is left alone. No link is followed, and what dtrain did not write is not deleted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dtrain.checkpoint.folder import Saved, all_saved, remove
from dtrain.checkpoint.retention import RetentionPolicy
from dtrain.config.saved import load_run_settings
from dtrain.errors import StopRequested, UsageError
from dtrain.layout import (
    CHECKPOINTS,
    CODE,
    CONFIG,
    FAILURE,
    HISTORY,
    INITIAL,
    MEDIA,
    NORMS,
    OWNER,
    PROFILE,
    SECRETS,
    SLURM,
    STARTS,
    STOP,
    TRACKING,
    VALIDATIONS,
)
from dtrain.report.finding import RunLocation
from dtrain.report.runs import Run, read_run
from dtrain.rundir.lock import owned

_OURS = {CHECKPOINTS, CODE, CONFIG, FAILURE, HISTORY, INITIAL, MEDIA, NORMS, OWNER, PROFILE, SECRETS, SLURM, STARTS}
_OURS |= {STOP, TRACKING, VALIDATIONS, "logs"}
_NUMBERED = re.compile(r"(failure|history|validations|norms)-\d+\.(json|csv)")


@dataclass(frozen=True)
class Item:
    """A folder that may go.

    Attributes:
        place: of the run.
        path: the run's folder, or one of its checkpoints.
        why: it may go, in words.
        bytes: of the files in it.
    """

    place: RunLocation
    path: Path
    why: str
    bytes: int

    @property
    def is_run(self) -> bool:
        """Whether the whole run goes."""
        return self.path == self.place.folder


@dataclass(frozen=True)
class Rule:
    """Which checkpoints of a run stay.

    Attributes:
        last: so many of the last ones, at least 1.
        best: so many of the best ones, at least 1.
    """

    last: int
    best: int


@dataclass(frozen=True)
class Found:
    """What was found.

    Attributes:
        items: what may go.
        skipped: what would, but for the reason that each line says.
    """

    items: tuple[Item, ...]
    skipped: tuple[str, ...]


def find(places: Sequence[RunLocation], runs: Path, rule: Rule | None) -> Found:
    """Returns what may be deleted; changes nothing.

    Args:
        places: of the runs to look at.
        runs: the folder of runs, which each of them has to be in.
        rule: for checkpoints; None leaves them alone.

    Raises:
        UsageError: a run is not in the folder.
    """
    items: list[Item] = []
    skipped: list[str] = []
    for place in places:
        _check_inside(place.folder, runs)
        found, reason = _of_run(place, rule)
        items += found
        skipped += [f"{place.folder}: {reason}"] if reason else []
    return Found(tuple(items), tuple(skipped))


def delete(item: Item, rule: Rule | None) -> str:
    """Deletes what `find` has found, if it still is so.

    Returns:
        why it was left, in words; nothing where it is gone.
    """
    try:
        with owned(item.place.folder):
            found, reason = _of_run(item.place, rule, mine=True)
            if all(one.path != item.path for one in found):
                return reason or "it has changed meanwhile"
            remove(item.path)
    except (UsageError, StopRequested) as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or item.path}: {error.strerror}"
    return ""


def _check_inside(folder: Path, runs: Path) -> None:
    if folder.parent.resolve() != runs.resolve():
        raise UsageError(f"{folder} is not in {runs}, and only runs there are deleted. Name their folder: --dir RUNS.")


def _of_run(place: RunLocation, rule: Rule | None, *, mine: bool = False) -> tuple[list[Item], str]:
    """Returns what of a run may go, and why what would is left.

    Args:
        place: of the run.
        rule: for its checkpoints.
        mine: whether this process owns it, so that its owner is no reason.
    """
    folder = place.folder
    if folder.is_symlink():
        return [], "it is a symbolic link, which is not followed"
    run = read_run(place)
    if mine:
        run = replace(run, owner="")
    if run.owner:
        return [], f"it is in use by {run.owner}" if rule is not None or not run.cells else ""
    if run.left_nothing:
        reason = _why_not(run)
        words = f"{run.state} before its first epoch"
        return ([], reason) if reason else ([Item(place, folder, words, size_of(folder))], "")
    return _checkpoints(place, run, rule) if rule is not None else ([], "")


def _why_not(run: Run) -> str:
    """Why a run that has left nothing stays; nothing where it may go."""
    if run.job is not None:
        return "it belongs to a SLURM job, which may start it again"
    others = sorted(path.name for path in run.folder.iterdir() if not _is_ours(path.name))
    return f"it contains {', '.join(others[:3])}, not written by dtrain" if others else ""


def _is_ours(name: str) -> bool:
    return name in _OURS or name.startswith(".owner-") or _NUMBERED.fullmatch(name) is not None


def _checkpoints(place: RunLocation, run: Run, rule: Rule) -> tuple[list[Item], str]:
    folder = place.folder / CHECKPOINTS
    if folder.is_symlink():
        return [], f"{CHECKPOINTS} is a symbolic link, which is not followed"
    saved = [one for one in all_saved(folder) if not one.path.is_symlink()]
    if len(saved) < 2:
        return [], ""
    try:
        policy = load_run_settings(place.folder, []).config.checkpoint
    except UsageError as error:
        return [], f"its config cannot be read, so the best checkpoint is unknown: {error}"
    keeping = RetentionPolicy(rule.last, rule.best, policy.monitor, policy.mode)
    return [Item(place, one.path, _rank(one, keeping), size_of(one.path)) for one in keeping.beyond(saved)], ""


def _rank(one: Saved, keeping: RetentionPolicy) -> str:
    within = "" if one.step is None else ", within an epoch"
    return f"neither among the last {keeping.last} nor the best {keeping.best}{within}"


def size_of(folder: Path) -> int:
    """Returns the bytes of all files below a folder; links count as themselves."""
    return sum(path.lstat().st_size for path in _files(folder))


def _files(folder: Path) -> Iterator[Path]:
    for where, _, names in os.walk(folder):
        yield from (path for name in names if os.path.lexists(path := Path(where, name)))
