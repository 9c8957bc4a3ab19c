"""One rank's run: config and task in, a run's folder out."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from dtrain.callbacks.media import RunMedia
from dtrain.callbacks.param_norms import Norms
from dtrain.callbacks.profiler import Profile, start_profile
from dtrain.callbacks.progress import ConsoleOptions
from dtrain.callbacks.stop import StopOnRequest
from dtrain.callbacks.tracking.about import about_run
from dtrain.callbacks.tracking.base import RunEnd
from dtrain.callbacks.tracking.ending import EndTrackers
from dtrain.callbacks.tracking.starting import start_tracking
from dtrain.callbacks.tracking.tracking import Tracking
from dtrain.checkpoint.code import check_same_code
from dtrain.config import Settings
from dtrain.distributed.seeding import deterministic
from dtrain.distributed.stopping import Stopping, check_not_asked
from dtrain.distributed.world import World
from dtrain.engine.call_hooks import state_of_hooks
from dtrain.engine.callback import Callbacks, EngineCallback
from dtrain.engine.loop import Engine
from dtrain.engine.monitored import check_early, check_plateau
from dtrain.engine.nan_guard import WarnOfValidation
from dtrain.engine.schedules import check_total_steps
from dtrain.engine.train_step import Task
from dtrain.engine.valid_loaders import by_name, column_of
from dtrain.errors import StopRequested, UsageError
from dtrain.launch.monitor.exit_report import jointly_supervised, name_run
from dtrain.launch.signals.stop_request import StopRequest
from dtrain.launch.terminal.guarded import note_losses_in
from dtrain.layout import CHECKPOINTS, HISTORY, SLURM, STARTS, STOP
from dtrain.rundir.columns import VALID
from dtrain.rundir.lock import Ownership, check_all, owned
from dtrain.rundir.starts import commit_of
from dtrain.trainer.agreed import agree
from dtrain.trainer.begin import begin, nothing_left
from dtrain.trainer.ending import ReportException, stopped
from dtrain.trainer.initial import InitialWeights, initial_of_run
from dtrain.trainer.messages import log_complete, log_start, sum_up
from dtrain.trainer.notes import RunContext, keeper_of, noted_start
from dtrain.trainer.setup import configured_engine, load_task, run_epochs

_OF_EARLIER = (CHECKPOINTS, HISTORY, SLURM, STARTS, "logs")  # a job's record, or what an earlier start has left
T = TypeVar("T")


def train_run(  # noqa: PLR0913 - what a run needs
    settings: Settings,
    world: World,
    resume: str = "auto",
    request: StopRequest | None = None,
    voice: ConsoleOptions | None = None,
    *,
    trial: bool = False,
) -> Path:
    """Trains a configured run on this rank, from its beginning or from where it was.

    Args:
        settings: the resolved config.
        world: the verified ranks.
        resume: "auto" goes on with the run that is in the folder, where there is one; "never" does not; else the path
            of a run, which is gone on with, or of one checkpoint, from which a new run begins.
        request: hears what asks this process to stop.
        voice: how progress is shown, and who is told of events.
        trial: whether the folder goes afterwards, so that nobody is to be told of it.

    Returns:
        the run's folder; on ranks other than 0 too, although only rank 0 writes to it.

    Raises:
        AgreedError: some rank could not set up; every rank raises it.
        StopRequested: some rank was asked to stop; every rank raises it, once all is saved.
    """
    initial = initial_of_run(settings, resume, world)
    load, shown = lambda: load_task(settings, initial), lambda rank: _progress(voice, rank, settings)
    work = Work(load, shown, voice or ConsoleOptions(), initial=initial)
    _, folder = train_task(work, settings, world, resume, request, trial=trial)
    return folder


def _progress(voice: ConsoleOptions | None, rank: int, settings: Settings) -> EngineCallback | None:
    return (voice or ConsoleOptions()).progress(rank, settings.config.train.log_step_freq)


@dataclass(frozen=True)
class Work:
    """What is trained, and for whom.

    Attributes:
        load: returns the task.
        progress: returns what shows the progress of a rank; None for nothing.
        voice: says what happens to the run.
        ready: called with the engine before it is put to where the run was.
        begun: called with it after that.
        initial: what the model was built with, to be kept in the folder.
    """

    load: Callable[[], Task]
    progress: Callable[[int], EngineCallback | None]
    voice: ConsoleOptions
    ready: Callable[[Engine], None] = lambda _: None
    begun: Callable[[Engine], None] = lambda _: None
    initial: InitialWeights | None = None


def train_task(  # noqa: PLR0913 - what a run needs
    work: Work,
    settings: Settings,
    world: World,
    resume: str = "auto",
    request: StopRequest | None = None,
    *,
    trial: bool = False,
) -> tuple[Engine, Path]:
    """Trains a task in a run's folder on this rank, as `train_run` does a recipe's.

    Args:
        work: what is trained.
        settings: the config.
        world, resume, request, trial: as for `train_run`.

    Returns:
        the engine, where the run ends, and the run's folder.

    Raises:
        AgreedError, StopRequested: as for `train_run`.
    """
    request = StopRequest() if request is None else request
    with contextlib.ExitStack() as owner:
        try:
            return _train(work, settings, world, resume, request, owner, trial)
        except StopRequested:
            world.close()  # none leaves, and has the launcher end the others, before all have saved
            raise


def _train(  # noqa: PLR0913, PLR0917 - train_task's own
    work: Work,
    settings: Settings,
    world: World,
    resume: str,
    request: StopRequest,
    owner: contextlib.ExitStack,
    trial: bool,
) -> tuple[Engine, Path]:
    engine, voice = _engine_of(work, settings, world, request, owner), work.voice
    ownerships: list[Ownership] = []  # of rank 0
    own = lambda folder: ownerships.append(owner.enter_context(_taken(folder, request)))  # noqa: E731
    begun = begin(engine, settings, resume, own, voice, work.initial)
    work.begun(engine)
    shown, came_from = begun.folder, begun.came_from
    engine.history.guard = engine.validations.guard = lambda: check_all(ownerships)
    folder = shown.absolute()  # a step may change the working directory
    begun = begun._replace(folder=folder)
    new = not any((folder / name).exists() for name in _OF_EARLIER)
    started = partial(_start_tracking, engine, settings, folder, begun.ids, new=new)
    if not trial:
        _make_known(folder, world)
    if nothing_left(engine):
        if world.is_main:
            log_complete(engine, settings, shown, voice)
        return engine, shown
    check_total_steps(engine)
    tracking = agree(world, lambda: started() if world.is_main else None)
    unbegun = owner.enter_context(_ended(tracking, engine))  # what comes now may fail, before the engine ends them
    keeper = keeper_of(engine, settings, begun, tracking, lambda: check_all(ownerships))
    _place_hooks(engine, folder, tracking)
    if tracking is not None:
        tracking.settled = lambda: not keeper.writing
        engine.callbacks.add(tracking, EndTrackers(tracking, engine, keeper.weights))
    if world.is_main:
        log_start(engine, settings, shown, came_from, voice)
    stopping = Stopping(world, request, folder / STOP, lambda: engine.is_over)
    engine.callbacks.add(*_listeners(engine, settings, folder, stopping, trial=trial))
    profile = agree(world, lambda: _watched(engine, settings, folder, tracking, owner))
    _fit(engine, begun, stopping, unbegun, lambda why: stopped(why, engine.place, shown, settings, resume))
    told = world.is_main and not trial
    if told:
        sum_up(engine, settings, folder, voice, shown=shown)
    if told and profile is not None:
        voice.say(profile.words())
    return engine, shown


def _engine_of(
    work: Work, settings: Settings, world: World, request: StopRequest, owner: contextlib.ExitStack
) -> Engine:
    """Loads the task and readies an engine for it, which has not been put to where the run was yet."""
    task = agree(world, work.load)
    if task.code is not None:
        check_same_code(world, task.code)
    request.look()  # its code may have set handlers of its own
    settings.pin()
    train = settings.config.train
    owner.enter_context(deterministic(train.deterministic))
    epochs = run_epochs(task, world.size, settings)
    callbacks = Callbacks(work.progress(world.rank))
    engine = configured_engine(task, world, settings, epochs=epochs, nan=train.nan, callbacks=callbacks)
    _check_monitors(engine, settings)
    work.ready(engine)
    check_not_asked(world, request)
    return engine


def _fit(
    engine: Engine,
    begun: RunContext,
    stopping: Stopping,
    unbegun: contextlib.ExitStack,
    words: Callable[[str], str],
) -> None:
    """Trains; what would be done where it does not come to that is done by the engine from then on.

    Raises:
        StopRequested: some rank was asked to stop; the words say why, and what is saved.
    """
    try:
        with noted_start(engine, begun), stopping:
            unbegun.pop_all()
            engine.fit()
        engine.world.gather_json(None)  # what any rank loads next is complete, and not the checkpoint before
    except StopRequested:
        engine.world.gather_json(None)  # rank 0 has written what any of them tells of
        raise StopRequested(words(stopping.why())) from None


def _make_known(folder: Path, world: World) -> None:
    """Says where the run is: to each node's supervisor, for the ranks' logs; and where lost output is to be noted."""
    if world.local_rank == 0 or not jointly_supervised():
        name_run(folder)
    note_losses_in(folder, world.rank)


def _place_hooks(engine: Engine, folder: Path, tracking: Tracking | None) -> None:
    """Has the user's hooks know the run's folder, where rank 0 keeps their images and the like."""
    state = state_of_hooks(engine)
    if state is not None:
        state.folder = folder
        state.media = RunMedia(folder, engine.place.updates, tracking) if engine.world.is_main else None


def _ended(tracking: Tracking | None, engine: Engine) -> contextlib.ExitStack:
    """Ends the trackers' runs, as failed ones, where it is left before they are somebody else's to end."""
    stack = contextlib.ExitStack()
    if tracking is not None:
        stack.callback(tracking.finish, RunEnd(True, False, tuple(engine.history.rows)))
    return stack


def _check_monitors(engine: Engine, settings: Settings) -> None:
    early, kept = settings.config.early_stopping, settings.config.checkpoint
    check_early(engine, kept.monitor, "checkpoint.monitor", settings.place_of("checkpoint.monitor"))
    if early.patience is not None or early.target is not None:
        check_early(engine, early.monitor, "early_stopping.monitor", settings.place_of("early_stopping.monitor"))
    key = "scheduler.monitor" if settings.place_of("scheduler.monitor") != "default" else "checkpoint.monitor"
    declared = kept.mode if kept.monitor == engine.task.monitor else None
    check_plateau(engine, key, settings.place_of(key), declared)


def _listeners(
    engine: Engine, settings: Settings, folder: Path, stopping: Stopping, *, trial: bool
) -> Iterator[EngineCallback]:
    """Yields those that every configured run has; what a run may have besides is added where it is made."""
    yield StopOnRequest(stopping)
    if engine.world.is_main and settings.config.train.nan != "ignore":
        yield WarnOfValidation([f"{VALID}{column_of(name, 'loss')}" for name in by_name(engine.task.dl_valid)])
    if not trial and not jointly_supervised():
        yield ReportException(folder, engine)


def _watched(
    engine: Engine, settings: Settings, folder: Path, tracking: Tracking | None, owner: contextlib.ExitStack
) -> Profile | None:
    """Has norms logged and steps profiled where the config says so; returns the profile."""
    train, profile = settings.config.train, None
    if train.log_norms is not None:
        norms = Norms(engine, train.log_norms, folder, None if tracking is None else tracking.moment)
        owner.callback(norms.close)
        engine.callbacks.add(norms)
    if train.profile is not None and (engine.world.is_main or train.profile_ranks == "all"):
        profile = start_profile(engine, train.profile, folder)
    if profile is not None:
        owner.callback(profile.close)
        engine.callbacks.add(profile)
    return profile


@contextlib.contextmanager
def _taken(folder: Path, request: StopRequest) -> Iterator[Ownership]:
    """Has the run's folder for the time being; not one where training is to stop."""
    with owned(folder, request.asked) as ownership:
        if (folder / STOP).exists():
            raise UsageError(f"{folder / STOP} exists: this run was stopped for good. Remove the file to continue.")
        yield ownership


def _start_tracking(
    engine: Engine, settings: Settings, folder: Path, ids: dict[str, str], *, new: bool
) -> Tracking | None:
    """Starts the trackers; where that fails, no empty run is left behind, if its folder is new."""
    world, place = engine.world, engine.place
    code = engine.task.code
    try:
        about = about_run(
            settings,
            engine.task.module,
            ranks=world.size,
            device=world.device.type,
            code=None if code is None else commit_of(code.recipe.parent),
        )
        return start_tracking(
            settings,
            folder,
            about=about,
            device=world.device,
            rows=engine.history.rows,
            updates=place.updates,
            ids=ids,
        )
    except BaseException:
        if new:
            shutil.rmtree(folder)
        raise
