"""What a run leaves where it did not come to its end: words for a person, `failure.json` for whoever looks later."""

from __future__ import annotations

import shlex
import socket
import sys
from pathlib import Path

from dtrain.config import Settings
from dtrain.errors import EXIT_USAGE, add_remark
from dtrain.failures import explain
from dtrain.launch.heartbeat import SETUP
from dtrain.launch.postmortem import FILE_NAME as FAILURE
from dtrain.launch.postmortem import Failure, last_checkpoint, read_failure, remarks
from dtrain.launch.reports import PEER
from dtrain.passes import Place
from dtrain.world import World


def stopped(why: str, place: Place, folder: Path, settings: Settings, resume: str) -> str:
    """What a person shall read of a run that stopped on request: where it stands, and how it goes on."""
    where = f"epoch {place.epoch}, after {place.updates} optimizer steps" if place.epoch else "the beginning"
    saved, again = last_checkpoint(folder), shlex.join(["dtrain", *sys.argv[1:]])
    if resume in ("auto", "never") or saved is None:
        again += f"{'' if settings.config.run.name else f' run.name={folder.name}'} --resume auto"
    elif Path(resume).expanduser().resolve() != folder.resolve():  # a new run, that began from another one's checkpoint
        again += f" --resume {shlex.quote(str(folder))}"
    return f"stopped {why}, in {where}; checkpoint: {saved or 'none yet'}\ngo on with: {again}"


def leave_word(folder: Path, place: Place, world: World, error: BaseException) -> None:
    """Leaves `failure.json` where no supervisor of dtrain's does, and tells so: the first rank that comes.

    A rank that lost its connection to another gives way to what that one tells.
    """
    if getattr(error, "exit_code", None) == EXIT_USAGE or not folder.is_dir():
        saved = last_checkpoint(folder)
        if saved is not None:  # with what was asked for mended, it is gone on from there
            add_remark(error, f"last checkpoint: {saved}")
        return
    there = read_failure(folder)
    if there is not None and there["cause"] != PEER:
        return
    told = explain(error).told
    failure = Failure(
        rank=world.rank,
        local_rank=world.local_rank,
        host=socket.gethostname(),
        device=str(world.device),
        epoch=place.epoch or None,
        step=place.step or None,
        phase=place.split or SETUP,
        cause=told.cause,
        exception={"type": told.type, "message": told.message},
        traceback=told.traceback,
        others={str(rank): "not known" for rank in range(world.size) if rank != world.rank},
        checkpoint=last_checkpoint(folder),
    )
    try:
        failure.write(folder)
    except OSError as unwritten:  # a full disk: what ended the run is told, not this
        add_remark(error, f"{folder / FAILURE} could not be written: {unwritten.strerror}")
    for remark in (f"on {socket.gethostname()}, device {world.device}", *remarks(folder)):
        add_remark(error, remark)
