"""Measures one rank's train steps on a recipe: as they are, and then part by part."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from torch.utils.data import DataLoader

from dtrain.callbacks.progress import PlainLines
from dtrain.config import Settings
from dtrain.data.fetch import RowsOf, fetched_by_batch
from dtrain.data.partition import RankBatch
from dtrain.distributed.world import World
from dtrain.engine.callback import Callbacks, EngineCallback, Order
from dtrain.engine.hooks import IN_TRAINING
from dtrain.engine.loop import Engine
from dtrain.engine.metrics import Value
from dtrain.engine.options import RunOptions
from dtrain.engine.position import Limits
from dtrain.tools.bench.advice import BenchResult
from dtrain.tools.bench.stopwatch import ItemCounter, Stopwatch
from dtrain.trainer.agreed import agree
from dtrain.trainer.setup import configured_engine, load_task

WARM_UP = 5


class _Clock(EngineCallback):
    """Notes when each step begins, and nothing else."""

    order = Order.RECORDS

    def __init__(self) -> None:
        self.began: list[float] = []
        self.samples: list[int] = []

    def on_batch_start(self, batch: RankBatch) -> None:
        self.began.append(time.perf_counter())
        self.samples.append(batch.total)


def measure(settings: Settings, world: World, steps: int) -> dict[str, Any]:
    """Trains for a few steps, again and again, and times them. The recipe's net is trained on; nothing is kept.

    Args:
        settings: the recipe and its parameters.
        world: the ranks.
        steps: train steps to measure, besides the warm-up.

    Returns:
        the fields of `BenchResult`, as JSON keeps them.
    """
    engine = agree(world, lambda: _engine(settings, world, steps))
    engine.train_pass(1)  # the first steps of a process are slow, and of a small data set there are no others
    clock = _Clock()
    with engine.callbacks.having(clock):
        engine.train_pass(2)
    counted = min(steps, len(clock.began) - 1)
    seconds = (clock.began[-1] - clock.began[-1 - counted]) / counted if counted else float("nan")
    samples = sum(clock.samples[-1 - counted : -1])
    stopwatch = Stopwatch(world, min(WARM_UP, max(0, len(clock.began) - 2)))
    with engine.callbacks.having(stopwatch), stopwatch.inside_steps(engine.task.module):
        engine.train_pass(3)
    asked = _asked(engine)
    engine.learner.close()
    loader = engine.task.dl_train
    plain = isinstance(loader, DataLoader)
    by_batch = plain and settings.config.train.fetch_batches and isinstance(fetched_by_batch(loader)[0], RowsOf)
    return asdict(
        BenchResult(
            step_seconds=seconds,
            samples_per_second=samples / (seconds * counted) if counted else float("nan"),
            parts={name: total / max(1, stopwatch.steps) for name, total in stopwatch.seconds.items()},
            asked=asked,
            device=world.device.type,
            workers=loader.num_workers if plain else None,
            by_batch=by_batch,
            steps=counted,
        )
    )


def _engine(settings: Settings, world: World, steps: int) -> Engine:
    train = settings.config.train
    per_step = world.size if train.batch == "per_rank" else 1
    task = load_task(settings)
    task.dl_valid = None
    return configured_engine(
        task,
        world,
        settings,
        # A graph has no parts that could be timed.
        options=replace(RunOptions.of(dict(train)), cuda_graph=False),
        hooks=IN_TRAINING,
        epochs=1,
        epoch_steps=None,
        limits=Limits(train=(steps + WARM_UP + 1) * per_step),
        callbacks=Callbacks(PlainLines(train.log_step_freq, io.StringIO())),  # lines as in training, to nowhere
    )


def _asked(engine: Engine) -> float:
    """How often a step asks a tensor for its number, of the last few steps."""
    asking = _Asking()
    with engine.callbacks.having(asking), contextlib.closing(asking):
        engine.train_pass(4)
    return asking.counter.count / max(1, asking.steps)


class _Asking(EngineCallback):
    """Counts what the steps ask tensors for."""

    order = Order.RECORDS

    def __init__(self) -> None:
        self.counter = ItemCounter()
        self.steps = 0
        self._step = contextlib.ExitStack()

    def on_batch_start(self, batch: RankBatch) -> None:
        self.steps += 1
        self._step.enter_context(self.counter)

    def on_batch_end(self, batch: RankBatch, values: Mapping[str, Value]) -> None:
        self._step.close()

    def close(self) -> None:
        self._step.close()  # of a step that failed
