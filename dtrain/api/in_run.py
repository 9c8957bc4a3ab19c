"""A call that keeps its run in a folder, `train_model(..., run="runs/first")`, as `dtrain train` keeps a recipe's."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dtrain.api.described import at_first, described, net_text
from dtrain.callbacks.progress import ConsoleOptions, progress_of
from dtrain.callbacks.tracking.wanted import check_installed
from dtrain.config import Settings, call_settings
from dtrain.config.calls import run_folder
from dtrain.distributed.world import World
from dtrain.engine.callback import EngineCallback
from dtrain.engine.loop import Engine
from dtrain.engine.options import RunOptions
from dtrain.engine.train_step import Task
from dtrain.errors import EXIT_USAGE, AgreedError, UsageError
from dtrain.launch.signals.handlers import let_go
from dtrain.launch.signals.stop_request import STOP_SIGNALS, StopRequest, request_of_this_process
from dtrain.provenance.code import Code
from dtrain.provenance.loading import loadings
from dtrain.provenance.pieces import Reached
from dtrain.recipe.monitors import name_monitors
from dtrain.recipe.others import others_with_state
from dtrain.trainer.train import Work, train_task


@dataclass
class CallRun:
    """A run of a call.

    Attributes:
        settings: the call as a config.
        roots: argument -> the object whose code belongs to the run.
        code: that code; it is read where the call is, and not on ranks that are started for it.
    """

    settings: Settings
    roots: dict[str, Any]
    code: Code


def run_of_call(run: Any, config: Any, made: Callable[[], CallRun]) -> CallRun | None:
    """Returns the run of a call; None where it keeps none.

    Raises:
        UsageError: there is a `config` without a run.
    """
    if run is not None:
        return made()
    if config is not None:
        raise UsageError("config= belongs to run=: pass run='runs/NAME' as well, or leave it out.")
    return None


def call_run(  # noqa: PLR0913 - keyword-only
    call: str,
    run: str | Path | CallRun,
    task: Task,
    *,
    options: RunOptions,
    own: Mapping[str, tuple[Any, str]],
    roots: Mapping[str, Any],
    loaders: Mapping[str, Any],
    config: Mapping[str, Any] | None,
) -> CallRun:
    """Returns the run of a call, before anything is started.

    Args:
        call: its name, one of `dtrain.config.calls.CALLS`.
        run: the folder; or, on a rank that was started for the call, what this has returned there.
        task: what the call came to.
        options: of the call, by the arguments' own names.
        own: further keys of the config -> value, and the argument's name.
        roots: argument -> an object whose code belongs to the run.
        loaders: argument -> loader.
        config: the argument: further keys.

    Raises:
        ConfigError, UsageError: a key or a value is wrong.
    """
    if isinstance(run, CallRun):
        return CallRun(run.settings, run.roots, run.code)
    given = {f"train.{field.name}": (getattr(options, field.name), field.name) for field in fields(options)}
    place = run_folder(run)
    optimizer = task.optimizer or getattr(task.module, "optimizer", None)
    objects = described(place, model=task.module, optimizer=optimizer, scheduler=task.scheduler, loaders=loaders)
    settings = call_settings(call, run, {**given, **own, **objects}, config)
    name_monitors(settings, task.dl_valid)
    check_installed(settings.config.track)
    if settings.config.train.shard is not None:
        raise UsageError(f"{call.removeprefix('dtrain.')} cannot shard a model (train.shard): use `dtrain train`.")
    text = at_first(place, task.module, net_text)
    return CallRun(settings, dict(roots), Reached(roots).code(_script(), {"net.py": text}))


def _script() -> Path:
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return Path(file).resolve() if isinstance(file, str) else Path.cwd() / "notebook.ipynb"


def train_in_run(  # noqa: PLR0913 - keyword-only
    how: CallRun,
    task: Task,
    world: World,
    *,
    verbose: bool | EngineCallback,
    ready: Callable[[Engine], None] = lambda _: None,
    begun: Callable[[Engine], None] = lambda _: None,
) -> Engine:
    """Trains a call's task in its run's folder; where that is complete, just brings its state back.

    Args:
        how: the run.
        task: the call's.
        world: the ranks.
        verbose: the call's argument.
        ready, begun: as for `dtrain.trainer.train.Work`.

    Returns:
        the engine, where the run ends.

    Raises:
        UsageError: the run in the folder is another one; each difference is named.
        StopRequested: training was asked to stop, and is saved.
    """
    reached = Reached(how.roots)
    task.others = others_with_state({**reached.values, **task.others}, task)
    how.code._seen, how.code.values = loadings(), reached.values
    task.code = how.code
    every = how.settings.config.train.log_step_freq
    work = Work(
        lambda: task,
        lambda rank: progress_of(verbose, is_main=rank == 0, log_step_freq=every),
        ConsoleOptions(words=verbose is not False),
        ready,
        begun,
    )
    with requests() as request, in_plain_words(world):
        engine, _ = train_task(work, how.settings, world, "auto", request)
    if engine.average is not None:
        engine.average.settle()
    return engine


@contextlib.contextmanager
def in_plain_words(world: World) -> Iterator[None]:
    """Has a failure of the only rank be what it is, and not what all ranks have agreed on."""
    try:
        yield
    except AgreedError as error:
        if world.size == 1 and error.exit_code == EXIT_USAGE:
            raise UsageError(str(error).removeprefix("dtrain: error: ")) from None
        raise


@contextlib.contextmanager
def requests() -> Iterator[StopRequest]:
    """While inside, what asks this process to stop is heard; then signals do what they did before."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS} if main else {}
    try:
        yield request_of_this_process()
    finally:
        if main:
            let_go()
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
