"""A run's folder: made for a new run, or taken up again where the run in it goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.checkpoint.folder import MANIFEST, Saved, remove, remove_leftovers, set_aside, verify
from dtrain.config import Settings, load_settings
from dtrain.errors import CheckpointError, UsageError
from dtrain.history import FILE_NAME, History
from dtrain.launch.reports import part_of, write_whole
from dtrain.lock import FILE_NAME as OWNER
from dtrain.recipe_file import title_of
from dtrain.resuming.finding import Found, checkpoint_at, find_good
from dtrain.resuming.fitting import config_differences
from dtrain.slurm.record import FOLDER as SLURM
from dtrain.starts import FILE_NAME as STARTS

logger = logging.getLogger(__name__)

CONFIG, CHECKPOINTS, VALIDATIONS = "config.yaml", "checkpoints", "validations.csv"
_NOT_OF_A_RUN = (OWNER, SLURM, STARTS)  # what may be there before a run is: a job is submitted first


@dataclass(frozen=True)
class Opened:
    """A run's folder, as rank 0 found or made it.

    Attributes:
        folder: where the run is kept.
        found: the checkpoint that is gone on from, None for a run that begins.
        again: whether the folder was there before.
        explicit: whether the user named what to go on from.
    """

    folder: Path
    found: Found | None = None
    again: bool = False
    explicit: bool = False


def open_folder(settings: Settings, resume: str, usable: Callable[[Saved], str], own: Callable[[Path], None]) -> Opened:
    """Makes a run's folder or finds the run in it; nothing in a folder that was there is changed yet.

    Args:
        settings: the config.
        resume: "auto", "never", or the path of a run or of one of its checkpoints.
        usable: returns why a checkpoint that is whole is not gone on from, or nothing.
        own: takes the run's folder, before anything in it is looked at.

    Raises:
        UsageError: the folder cannot be made, holds something else, or another process has it.
        CheckpointError: it has checkpoints, and none is good.
    """
    if resume not in ("auto", "never"):
        return _named_by_user(settings, Path(resume).expanduser(), usable, own)
    run = settings.config.run
    folder = None if run.name is None else Path(run.dir).expanduser() / run.name
    if resume == "auto" and folder is not None and folder.is_dir():
        own(folder)
        return _again(folder, settings, usable)
    return Opened(_made(settings, own))


def _made(settings: Settings, own: Callable[[Path], None]) -> Path:
    folder = make_folder(settings)
    own(folder)
    return folder


def _named_by_user(
    settings: Settings, path: Path, usable: Callable[[Saved], str], own: Callable[[Path], None]
) -> Opened:
    if (path / CHECKPOINTS).is_dir():
        own(path)
        found = find_good(path / CHECKPOINTS, usable)
        if found is not None:
            return Opened(path, found, again=True, explicit=True)
    if not (path / MANIFEST).is_file():
        raise UsageError(
            f"--resume {path}: there is no checkpoint here. Give a run's folder, or one of its checkpoints."
        )
    saved = checkpoint_at(path)
    return Opened(_made(settings, own), Found(saved), explicit=True)


def _again(folder: Path, settings: Settings, usable: Callable[[Saved], str]) -> Opened:
    found = find_good(folder / CHECKPOINTS, usable)
    if found is None:
        _check_begins_anew(folder, settings)
    return Opened(folder, found, again=True)


def _check_begins_anew(folder: Path, settings: Settings) -> None:
    """Whether a folder without a checkpoint is that of this run, ended before its first checkpoint."""
    kept = "Choose another run.name, or leave it out."
    refusal = f"run.name = {settings.config.run.name!r}: {folder} is there already and is kept as it is"
    if not (folder / CONFIG).is_file():
        # A kill may have left the config half written, under another name.
        if any(path.name not in (*_NOT_OF_A_RUN, part_of(folder / CONFIG).name) for path in folder.iterdir()):
            raise UsageError(f"{refusal}; it holds no run. {kept}")
        return
    before = load_settings(str(folder / CONFIG), [], environ={})
    differences = config_differences(before.plain(), settings.plain(), settings)
    if differences:
        raise UsageError(f"{refusal}; it holds another run without a checkpoint: {'; '.join(differences)}. {kept}")


def make_folder(settings: Settings) -> Path:
    """Makes a folder for a new run; one that is there already is never written to.

    Raises:
        UsageError: there is one of this name, or it cannot be made.
    """
    run = settings.config.run
    stem = run.name or f"{title_of(settings.config.recipe)}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1, 1000):
        folder = Path(run.dir).expanduser() / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if run.name is not None:
                raise UsageError(
                    f"run.name = {run.name!r}: {folder} is there already and is kept as it is. "
                    "Choose another run.name, or leave it out."
                ) from None
            continue
        except OSError as error:
            given = f"run.dir = {run.dir!r} ({settings.place_of('run.dir')})"
            given += "" if run.name is None else f", run.name = {run.name!r} ({settings.place_of('run.name')})"
            raise UsageError(f"{given}: cannot make {folder}: {error.strerror}.") from None
        write_whole(folder / CONFIG, settings.to_yaml())
        return folder
    raise UsageError(f"run.dir = {run.dir!r}: a thousand runs named {stem} are there.")


def take_up(opened: Opened, settings: Settings, rows: list[dict[str, Any]]) -> History:
    """Readies a folder for its run to go on: what is damaged or comes later is put out of the way. Rank 0 alone.

    Args:
        opened: the folder; its checkpoint was found to fit.
        settings: the config, which may ask for more epochs now.
        rows: the history up to the checkpoint.

    Returns:
        the history, of these rows alone.
    """
    folder = opened.folder
    if not opened.again:
        return History.resumed(folder / FILE_NAME, rows)
    remove_leftovers(folder / CHECKPOINTS)
    for path in () if opened.found is None else opened.found.newer:
        _out_of_the_way(path)
    for name in (FILE_NAME, VALIDATIONS) if opened.found is None else ():
        if (folder / name).exists():
            _keep_aside(folder / name)
    write_whole(folder / CONFIG, settings.to_yaml())
    return History.resumed(folder / FILE_NAME, rows)


def _out_of_the_way(path: Path) -> None:
    try:
        verify(path)
    except CheckpointError:
        logger.warning("the damaged checkpoint %s is now %s", path, set_aside(path).name)
    else:
        remove(path)  # what it holds is trained anew, the same way


def _keep_aside(path: Path) -> None:
    """A history without a checkpoint is computed anew; the old one stays under another name."""
    number = next(n for n in range(1, 1000) if not path.with_name(f"{path.stem}-{n}{path.suffix}").exists())
    path.rename(path.with_name(f"{path.stem}-{number}{path.suffix}"))
