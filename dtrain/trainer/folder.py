"""A run's folder: made for a new run, or taken up again where the run in it goes on."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.checkpoint.compat import differences_before_training
from dtrain.checkpoint.folder import MANIFEST, Saved, check_place, remove, remove_leftovers, set_aside, verify
from dtrain.checkpoint.locate import ResumePoint, checkpoint_at, find_good
from dtrain.config import Settings, load_settings
from dtrain.config.calls import is_call, way
from dtrain.config.keeping import write_secrets
from dtrain.config.recipe_file import title_of
from dtrain.config.saved import check_plain
from dtrain.errors import CheckpointError, UsageError
from dtrain.files import aside_name, write_below
from dtrain.launch.monitor.exit_report import part_of
from dtrain.layout import CHECKPOINTS, CONFIG, HISTORY, OWNER, SECRETS, SLURM, STARTS, VALIDATIONS
from dtrain.provenance.kept import holds_copies_alone
from dtrain.rundir.claims import CLAIMS
from dtrain.rundir.history import History
from dtrain.trainer.initial import InitialWeights

logger = logging.getLogger(__name__)

_NOT_OF_A_RUN = (OWNER, SLURM, STARTS, SECRETS)  # what may be there before a run is: a job is submitted first


@dataclass(frozen=True)
class OpenRun:
    """A run's folder, as rank 0 found or made it.

    Attributes:
        folder: where the run is kept.
        found: the checkpoint that is gone on from, None for a run that begins.
        again: whether the folder was there before.
    """

    folder: Path
    found: ResumePoint | None = None
    again: bool = False


def open_folder(
    settings: Settings, resume: str, usable: Callable[[Saved], str], own: Callable[[Path], None]
) -> OpenRun:
    """Makes a run's folder or finds the run in it; nothing in a folder that was there is changed yet.

    What is in a folder is looked at once it is owned: between its making and that, another process may have trained
    a whole run in it.

    Args:
        settings: the config.
        resume: "auto", "never", or the path of a run or of one of its checkpoints.
        usable: returns why a checkpoint that is whole is skipped checkpoint, or nothing.
        own: takes the run's folder, before anything in it is looked at.

    Raises:
        UsageError: the folder cannot be made, holds something else, or another process has it.
        CheckpointError: it has checkpoints, and none is good.
    """
    if resume not in ("auto", "never"):
        return _named_by_user(settings, Path(resume).expanduser(), usable, own)
    again = resume == "auto" and settings.config.run.name is not None
    folder = make_folder(settings, again=again)
    own(folder)
    if again and any(not _is_beside(path) for path in folder.iterdir()):
        return _again(folder, settings, usable)
    return OpenRun(_begun(folder, settings))


def _is_beside(path: Path) -> bool:
    """Whether a file may be there before a run is."""
    return path.name in _NOT_OF_A_RUN or path.name.startswith(CLAIMS)


def _begun(folder: Path, settings: Settings) -> Path:
    """Puts the config into a new run's folder, which is owned, and empty still."""
    if any(not _is_beside(path) for path in folder.iterdir()):
        raise UsageError(f"{folder}: another process has started a run there. Choose another run.name.")
    _write_config(folder, settings)
    return folder


def _write_config(folder: Path, settings: Settings) -> None:
    """Writes the config, and beside it, for the owner alone, the secrets that it masks."""
    write_secrets(folder, settings.secrets())
    write_below(folder, CONFIG, settings.to_yaml())


def _made(settings: Settings, own: Callable[[Path], None]) -> Path:
    folder = make_folder(settings)
    own(folder)
    return _begun(folder, settings)


def _named_by_user(
    settings: Settings, path: Path, usable: Callable[[Saved], str], own: Callable[[Path], None]
) -> OpenRun:
    if (path / CHECKPOINTS).is_dir():
        own(path)
        found = find_good(path / CHECKPOINTS, usable)
        if found is not None:
            return OpenRun(path, found, again=True)
    if not (path / MANIFEST).is_file():
        raise UsageError(f"--resume {path}: no checkpoint here. Use a run's folder, or one of its checkpoints.")
    saved = checkpoint_at(path)
    return OpenRun(_made(settings, own), ResumePoint(saved))


def _again(folder: Path, settings: Settings, usable: Callable[[Saved], str]) -> OpenRun:
    _check_checkpoints(folder / CHECKPOINTS)
    found = find_good(folder / CHECKPOINTS, usable)
    if found is None:
        _check_begins_anew(folder, settings)
    return OpenRun(folder, found, again=True)


def _check_checkpoints(path: Path) -> None:
    """Whether what has the name of the checkpoints' folder is one; a link below a run's folder is not followed."""
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
        what = "a symbolic link, which is not followed" if path.is_symlink() else "no folder"
        raise UsageError(
            f"{path} is {what}. Move it away; to keep checkpoints elsewhere, put run.dir or the run's folder there, "
            "or make it the link."
        )


def _check_begins_anew(folder: Path, settings: Settings) -> None:
    """Whether a folder without a checkpoint is that of this run, ended before its first checkpoint."""
    another = way(settings, "run.name")
    kept = f"Choose another {another}{'' if is_call(settings.config.recipe) else ', or omit it'}."
    refusal = f"{another.rstrip('=')} = {settings.config.run.name!r}: {folder} already exists and is not overwritten"
    if not (folder / CONFIG).is_file():
        # A kill may have left the config half written, under another name.
        half = part_of(folder / CONFIG).name
        rest = [path for path in folder.iterdir() if not _is_beside(path) and path.name != half]
        if not all(holds_copies_alone(path) for path in rest):
            raise UsageError(f"{refusal}; it contains no run. {kept}")
        return
    check_plain(folder / CONFIG)
    before = load_settings(str(folder / CONFIG), [], environ={})
    differences = differences_before_training(before, settings)
    if differences:
        raise UsageError(f"{refusal}; it contains another run without a checkpoint: {'; '.join(differences)}. {kept}")


def make_folder(settings: Settings, *, again: bool = False) -> Path:
    """Makes a folder for a new run; one that is there already is never written to.

    Args:
        settings: the config.
        again: whether one that is there already is returned.

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
            if again and folder.is_dir():
                return folder
            if run.name is not None:
                raise UsageError(
                    f"run.name = {run.name!r}: {folder} already exists and is not overwritten. "
                    "Choose another run.name, or omit it."
                ) from None
            continue
        except OSError as error:
            given = f"run.dir = {run.dir!r} ({settings.place_of('run.dir')})"
            given += "" if run.name is None else f", run.name = {run.name!r} ({settings.place_of('run.name')})"
            given = f"run = {str(folder)!r}" if is_call(settings.config.recipe) else given
            where = way(settings, "run.dir")  # run= in a call
            raise UsageError(
                f"{given}: cannot create {folder}: {error.strerror}. Choose a {where} that can be written to."
            ) from None
        return folder
    raise UsageError(f"run.dir = {run.dir!r}: there are already a thousand runs named {stem}.")


def take_up(
    opened: OpenRun, settings: Settings, rows: list[dict[str, Any]], initial: InitialWeights | None = None
) -> History:
    """Readies a folder for its run to go on: what is damaged or comes later is put out of the way. Rank 0 alone.

    Args:
        opened: the folder; its checkpoint was found to fit.
        settings: the config, which may ask for more epochs now.
        rows: the history up to the checkpoint.
        initial: the weights that the net was built with, which are kept.

    Returns:
        the history, of these rows alone.
    """
    folder = opened.folder
    if initial is not None:
        initial.keep(folder)
    if not opened.again:
        return History.resumed(folder / HISTORY, rows)
    remove_leftovers(folder / CHECKPOINTS)
    for path in () if opened.found is None else opened.found.newer:
        _out_of_the_way(path)
    for name in (HISTORY, VALIDATIONS) if opened.found is None else ():
        if os.path.lexists(folder / name):
            _keep_aside(folder / name)
    if opened.found is not None and rows and not os.path.lexists(folder / HISTORY):
        logger.warning("%s is missing: rewritten from the checkpoint", folder / HISTORY)
    _write_config(folder, settings)
    return History.resumed(folder / HISTORY, rows)


def _out_of_the_way(path: Path) -> None:
    try:
        check_place(path, verify(path))
    except CheckpointError as error:
        logger.warning("%s; it is now %s", error, set_aside(path).name)
    else:
        remove(path)  # what it holds is trained anew, the same way


def _keep_aside(path: Path) -> None:
    """A history without a checkpoint is computed anew; the old one stays under another name."""
    path.rename(path.with_name(aside_name(path.parent, path.name)))
