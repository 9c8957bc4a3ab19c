"""Where a run begins: its folder opened, and the engine put to where the run in it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dtrain.callbacks.early_stopping import EarlyStopping, StopEarly
from dtrain.callbacks.progress import ConsoleOptions
from dtrain.checkpoint.code import check_code
from dtrain.checkpoint.compat import check_facts, check_ranks, check_shapes, facts_of
from dtrain.checkpoint.folder import Saved
from dtrain.checkpoint.global_marks import GLOBALS, global_marks, warn_of_globals
from dtrain.checkpoint.locate import Loaded, Parts, read
from dtrain.checkpoint.samples import check_data, data_marks
from dtrain.checkpoint.state import restore
from dtrain.checkpoint.trainable import beginning_of
from dtrain.config import Settings
from dtrain.engine.hooks import adds_columns
from dtrain.engine.loop import Engine
from dtrain.layout import VALIDATIONS
from dtrain.rundir.history import History
from dtrain.trainer.agreed import agree
from dtrain.trainer.folder import OpenRun, open_folder, take_up
from dtrain.trainer.initial import InitialWeights
from dtrain.trainer.messages import log_initial, log_resumed
from dtrain.trainer.notes import RunContext


def begin(  # noqa: PLR0913, PLR0917 - called at few places with most of them
    engine: Engine,
    settings: Settings,
    resume: str,
    own: Callable[[Path], None],
    voice: ConsoleOptions = ConsoleOptions(),  # noqa: B008 - never changed
    initial: InitialWeights | None = None,
) -> RunContext:
    """Opens the run's folder and puts the engine to where the run in it was.

    Args:
        engine: it has not trained yet.
        settings: the config.
        resume: as for `train_run`.
        own: takes a run's folder, before anything in it is looked at; called by rank 0.
        voice: says where it is resumed.
        initial: what the model was built with, to be kept in the folder.

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
    history = agree(world, lambda: None if opened is None else take_up(opened, settings, rows, initial))
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
        log_initial(initial, world, voice)
        return RunContext(Path(folder), samples=samples)
    log_resumed(opened, loaded, voice, complete=nothing_left(engine))
    # A new run that begins from another one's checkpoint has trackers' runs of its own.
    again = opened is not None and opened.again
    ids = loaded.facts.get("trackers", {}) if again else {}
    return RunContext(Path(folder), ids, loaded.path, accepted, loaded.facts, samples, frozenset(loaded.weights))


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
        accepted += check_data(loaded.facts.get("samples", {}), samples, engine, settings)
        within = loaded.run["step"] if loaded.run.get("data") is None else loaded.run["data"][1]
        check_ranks(loaded.facts, within, engine.world.size, settings)
    check_shapes(engine, loaded)
    return accepted


def nothing_left(engine: Engine) -> bool:
    """Whether the run that an engine was put to is complete."""
    return engine.start.epoch > engine.epochs or engine.stopping
