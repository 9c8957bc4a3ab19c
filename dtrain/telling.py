"""What rank 0 says of a run before its first step and after its last one: words, and events where they are wanted."""

from __future__ import annotations

from pathlib import Path

from dtrain.building import loader_batch, step_samples
from dtrain.config import Settings
from dtrain.engine import Engine
from dtrain.history import best_row
from dtrain.progress import Voice
from dtrain.resuming.finding import Loaded
from dtrain.run_folder import CONFIG, Opened


def tell_resumed(opened: Opened | None, loaded: Loaded, *, complete: bool = False) -> None:
    """Says what a run goes on from, and what it does not go on from; on rank 0, which alone has opened its folder.

    One that is complete goes on from nothing; what comes next says so.
    """
    if opened is None or opened.found is None:
        return
    for word in opened.found.words:
        print(f"not gone on from: {word}")  # noqa: T201
    if not complete:
        print(f"goes on from {loaded.path}")  # noqa: T201


def tell_start(engine: Engine, settings: Settings, folder: Path, came_from: Path | None, voice: Voice) -> None:
    """Tells that training begins, or goes on: by an event, since the first line of progress says the same.

    Ranks that make the batch another one than the loader's are told of in words, too.
    """
    ranks, train, batch = engine.world.size, settings.config.train, loader_batch(engine.task)
    samples = None if batch is None else step_samples(batch, ranks, train)
    if batch is not None and samples is not None and ranks > 1 and train.batch == "per_rank":
        times = f" x accumulation {train.accumulation}" if train.accumulation > 1 else ""
        print(  # noqa: T201
            f"{ranks} ranks x batch {batch}{times} = {samples} samples a step; "
            f"train.batch=global keeps {samples // ranks}"
        )
    voice.tell(
        "start",
        run=str(folder),
        config=str(folder / CONFIG),
        recipe=settings.config.recipe,
        ranks=ranks,
        samples=samples,
        device=str(engine.world.device),
        epochs=engine.epochs,
        epoch=engine.start.epoch,
        step=engine.start.skip,
        checkpoint=None if came_from is None else str(came_from),
    )


def tell_complete(engine: Engine, settings: Settings, folder: Path, voice: Voice) -> None:
    """Says that there is nothing left to do, and what would give it something."""
    done = len(engine.history.rows)
    more = "Give more epochs, or another run.name."
    if engine.spent:
        more = f"All optimizer steps of train.max_steps = {engine.max_steps} are taken. Give another run.name."
    elif done < engine.epochs:
        patience = settings.config.early_stopping.patience
        more = f"early_stopping.patience = {patience} ended it. Give more patience, or another run.name."
    print(f"{folder} is complete: {done} {'epoch' if done == 1 else 'epochs'}. {more}")  # noqa: T201
    sum_up(engine, settings, folder, voice, again=True)


def sum_up(engine: Engine, settings: Settings, folder: Path, voice: Voice, *, again: bool = False) -> None:
    """Says why training ended early, if it did, which epoch was best, and where the run is.

    Args:
        engine: has trained.
        settings: the run's.
        folder: the run's.
        voice: tells the same as an event.
        again: whether there was nothing left to do, which was said already.
    """
    if engine.ended is not None and not again:
        print(engine.ended)  # noqa: T201
    asked = settings.config.checkpoint
    best, monitor = best_row(engine.history.rows, asked.monitor, asked.mode)
    if best is not None:
        none = f"{asked.monitor or 'val_loss or loss'} is never a number"
        why = f" ({monitor} = {best[monitor]:.4f})" if monitor else f" (the last one: {none})"
        print(f"best epoch: {best['epoch']}{why}")  # noqa: T201
    print(f"run: {folder}")  # noqa: T201
    voice.tell(
        "complete",
        run=str(folder),
        epochs=len(engine.history.rows),
        best=best and best["epoch"],
        monitor=monitor,
        ended=engine.ended,
    )
