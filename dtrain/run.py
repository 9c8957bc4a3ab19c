"""One rank's run: config and recipe in, a run's folder out."""

from __future__ import annotations

import logging
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from dtrain.checkpoint import save_epoch
from dtrain.config import Settings
from dtrain.engine import Engine
from dtrain.errors import EXIT_USAGE, AgreedError, UsageError, add_remark
from dtrain.errors import Failure as RankFailure
from dtrain.failures import describe, explain
from dtrain.history import FILE_NAME, History
from dtrain.launch.heartbeat import SETUP
from dtrain.launch.postmortem import Failure, last_checkpoint, read_failure, remarks
from dtrain.launch.reports import PEER, name_run, supervised
from dtrain.learning import Task
from dtrain.passes import Place
from dtrain.progress import choose_progress
from dtrain.recipe import bind, load_recipe
from dtrain.seeding import seed_everything
from dtrain.trackers import Tracker, make_trackers
from dtrain.world import World

logger = logging.getLogger(__name__)

T = TypeVar("T")


def load_task(settings: Settings) -> Task:
    """Seeds, imports the recipe and builds its objects, so that every rank builds the same net."""
    seed_everything(settings.config.train.seed)
    return bind(load_recipe(settings.config.recipe, settings.base), settings)


def train_run(settings: Settings, world: World) -> Path:
    """Trains a configured run on this rank.

    Args:
        settings: the resolved config.
        world: the verified ranks.

    Returns:
        the run's folder; on ranks other than 0 too, although only rank 0 writes to it.

    Raises:
        AgreedError: some rank could not set up; every rank raises it.
    """
    task = agree(world, lambda: load_task(settings))
    train = settings.config.train
    engine = configured_engine(
        task,
        world,
        settings,
        epochs=train.epochs,
        nan=train.nan,
        progress=choose_progress(is_main=world.is_main, epochs=train.epochs, log_step_freq=train.log_step_freq),
    )
    folder = Path(world.gather_json(agree(world, lambda: _open_folder(settings, world)))[0])
    if world.local_rank == 0:  # on each node, for the ranks' logs
        name_run(folder)
    trackers = agree(world, lambda: _start_trackers(settings, folder) if world.is_main else [])
    if world.is_main:
        engine.history = History(folder / FILE_NAME)
        engine.after_epoch.append(lambda row: _keep(folder, engine, row))
        engine.after_epoch += [tracker.log_epoch for tracker in trackers]
    failed = True
    try:
        engine.fit()
        failed = False
    except (Exception, SystemExit) as error:
        if not supervised():  # else the supervisor does, which knows how all ranks ended
            _leave_word(folder, engine.place, world, error)
        raise
    finally:
        _finish(trackers, failed=failed)
    if world.is_main:
        _sum_up(engine.history, folder)
    return folder


def configured_engine(task: Task, world: World, settings: Settings, **more: Any) -> Engine:
    """Returns an engine that computes what the config says.

    Args:
        task: the recipe's objects.
        world: the ranks.
        settings: the config.
        more: how long, how much and for whom: further fields of the engine.
    """
    train = settings.config.train
    return Engine(
        task,
        world,
        seed=train.seed,
        batch=train.batch,
        accumulation=train.accumulation,
        sync_batchnorm=train.sync_batchnorm,
        fetch_batches=train.fetch_batches,
        **more,
    )


def _leave_word(folder: Path, place: Place, world: World, error: BaseException) -> None:
    """Leaves `failure.json` where no supervisor of dtrain's does, and tells so: the first rank that comes.

    A rank that lost its connection to another gives way to what that one tells.
    """
    if getattr(error, "exit_code", None) == EXIT_USAGE or not folder.is_dir():
        return
    there = read_failure(folder)
    if there is not None and there["cause"] != PEER:
        return
    told = explain(error).told
    Failure(
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
    ).write(folder)
    for remark in (f"on {socket.gethostname()}, device {world.device}", *remarks(folder)):
        add_remark(error, remark)


def _start_trackers(settings: Settings, folder: Path) -> list[Tracker]:
    """Starts the trackers; where that fails, no empty run is left behind."""
    try:
        return make_trackers(settings.config, folder, folder.name)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _finish(trackers: list[Tracker], *, failed: bool) -> None:
    """Ends the trackers; what they raise never takes the place of what ended the run."""
    for tracker in trackers:
        try:
            tracker.finish(failed=failed)
        except Exception:
            if not failed:
                raise
            logger.warning("a tracker could not end its run", exc_info=True)


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


def _open_folder(settings: Settings, world: World) -> str:
    """Makes the run's folder, rank 0 alone; a folder that is there already is never written to."""
    run = settings.config.run
    if not world.is_main:
        return ""
    recipe = settings.config.recipe
    title = Path(recipe).stem if recipe.endswith(".py") else recipe.rpartition(".")[2]
    stem = run.name or f"{title}-{time.strftime('%Y%m%d-%H%M%S')}"
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
            raise UsageError(
                f"run.dir = {run.dir!r}, run.name = {run.name!r}: cannot make {folder}: {error.strerror}."
            ) from None
        (folder / "config.yaml").write_text(settings.to_yaml(), encoding="utf-8")
        return str(folder)
    raise UsageError(f"run.dir = {run.dir!r}: a thousand runs named {stem} are there.")


def _keep(folder: Path, engine: Engine, row: dict[str, Any]) -> None:
    save_epoch(folder / "checkpoints", engine.task.module, row)


def _sum_up(history: History, folder: Path) -> None:
    best = history.best()
    if best is not None:
        monitor = next((name for name in ("val_loss", "loss") if name in best), None)
        why = f" ({monitor} = {best[monitor]:.4f})" if monitor else " (the last one: no step returns a loss)"
        print(f"best epoch: {best['epoch']}{why}")  # noqa: T201
    print(f"run: {folder}")  # noqa: T201
