"""`dtrain train --fast-dev-run`: all of a run in seconds, in a folder of its own that is removed afterwards.

One epoch of two optimizer steps, with validation, a checkpoint, and a second engine that goes on from it; without
trackers. It finds what would fail at a run's first validation, or at its first checkpoint, before hours were spent.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dtrain.callbacks.progress import ConsoleOptions
from dtrain.config import Settings
from dtrain.config.schema import RunFolderConfig, TrackConfig
from dtrain.distributed.world import World
from dtrain.engine.loop import Engine
from dtrain.errors import StopRequested
from dtrain.launch.signals.stop_request import StopRequest, kept_for_later
from dtrain.trainer.agreed import agree
from dtrain.trainer.begin import begin
from dtrain.trainer.setup import configured_engine, load_task
from dtrain.trainer.train import train_run

STEPS = 2  # optimizer steps: after the first one it is within the epoch, and the second one finds optimizer states
GROUP = 2  # of accumulated batches, a second one meets the gradients of the first; more of them show no more


def fast_dev_run(settings: Settings, world: World, request: StopRequest, voice: ConsoleOptions) -> None:
    """Goes through all of a configured run on this rank, and leaves nothing.

    Args:
        settings: the run's config.
        world: the verified ranks.
        request: hears what asks this process to stop.
        voice: how progress is shown, and who is told of events.

    Raises:
        StopRequested: some rank was asked to stop; every rank raises it.
        Exception: whatever the run would raise.
    """
    started = time.perf_counter()
    with _folder(world) as folder:
        made = small(settings, world.size, folder)
        try:
            train_run(made, world, "never", request, voice, trial=True)
        except StopRequested:
            raise StopRequested("stopped on request, in a fast dev run; nothing was kept") from None
        engine = _read_back(made, world)
    if world.is_main:
        _sum_up(engine, time.perf_counter() - started, voice)


def small(settings: Settings, ranks: int, folder: str) -> Settings:
    """Returns the config of a run of seconds.

    Args:
        settings: the run's.
        ranks: how many there are.
        folder: where the run's folder is made.
    """
    config = settings.config
    train = config.train
    group = min(GROUP, train.accumulation)
    changes = {
        "epochs": 1,
        "max_steps": None,
        "epoch_steps": None,
        "accumulation": group,
        "limit_batches": STEPS * group * (ranks if train.batch == "per_rank" else 1),
        "overfit_batches": None,
        "log_step_freq": 1,
        "val_every_steps": None if train.val_every_steps is None else 1,
        "log_norms": None if train.log_norms is None else 1,
    }
    sections = {
        "train": train.model_copy(update=changes),
        "checkpoint": config.checkpoint.model_copy(update={"every_epochs": 1}),
        "run": RunFolderConfig(dir=folder, name="fast-dev-run"),
        "track": TrackConfig(),
    }
    return replace(settings, config=config.model_copy(update=sections))


@contextlib.contextmanager
def _folder(world: World) -> Iterator[str]:
    """While inside, rank 0, which writes all, has a folder; the others do not use theirs."""
    folder = agree(world, lambda: tempfile.mkdtemp(prefix="dtrain-fast-dev-run-") if world.is_main else "")
    with _removed(folder) if folder else contextlib.nullcontext():
        yield folder or str(Path(tempfile.gettempdir()))


@contextlib.contextmanager
def _removed(folder: str) -> Iterator[None]:
    """Removes a folder, also where this process is killed, as a launcher does with the ranks beside one that failed."""
    code = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"
    with kept_for_later():  # what ends the ranks does not end it
        process = subprocess.Popen(
            [sys.executable, "-IS", "-c", code, folder], stdin=subprocess.PIPE, start_new_session=True
        )
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        process.kill()
        process.communicate()


def _read_back(settings: Settings, world: World) -> Engine:
    """Returns an engine, made anew, that stands where the checkpoint was saved."""
    task = agree(world, lambda: load_task(settings))
    engine = configured_engine(task, world, settings, epochs=1)
    with contextlib.ExitStack() as stack:
        stack.callback(engine.learner.close)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # which tells that a run goes on
        begin(engine, settings, "auto", lambda _: None)
    return engine


def _sum_up(engine: Engine, seconds: float, voice: ConsoleOptions) -> None:
    """Says what was gone through."""
    within = len(engine.validations.rows)
    optimizer, ranks = engine.place.updates, engine.world.size
    steps = f"{optimizer} optimizer step{'s' * (optimizer != 1)} on {ranks} rank{'s' * (ranks != 1)}"
    if engine.valid is None:
        validation = "no validation (there is no loader for it)"
    else:
        validation = f"validation{f' ({within} within the epoch)' * bool(within)}"
    print(  # noqa: T201
        f"fast dev run: {steps}, {validation}, checkpoint saved and restored, in {seconds:.1f} s. Nothing was kept."
    )
    voice.tell(
        "fast_dev_run",
        ranks=ranks,
        updates=optimizer,
        validated=engine.valid is not None,
        checkpoint=True,
        row=engine.history.rows[-1],
        seconds=seconds,
    )
