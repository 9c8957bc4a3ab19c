"""What a run leaves where it did not come to its end: words for a person, `failure.json` for whoever looks later."""

from __future__ import annotations

import shlex
import socket
import sys
from pathlib import Path

from dtrain.config import Settings
from dtrain.config.calls import is_call
from dtrain.distributed.world import World
from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.loop import Engine
from dtrain.engine.position import TrainPosition
from dtrain.errors import EXIT_USAGE, StopRequested, add_remark
from dtrain.files import identity_of
from dtrain.launch.monitor.describe import explain
from dtrain.launch.monitor.exit_report import PEER
from dtrain.launch.monitor.heartbeat import SETUP
from dtrain.launch.monitor.postmortem import RankFailure, last_checkpoint, read_failure, remarks
from dtrain.launch.signals.stop_request import is_ctrl_c
from dtrain.layout import FAILURE
from dtrain.masking import hide


def stopped(why: str, place: TrainPosition, folder: Path, settings: Settings, resume: str) -> str:
    """What a person shall read of a run that stopped on request: where it stands, and how it goes on."""
    where = f"epoch {place.epoch}, after {place.updates} optimizer steps" if place.epoch else "the beginning"
    saved = last_checkpoint(folder)
    reached = f"stopped {why}, in {where}; checkpoint: {saved or 'none yet'}"
    if is_call(settings.config.recipe):
        return f"{reached}\nresume with: the same call ({settings.config.recipe}, run={str(folder)!r})"
    again = shlex.join(["dtrain", *hide(sys.argv[1:])[0]])
    if resume in ("auto", "never") or saved is None:
        again += f"{'' if settings.config.run.name else f' run.name={folder.name}'} --resume auto"
    elif Path(resume).expanduser().resolve() != folder.resolve():  # a new run, that began from another one's checkpoint
        again += f" --resume {shlex.quote(str(folder))}"
    return f"{reached}\nresume with: {again}"


class ReportException(EngineCallback):
    """Leaves `failure.json` where no supervisor of dtrain's does, which would know how all ranks ended.

    Args:
        folder: the run's.
        engine: trains.
    """

    order = Order.LAST  # it names the last checkpoint

    def __init__(self, folder: Path, engine: Engine) -> None:
        self._folder, self._engine = folder.absolute(), engine
        self._identity = identity_of(self._folder)

    def on_exception(self, error: BaseException) -> None:
        """Something has ended training."""
        ended = not isinstance(error, StopRequested) and not is_ctrl_c(error)
        if ended and identity_of(self._folder) == self._identity:  # and not another folder in its place
            report_exception(self._folder, self._engine.place, self._engine.world, error)


def report_exception(folder: Path, place: TrainPosition, world: World, error: BaseException) -> None:
    """Leaves `failure.json` where no supervisor of dtrain's does, and tells so: the first rank that comes.

    A rank that lost its connection to another gives way to what that one tells.
    """
    if getattr(error, "exit_code", None) == EXIT_USAGE or not folder.is_dir():
        saved = last_checkpoint(folder)
        if saved is not None:  # with what was asked for mended, it is gone on from there
            add_remark(error, f"last checkpoint: {saved}")
        return
    there = read_failure(folder)
    if there is not None and there.get("cause") != PEER:
        return
    told = explain(error).told
    failure = RankFailure(
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
