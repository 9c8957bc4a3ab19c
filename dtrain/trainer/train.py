"""One rank's run: config and recipe in, a run's folder out."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dtrain.callbacks.early_stopping import EarlyStopping, StopEarly
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
from dtrain.checkpoint.code import check_code, check_same_code
from dtrain.checkpoint.compat import check_facts, check_ranks, check_shapes, facts_of
from dtrain.checkpoint.folder import Saved
from dtrain.checkpoint.global_marks import GLOBALS, global_marks, warn_of_globals
from dtrain.checkpoint.locate import Loaded, Parts, read
from dtrain.checkpoint.samples import check_data, data_marks
from dtrain.checkpoint.state import restore
from dtrain.checkpoint.trainable import beginning_of
from dtrain.config import Settings
from dtrain.distributed.seeding import deterministic
from dtrain.distributed.stopping import Stopping, check_not_asked
from dtrain.distributed.world import World
from dtrain.engine.call_hooks import state_of_hooks
from dtrain.engine.callback import Callbacks, EngineCallback
from dtrain.engine.hooks import adds_columns
from dtrain.engine.loop import Engine
from dtrain.engine.monitored import check_early, check_plateau
from dtrain.engine.nan_guard import WarnOfValidation
from dtrain.engine.schedules import check_total_steps
from dtrain.engine.valid_loaders import by_name, column_of
from dtrain.errors import AgreedError, StopRequested, UsageError
from dtrain.errors import Failure as RankFailure
from dtrain.launch.monitor.describe import describe
from dtrain.launch.monitor.exit_report import jointly_supervised, name_run
from dtrain.launch.signals.stop_request import StopRequest, is_ctrl_c
from dtrain.launch.terminal.guarded import note_losses_in
from dtrain.layout import CHECKPOINTS, HISTORY, SLURM, STARTS, STOP, VALIDATIONS
from dtrain.rundir.columns import VALID
from dtrain.rundir.history import History
from dtrain.rundir.lock import Ownership, check_all, owned
from dtrain.rundir.starts import commit_of
from dtrain.trainer.ending import ReportException, stopped
from dtrain.trainer.folder import OpenRun, open_folder, take_up
from dtrain.trainer.messages import log_complete, log_resumed, log_start, sum_up
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
    request = StopRequest() if request is None else request
    with contextlib.ExitStack() as owner:
        try:
            return _train(settings, world, resume, request, owner, voice or ConsoleOptions(), trial)
        except StopRequested:
            world.close()  # none leaves, and has the launcher end the others, before all have saved
            raise


def _train(  # noqa: PLR0913, PLR0917 - train_run's own
    settings: Settings,
    world: World,
    resume: str,
    request: StopRequest,
    owner: contextlib.ExitStack,
    voice: ConsoleOptions,
    trial: bool,
) -> Path:
    task = agree(world, lambda: load_task(settings))
    if task.code is not None:
        check_same_code(world, task.code)
    request.look()  # its code may have set handlers of its own
    settings.pin()
    train = settings.config.train
    owner.enter_context(deterministic(train.deterministic))
    epochs = run_epochs(task, world.size, settings)
    callbacks = Callbacks(voice.progress(world.rank, train.log_step_freq))
    engine = configured_engine(task, world, settings, epochs=epochs, nan=train.nan, callbacks=callbacks)
    _check_monitors(engine, settings)
    check_not_asked(world, request)
    ownerships: list[Ownership] = []  # of rank 0
    own = lambda folder: ownerships.append(owner.enter_context(_taken(folder, request)))  # noqa: E731
    begun = begin(engine, settings, resume, own)
    shown, came_from = begun.folder, begun.came_from
    engine.history.guard = engine.validations.guard = lambda: check_all(ownerships)
    folder = shown.absolute()  # a step may change the working directory
    begun = begun._replace(folder=folder)
    new = not any((folder / name).exists() for name in _OF_EARLIER)
    started = partial(_start_tracking, engine, settings, folder, begun.ids, new=new)
    if not trial:
        _make_known(folder, world)
    if _nothing_left(engine):
        if world.is_main:
            log_complete(engine, settings, shown, voice)
        return shown
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
        print(profile.words())  # noqa: T201
    return shown


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


def _nothing_left(engine: Engine) -> bool:
    """Whether the run that an engine was put to is complete."""
    return engine.start.epoch > engine.epochs or engine.stopping


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


def begin(engine: Engine, settings: Settings, resume: str, own: Callable[[Path], None]) -> RunContext:
    """Opens the run's folder and puts the engine to where the run in it was.

    Args:
        engine: it has not trained yet.
        settings: the config.
        resume: as for `train_run`.
        own: takes a run's folder, before anything in it is looked at; called by rank 0.

    Returns:
        where it begins or is resumed.

    Raises:
        AgreedError: some rank could not; every rank raises it, and what was there is as it was.
    """
    world = engine.world
    beginning_of(engine)
    samples = _marks(engine) if world.is_main and settings.config.checkpoint.check_data else {}
    opened = agree(world, lambda: _opened(engine, settings, resume, own) if world.is_main else None)
    folder, resumes = world.gather_json(None if opened is None else [str(opened.folder), opened.found is not None])[0]
    loaded, accepted = None, list[str]()
    if resumes:
        parts = agree(world, lambda: read(opened.found.saved.path) if opened and opened.found else Parts())
        shared = parts.shared(world)
        loaded = agree(world, shared.loaded)
        accepted = agree(world, lambda: _check(engine, settings, loaded, samples))
    rows = [] if loaded is None else loaded.run["rows"]
    history = agree(world, lambda: None if opened is None else take_up(opened, settings, rows))
    engine.history = History() if history is None else history
    engine.history.rows = list(rows)
    _take_up_validations(engine, opened, [] if loaded is None else loaded.run.get("validations", []))
    if loaded is not None:
        restore(engine, loaded.weights, loaded.run, loaded.ranks)
    early = settings.config.early_stopping
    if early.patience is not None or early.target is not None:
        place = settings.place_of("early_stopping.monitor")
        how: dict[str, Any] = {"target": early.target, "may_lack": adds_columns(engine.task.hooks)}
        stopping = EarlyStopping(early.monitor, early.mode, early.patience, "early_stopping.", place, **how)
        engine.callbacks.add(StopEarly(engine, stopping))
    if loaded is None:
        return RunContext(Path(folder), samples=samples)
    log_resumed(opened, loaded, complete=_nothing_left(engine))
    # A new run that begins from another one's checkpoint has trackers' runs of its own.
    again = opened is not None and opened.again
    ids = loaded.facts.get("trackers", {}) if again else {}
    return RunContext(Path(folder), ids, loaded.path, accepted, loaded.facts, samples)


def _marks(engine: Engine) -> dict[str, Any]:
    """What a run begins with besides its code: marks of its data, and of what its code has read into globals."""
    return {**data_marks(engine), GLOBALS: global_marks(engine)}


def _take_up_validations(engine: Engine, opened: OpenRun | None, rows: list[dict[str, Any]]) -> None:
    """Has the validations within epochs go on after these, on every rank; rank 0 writes them beside the history."""
    path = None if opened is None else opened.folder / VALIDATIONS
    engine.validations = agree(engine.world, lambda: History() if path is None else History.resumed(path, rows))
    engine.validations.rows = list(rows)


def _opened(engine: Engine, settings: Settings, resume: str, own: Callable[[Path], None]) -> OpenRun:
    """Rank 0's part: finds what is to be gone on from."""

    def usable(saved: Saved) -> str:
        change = settings.config.checkpoint.change_ranks and settings.config.train.batch == "per_rank"
        if change and saved.step is not None and saved.facts["ranks"] != engine.world.size:
            return f"{saved.path} was saved within an epoch on another number of ranks"
        return ""

    return open_folder(settings, resume, usable, own)


def _check(engine: Engine, settings: Settings, loaded: Loaded | None, samples: Mapping[str, Any]) -> list[str]:
    """Compares a checkpoint with what shall be resumed from it; returns, in words, what differs and is accepted."""
    accepted: list[str] = []
    if loaded is None:
        return accepted
    if engine.world.is_main:
        check_facts(loaded.facts, facts_of(engine, settings.plain()), settings)
        if engine.task.code is not None:
            run = loaded.path.parent.parent
            accepted += check_code(loaded.facts, engine.task.code, settings, run)
            if not accepted:
                warn_of_globals(loaded.facts.get("samples", {}).get(GLOBALS, {}), samples.get(GLOBALS, {}))
        accepted += check_data(loaded.facts.get("samples", {}), samples, engine, settings.config.checkpoint.accept)
        within = loaded.run["step"] if loaded.run.get("data") is None else loaded.run["data"][1]
        check_ranks(loaded.facts, within, engine.world.size, settings)
    check_shapes(engine, loaded.weights, loaded.run, loaded.ranks, str(loaded.path))
    return accepted


@contextlib.contextmanager
def _taken(folder: Path, request: StopRequest) -> Iterator[Ownership]:
    """Has the run's folder for the time being; not one where training is to stop."""
    with owned(folder, lambda: request.by) as ownership:
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


def agree(world: World, attempt: Callable[[], T]) -> T:
    """Runs a part of the set-up on every rank and lets all know how it went.

    Raises:
        AgreedError: it failed on some rank; all ranks raise, so that none waits for the others.
    """
    result: Any = None
    failure: RankFailure | None = None
    try:
        result = attempt()
    except BaseException as error:
        if is_ctrl_c(error):
            raise
        text, exit_code = describe(error)
        failure = RankFailure(world.rank, text, exit_code, type(error).__name__)
    told = world.gather_json(None if failure is None else asdict(failure))
    failures = [RankFailure(**item) for item in told if item is not None]
    if failures:
        raise AgreedError(failures)
    return result  # type: ignore[no-any-return]
