"""What rank 0 says of a run before its first step and after its last one: words, and events where they are wanted."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain.callbacks.progress import ConsoleOptions
from dtrain.checkpoint.folder import all_saved
from dtrain.checkpoint.locate import Loaded
from dtrain.config import Settings
from dtrain.config.calls import way
from dtrain.distributed.world import World
from dtrain.engine.loop import Engine
from dtrain.engine.passes import ValidPass
from dtrain.engine.valid_loaders import by_name
from dtrain.layout import CHECKPOINTS, CONFIG
from dtrain.recipe.monitors import PLACE
from dtrain.rundir.columns import watched
from dtrain.rundir.history import best_row
from dtrain.trainer.banner import banner
from dtrain.trainer.folder import OpenRun
from dtrain.trainer.initial import InitialWeights
from dtrain.trainer.setup import loader_batch, step_samples
from dtrain.wording import counted, number

logger = logging.getLogger(__name__)


def log_resumed(opened: OpenRun | None, loaded: Loaded, voice: ConsoleOptions, *, complete: bool = False) -> None:
    """Says what a run goes on from, and what it does not go on from; on rank 0, which alone has opened its folder.

    One that is complete goes on from nothing; what comes next says so.
    """
    if opened is None or opened.found is None:
        return
    for word in opened.found.words:
        voice.say(f"skipped checkpoint: {word}")
    if not complete:
        voice.say(f"resuming from {loaded.path}")


def log_initial(initial: InitialWeights | None, world: World, voice: ConsoleOptions) -> None:
    """Says which weights a run that begins has, and by name what of them does not match; on rank 0."""
    if initial is None or not world.is_main:
        return
    if initial.fit is not None and initial.fit.left and initial.kept is None:
        logger.warning("%s", initial.words())
    else:
        voice.say(initial.words())


def log_start(engine: Engine, settings: Settings, folder: Path, came_from: Path | None, voice: ConsoleOptions) -> None:
    """Tells that training begins, or goes on: in a few lines, and by an event."""
    if settings.place_of("checkpoint.monitor") == PLACE:
        named = ", ".join(by_name(engine.task.dl_valid))
        voice.say(
            f"validation loaders: {named}; the best epoch is that of {settings.config.checkpoint.monitor} "
            f"(another: {way(settings, 'checkpoint.monitor')})"
        )
    placed = [one.on_device for one in (engine.train_loader, *(part.loader for part in _valid_parts(engine)))]
    if any(placed):
        voice.say(f"data on the GPU: {', '.join(filter(None, placed))}")
    ranks, train, batch = engine.world.size, settings.config.train, loader_batch(engine.task)
    samples = None if batch is None else step_samples(batch, ranks, train)
    voice.say(banner(engine, run=folder, keep=way(settings, "train.batch", "global")))
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


def _valid_parts(engine: Engine) -> Sequence[ValidPass]:
    return () if engine.valid is None else engine.valid.parts


def say_banner(engine: Engine, *, verbose: object) -> None:
    """Says the same of a call that keeps no run, once, where it says anything.

    Args:
        engine: it is about to train.
        verbose: the call's argument.
    """
    if engine.world.is_main and verbose is not False:
        ConsoleOptions().say(banner(engine, keep='batch="global"'))


_TO_GO_ON = {"early_stopping.patience": "Increase", "early_stopping.target": "Change", "patience": "Increase"}


def log_complete(engine: Engine, settings: Settings, folder: Path, voice: ConsoleOptions) -> None:
    """Says that there is nothing left to do, and what would give it something."""
    done = len(engine.history.rows)
    other, epochs = f"choose another {way(settings, 'run.name')}", way(settings, "train.epochs")
    more = f"Increase {epochs}, or {other}."
    if engine.spent:
        more = f"train.max_steps = {engine.max_steps} is reached. {other.capitalize()}."
    elif done < engine.epochs:
        doing, key = _TO_GO_ON.get(engine.ended_by, ""), engine.ended_by
        more = f"It was {engine.ended or 'stopped early'}. "
        more += f"{f'{doing} {key}' if doing else f'Set another {epochs}'}, or {other}."
    voice.say(f"{folder} is complete: {counted(done, 'epoch')}. {more}")
    sum_up(engine, settings, folder.absolute(), voice, shown=folder, again=True)


def _saved_rows(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of the epochs at whose end a checkpoint was saved that is still there."""
    saved = {one.epoch for one in all_saved(folder / CHECKPOINTS) if one.step is None}
    return [row for row in rows if row["epoch"] in saved]


def sum_up(  # noqa: PLR0913 - keyword-only
    engine: Engine, settings: Settings, folder: Path, voice: ConsoleOptions, *, shown: Path, again: bool = False
) -> None:
    """Says why training ended early, if it did, which epoch was best, and where the run is.

    Args:
        engine: has trained.
        settings: the run's.
        folder: the run's, absolute.
        voice: tells the same as an event.
        shown: what the folder is called.
        again: whether there was nothing left to do, which was said already.
    """
    if engine.ended is not None and not again:
        voice.say(engine.ended)
    asked = settings.config.checkpoint
    rows = engine.history.rows
    best, monitor = best_row(_saved_rows(rows, folder) if asked.on_error == "warn" else rows, asked.monitor, asked.mode)
    none = f"{' or '.join(watched(asked.monitor))} is never finite"

    def words(row: Mapping[str, Any]) -> str:
        why = f"{monitor} = {number(row[monitor])}" if monitor else f"the last one: {none}"
        return f"{row['epoch']} ({why})"

    if best is not None:
        voice.say(f"best epoch: {words(best)}")
    better = best_row(rows, asked.monitor, asked.mode)[0]
    if better is not None and better is not best:
        voice.say(f"epoch {words(better)} was better, but has no checkpoint (not due, or not written)")
    voice.say(f"run: {shown}")
    voice.tell(
        "complete",
        run=str(shown),
        epochs=len(engine.history.rows),
        best=best and best["epoch"],
        monitor=monitor,
        ended=engine.ended,
    )
