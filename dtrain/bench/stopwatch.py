"""Times the parts of an engine's train steps from outside, by standing between the engine and what it calls."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

from dtrain.dealing import Share
from dtrain.engine import Engine
from dtrain.passes import to_device
from dtrain.world import World

# The parts of a step, in the order of a table.
PARTS = ("data", "transfer", "forward and backward", "metric function", "optimizer", "metrics and logging")


class Stopwatch:
    """Seconds by part, summed over the steps after the warm-up.

    Where the device works beside the host, each part waits for it at its end; the sum is then more than a step
    takes otherwise.

    Args:
        world: the ranks.
        warm_up: steps that are not counted.

    Attributes:
        seconds: part -> seconds.
        steps: number of steps that are counted.
        samples: real samples of those, of this rank.
    """

    def __init__(self, world: World, warm_up: int) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.steps = 0
        self.samples = 0
        self._world = world
        self._skip = warm_up
        self._nested = 0.0  # seconds of parts within the part that runs
        self._step_began: float | None = None

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times one part; the parts within it are not counted twice."""
        outside, self._nested = self._nested, 0.0
        started = time.perf_counter()
        try:
            yield
        finally:
            if self._world.device.type != "cpu":
                torch.accelerator.synchronize()
            taken = time.perf_counter() - started
            if self._skip <= 0:
                self.seconds[name] += taken - self._nested
            self._nested = outside + taken

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The same function, timed as a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def fetch(self, shares: Iterator[Share]) -> Iterator[Share]:
        """Times how long each batch is waited for; the step is over when the next one is asked for."""
        while True:
            self._end_step()
            with self.part("data"):
                share = next(shares, None)
            if share is None:
                return
            with self.part("transfer"):
                share.batch = to_device(share.batch, self._world)
            self._count = share.count
            yield share

    def _end_step(self) -> None:
        """What no other part took of a step is dtrain's own: names, sums, lines."""
        now = time.perf_counter()
        if self._step_began is not None:
            if self._skip > 0:
                self._skip -= 1
            else:
                self.seconds["metrics and logging"] += now - self._step_began - self._nested
                self.steps += 1
                self.samples += self._count
        self._step_began, self._nested = now, 0.0


def watch(engine: Engine, stopwatch: Stopwatch) -> Callable[[], None]:
    """Puts a stopwatch into an engine; returns what takes it out again."""
    loader, learner, task = engine.train_loader, engine.learner, engine.task
    shares, learn = loader.shares, learner.learn
    parts: list[Any] = []

    def before(_optimizer: Optimizer, *_: Any) -> None:
        parts.append(stopwatch.part("optimizer"))
        parts[-1].__enter__()

    def after(_optimizer: Optimizer, *_: Any) -> None:
        parts.pop().__exit__(None, None, None)

    loader.shares = lambda *how: stopwatch.fetch(shares(*how))  # type: ignore[method-assign]
    learner.learn = stopwatch.timed(learn, "forward and backward")  # type: ignore[method-assign]
    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    metric = getattr(task.module, "metric_func", None)
    if callable(metric):
        task.module.metric_func = stopwatch.timed(metric, "metric function")  # type: ignore[assignment]

    def out() -> None:
        loader.shares, learner.learn = shares, learn  # type: ignore[method-assign]
        for handle in handles:
            handle.remove()
        if callable(metric):
            task.module.metric_func = metric

    return out


class ItemCounter(TorchFunctionMode):
    """Counts how often a step asks a tensor for its number, which on a GPU waits for all that was sent there.

    Attributes:
        count: calls of item(), tolist(), float(), int() and bool() of tensors.
    """

    _ASKING = frozenset(
        {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__, torch.Tensor.__int__, torch.Tensor.__bool__}
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts, and leaves every function as it is."""
        self.count += func in self._ASKING
        return func(*args, **(kwargs or {}))
