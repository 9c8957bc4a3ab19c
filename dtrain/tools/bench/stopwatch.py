"""Times the parts of an engine's train steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dtrain.data.partition import RankBatch
from dtrain.distributed.world import World
from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.metrics import Value

# The parts of a step, in the order of a table.
PARTS = ("data", "transfer", "forward and backward", "metric function", "optimizer", "metrics and logging")


class Stopwatch(EngineCallback):
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

    order = Order.LAST  # what else is done in a step belongs to its last part

    def __init__(self, world: World, warm_up: int) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.steps = 0
        self.samples = 0
        self._world = world
        self._skip = warm_up
        self._nested = 0.0  # seconds of parts within the part that runs
        self._step_began: float | None = None
        self._running = contextlib.ExitStack()

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

    def on_fetch_start(self) -> None:
        """The step before is over."""
        self._end_step()
        self._running.enter_context(self.part("data"))

    def on_fetch_end(self, *, found: bool) -> None:
        """The batch is here, and on its way to the device."""
        self._running.close()
        if found:
            self._running.enter_context(self.part("transfer"))

    def on_batch_start(self, batch: RankBatch) -> None:
        """The batch is on the device."""
        self._running.close()
        self._count = batch.count
        self._running.enter_context(self.part("forward and backward"))

    def on_batch_end(self, batch: RankBatch, values: Mapping[str, Value]) -> None:
        """The train step is done; what is left is dtrain's own."""
        self._running.close()

    @contextlib.contextmanager
    def inside_steps(self, module: nn.Module) -> Iterator[None]:
        """While inside, the optimizers' steps and the net's metric function are parts of their own.

        Args:
            module: the net.
        """
        parts: list[Any] = []

        def before(_optimizer: Optimizer, *_: Any) -> None:
            parts.append(self.part("optimizer"))
            parts[-1].__enter__()

        def after(_optimizer: Optimizer, *_: Any) -> None:
            parts.pop().__exit__(None, None, None)

        metric = getattr(module, "metric_func", None)
        with contextlib.ExitStack() as inside:
            inside.callback(register_optimizer_step_pre_hook(before).remove)
            inside.callback(register_optimizer_step_post_hook(after).remove)
            if callable(metric):
                module.metric_func = self.timed(metric, "metric function")  # type: ignore[assignment]
                inside.callback(setattr, module, "metric_func", metric)
            yield

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
