"""Measures one rank's train steps on a recipe: as they are, and then part by part."""

from __future__ import annotations

import io
import time
from dataclasses import asdict
from typing import Any

from torch.utils.data import DataLoader

from dtrain.bench.advice import Measured
from dtrain.bench.stopwatch import ItemCounter, Stopwatch, watch
from dtrain.bounds import Limits
from dtrain.building import configured_engine, load_task
from dtrain.config import Settings
from dtrain.dealing import Share
from dtrain.engine import Engine
from dtrain.fetching import RowsOf, fetched_by_batch
from dtrain.metrics import Value
from dtrain.progress import PlainLines
from dtrain.run import agree
from dtrain.world import World

WARM_UP = 5


class _Clock:
    """Notes when each step begins, without standing in its way."""

    def __init__(self, engine: Engine) -> None:
        self.learn = engine.learner.learn
        self.began: list[float] = []
        self.samples: list[int] = []

    def __call__(self, share: Share) -> dict[str, Value]:
        self.began.append(time.perf_counter())
        self.samples.append(share.total)
        return self.learn(share)


def measure(settings: Settings, world: World, steps: int) -> dict[str, Any]:
    """Trains for a few steps, again and again, and times them. The recipe's net is trained on; nothing is kept.

    Args:
        settings: the recipe and its parameters.
        world: the ranks.
        steps: train steps to measure, besides the warm-up.

    Returns:
        the fields of `Measured`, as JSON keeps them.
    """
    engine = agree(world, lambda: _engine(settings, world, steps))
    engine.train_pass(1)  # the first steps of a process are slow, and of a small data set there are no others
    clock = _Clock(engine)
    engine.learner.learn = clock  # type: ignore[method-assign]
    engine.train_pass(2)
    engine.learner.learn = clock.learn  # type: ignore[method-assign]
    counted = min(steps, len(clock.began) - 1)
    seconds = (clock.began[-1] - clock.began[-1 - counted]) / counted if counted else float("nan")
    samples = sum(clock.samples[-1 - counted : -1])
    stopwatch = Stopwatch(world, min(WARM_UP, max(0, len(clock.began) - 2)))
    out = watch(engine, stopwatch)
    try:
        engine.train_pass(3)
    finally:
        out()
    asked = _asked(engine)
    engine.learner.close()
    loader = engine.task.dl_train
    plain = isinstance(loader, DataLoader)
    by_batch = plain and settings.config.train.fetch_batches and isinstance(fetched_by_batch(loader)[0], RowsOf)
    return asdict(
        Measured(
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
        epochs=1,
        limits=Limits(train=(steps + WARM_UP + 1) * per_step),
        progress=PlainLines(train.log_step_freq, io.StringIO()),  # lines as in training, to nowhere
    )


def _asked(engine: Engine) -> float:
    """How often a step asks a tensor for its number, of the last few steps."""
    counter = ItemCounter()
    steps = 0
    learn = engine.learner.learn

    def counted(share: Share) -> dict[str, Value]:
        nonlocal steps
        steps += 1
        with counter:
            return learn(share)

    engine.learner.learn = counted  # type: ignore[method-assign]
    engine.train_pass(4)
    engine.learner.learn = learn  # type: ignore[method-assign]
    return counter.count / max(1, steps)
