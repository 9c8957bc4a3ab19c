"""One rank's run: config and recipe in, a run's folder out."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from dtrain.best import EarlyStopping, check_early, stop_early
from dtrain.building import configured_engine, load_task, run_epochs
from dtrain.checkpoint.folder import Saved
from dtrain.config import Settings
from dtrain.ending import leave_word, stopped
from dtrain.engine import Engine
from dtrain.errors import AgreedError, StopRequested, UsageError
from dtrain.errors import Failure as RankFailure
from dtrain.failures import describe
from dtrain.finite import tell_validation
from dtrain.history import FILE_NAME, History
from dtrain.launch.reports import name_run, supervised
from dtrain.launch.requests import FILE_NAME as STOP_FILE
from dtrain.launch.requests import StopRequest
from dtrain.lock import owned
from dtrain.norms import Norms
from dtrain.plateau import check_plateau
from dtrain.profiling import Profile, start_profile
from dtrain.progress import Voice, together
from dtrain.recipe_file import locate
from dtrain.resuming.changed import beginning_of
from dtrain.resuming.finding import Loaded, Parts, read
from dtrain.resuming.fitting import check_facts, check_ranks, check_shapes, facts_of
from dtrain.resuming.keeper import Keeper
from dtrain.resuming.state import restore
from dtrain.run_folder import CHECKPOINTS, VALIDATIONS, Opened, open_folder, take_up
from dtrain.schedules import check_total_steps
from dtrain.seeding import deterministic
from dtrain.starts import commit_of, here, noted
from dtrain.stopping import Stopping, check_not_asked
from dtrain.telling import sum_up, tell_complete, tell_resumed, tell_start
from dtrain.tracking.about import about_run
from dtrain.tracking.base import End
from dtrain.tracking.starting import start_tracking
from dtrain.tracking.tracking import Tracking
from dtrain.world import World

T = TypeVar("T")


def train_run(  # noqa: PLR0913 - what a run needs
    settings: Settings,
    world: World,
    resume: str = "auto",
    request: StopRequest | None = None,
    voice: Voice | None = None,
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
            return _train(settings, world, resume, request, owner, voice or Voice(), trial)
        except StopRequested:
            world.close()  # none leaves, and has the launcher end the others, before all have saved
            raise


def _train(  # noqa: PLR0913, PLR0917 - train_run's own
    settings: Settings,
    world: World,
    resume: str,
    request: StopRequest,
    owner: contextlib.ExitStack,
    voice: Voice,
    trial: bool,
) -> Path:
    task = agree(world, lambda: load_task(settings))
    train = settings.config.train
    owner.enter_context(deterministic(train.deterministic))
    epochs = run_epochs(task, world.size, settings)
    progress = voice.progress(world.rank, train.log_step_freq)
    engine = configured_engine(task, world, settings, epochs=epochs, nan=train.nan, progress=progress)
    _check_monitors(engine, settings)
    check_not_asked(world, request)
    folder, ids, came_from = begin(engine, settings, resume, lambda folder: owner.enter_context(_taken(folder)))
    if world.local_rank == 0 and not trial:  # on each node, for the ranks' logs
        name_run(folder)
    if _nothing_left(engine):
        if world.is_main:
            tell_complete(engine, settings, folder, voice)
        return folder
    check_total_steps(engine)
    tracking = agree(world, lambda: _start_tracking(engine, settings, folder, ids) if world.is_main else None)
    unbegun = owner.enter_context(_ended(tracking, engine))  # what is set up below may fail, before _fit ends them
    if world.is_main and train.nan != "ignore":
        engine.after_epoch.append(tell_validation)
    keeper = _keeper(engine, settings, folder, tracking)
    if tracking is not None:
        tracking.settled = lambda: not keeper.writing
        engine.progress = together(engine.progress, tracking)
    if world.is_main:
        tell_start(engine, settings, folder, came_from, voice)
    stopping = Stopping(world, request, folder / STOP_FILE, lambda: engine.is_over)
    engine.heed(stopping)
    profile = agree(world, lambda: _watched(engine, settings, folder, tracking, owner))
    try:
        with _noted(engine, settings, folder, came_from), stopping:
            unbegun.pop_all()
            _fit(engine, keeper, tracking, None if trial or supervised() else folder)
    except StopRequested:
        world.gather_json(None)  # rank 0 has written what any of them tells of
        raise StopRequested(stopped(stopping.why(), engine.place, folder, settings, resume)) from None
    told = world.is_main and not trial
    if told:
        sum_up(engine, settings, folder, voice)
    _end_profile(profile, told=told)
    return folder


def _nothing_left(engine: Engine) -> bool:
    """Whether the run that an engine was put to is complete."""
    return engine.start.epoch > engine.epochs or engine.stopping


def _ended(tracking: Tracking | None, engine: Engine) -> contextlib.ExitStack:
    """Ends the trackers' runs, as failed ones, where it is left before they are somebody else's to end."""
    stack = contextlib.ExitStack()
    if tracking is not None:
        stack.callback(tracking.finish, End(True, False, tuple(engine.history.rows)))
    return stack


def _check_monitors(engine: Engine, settings: Settings) -> None:
    early, kept = settings.config.early_stopping, settings.config.checkpoint
    check_early(engine, kept.monitor, "checkpoint.monitor", settings.place_of("checkpoint.monitor"))
    if early.patience is not None:
        check_early(engine, early.monitor, "early_stopping.monitor", settings.place_of("early_stopping.monitor"))
    key = "scheduler.monitor" if settings.place_of("scheduler.monitor") != "default" else "checkpoint.monitor"
    declared = kept.mode if kept.monitor == engine.task.monitor else None
    check_plateau(engine, key, settings.place_of(key), declared)


def _watched(
    engine: Engine, settings: Settings, folder: Path, tracking: Tracking | None, owner: contextlib.ExitStack
) -> Profile | None:
    """Has norms logged and steps profiled where the config says so; returns the profile.

    A profile that was not closed by the end of the training is dropped.
    """
    train, profile = settings.config.train, None
    if train.log_norms is not None:
        norms = Norms(engine, train.log_norms, folder, None if tracking is None else tracking.moment)
        owner.callback(norms.close)
    if train.profile is not None and (engine.world.is_main or train.profile_ranks == "all"):
        profile = start_profile(engine, train.profile, folder)
    if profile is not None:
        owner.callback(profile.drop)
    return profile


def _end_profile(profile: Profile | None, *, told: bool) -> None:
    if profile is not None:
        profile.close()
        if told:
            print(profile.words())  # noqa: T201


def begin(
    engine: Engine, settings: Settings, resume: str, own: Callable[[Path], None]
) -> tuple[Path, dict[str, str], Path | None]:
    """Opens the run's folder and puts the engine to where the run in it was.

    Args:
        engine: it has not trained yet.
        settings: the config.
        resume: as for `train_run`.
        own: takes a run's folder, before anything in it is looked at; called by rank 0.

    Returns:
        the run's folder, the ids of its trackers' runs, and the checkpoint that is gone on from, or None.

    Raises:
        AgreedError: some rank could not; every rank raises it, and what was there is as it was.
    """
    world = engine.world
    beginning_of(engine)
    opened = agree(world, lambda: _opened(engine, settings, resume, own) if world.is_main else None)
    folder, resumes = world.gather_json(None if opened is None else [str(opened.folder), opened.found is not None])[0]
    loaded = None
    if resumes:
        parts = agree(world, lambda: read(opened.found.saved.path) if opened and opened.found else Parts())
        shared = parts.shared(world)
        loaded = agree(world, shared.loaded)
        strict = opened is not None and not opened.explicit
        agree(world, lambda: _check(engine, settings, loaded, strict=strict))
    rows = [] if loaded is None else loaded.run["rows"]
    history = agree(world, lambda: None if opened is None else take_up(opened, settings, rows))
    engine.history = History() if history is None else history
    engine.history.rows = list(rows)
    _take_up_validations(engine, opened, [] if loaded is None else loaded.run.get("validations", []))
    if loaded is not None:
        restore(engine, loaded.weights, loaded.run, loaded.ranks)
    early = settings.config.early_stopping
    if early.patience is not None:
        place = settings.place_of("early_stopping.monitor")
        stop_early(engine, EarlyStopping(early.monitor, early.mode, early.patience, "early_stopping.", place))
    if loaded is None:
        return Path(folder), {}, None
    tell_resumed(opened, loaded, complete=_nothing_left(engine))
    # A new run that begins from another one's checkpoint has trackers' runs of its own.
    again = opened is not None and opened.again
    return Path(folder), loaded.facts.get("trackers", {}) if again else {}, loaded.path


def _take_up_validations(engine: Engine, opened: Opened | None, rows: list[dict[str, Any]]) -> None:
    """Has the validations within epochs go on after these, on every rank; rank 0 writes them beside the history."""
    path = None if opened is None else opened.folder / VALIDATIONS
    engine.validations = agree(engine.world, lambda: History() if path is None else History.resumed(path, rows))
    engine.validations.rows = list(rows)


def _opened(engine: Engine, settings: Settings, resume: str, own: Callable[[Path], None]) -> Opened:
    """Rank 0's part: finds what is to be gone on from."""

    def usable(saved: Saved) -> str:
        change = settings.config.checkpoint.change_ranks and settings.config.train.batch == "per_rank"
        if change and saved.step is not None and saved.facts["ranks"] != engine.world.size:
            return f"{saved.path} was saved within an epoch, on another number of ranks"
        return ""

    return open_folder(settings, resume, usable, own)


def _check(engine: Engine, settings: Settings, loaded: Loaded | None, *, strict: bool) -> None:
    if loaded is None:
        return
    if engine.world.is_main:
        check_facts(loaded.facts, facts_of(engine, settings), settings, strict=strict)
        check_ranks(loaded.facts, loaded.run["step"], engine.world.size, settings)
    check_shapes(engine, loaded.weights, loaded.run, loaded.ranks, str(loaded.path))


def _noted(
    engine: Engine, settings: Settings, folder: Path, came_from: Path | None
) -> contextlib.AbstractContextManager[None]:
    """Has rank 0 note that training begins, and how it ends."""
    device = engine.world.device
    if not engine.world.is_main:
        return contextlib.nullcontext()
    recipe = locate(settings.config.recipe, settings.base)
    facts = {
        **here(Path.cwd() if recipe is None else recipe.resolve().parent),
        "ranks": engine.world.size,
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "checkpoint": None if came_from is None else str(came_from),
    }
    return noted(folder, facts, lambda: int(engine.history.rows[-1]["epoch"]) if engine.history.rows else 0)


def _keeper(engine: Engine, settings: Settings, folder: Path, tracking: Tracking | None) -> Keeper:
    """Has the engine saved as the config says."""

    def facts() -> dict[str, Any]:
        return {**facts_of(engine, settings), "trackers": {} if tracking is None else tracking.ids()}

    keeper = Keeper(engine, folder / CHECKPOINTS, settings.config.checkpoint, facts)
    keeper.attach()
    return keeper


def _fit(engine: Engine, keeper: Keeper, tracking: Tracking | None, word: Path | None) -> None:
    """Trains; whatever ends it, the last checkpoint is on the disk and the trackers are told.

    Args:
        engine: trains.
        keeper: saves.
        tracking: the trackers, if any.
        word: the folder where word of a failure is left; None where a supervisor does, which knows how all ranks ended.
    """
    failed, complete = True, False
    try:
        engine.fit()
        keeper.close()
        failed, complete = False, True
    except StopRequested:
        failed = False
        raise
    except (Exception, SystemExit) as error:
        for attempt in (keeper.save_trained, keeper.close):
            with contextlib.suppress(Exception):  # what ended the run is told, not this
                attempt()
        if word is not None:
            leave_word(word, engine.place, engine.world, error)
        raise
    finally:
        if tracking is not None:
            weights = keeper.weights(tracking.artifacts) if complete and tracking.artifacts else None
            tracking.finish(End(failed, complete, tuple(engine.history.rows), weights))


@contextlib.contextmanager
def _taken(folder: Path) -> Iterator[None]:
    """Has the run's folder for the time being; not one where training is to stop."""
    with owned(folder):
        if (folder / STOP_FILE).exists():
            raise UsageError(f"{folder / STOP_FILE} is there, by which somebody ended this run. Remove it to go on.")
        yield


def _start_tracking(engine: Engine, settings: Settings, folder: Path, ids: dict[str, str]) -> Tracking | None:
    """Starts the trackers; where that fails, no empty run is left behind."""
    world, place = engine.world, engine.place
    path = locate(settings.config.recipe, settings.base)
    try:
        about = about_run(
            settings,
            engine.task.module,
            ranks=world.size,
            device=world.device.type,
            code=None if path is None else commit_of(path.parent),
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
        if not (folder / CHECKPOINTS).exists() and not (folder / FILE_NAME).exists():
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
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it is told to all ranks and raised below
        text, exit_code = describe(error)
        failure = RankFailure(world.rank, text, exit_code, type(error).__name__)
    told = world.gather_json(None if failure is None else asdict(failure))
    failures = [RankFailure(**item) for item in told if item is not None]
    if failures:
        raise AgreedError(failures)
    return result  # type: ignore[no-any-return]
