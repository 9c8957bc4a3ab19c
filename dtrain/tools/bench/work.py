"""How much a step computes, how fast the device could, and what the host takes to send a step to a GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dtrain.data.partition import RankBatch
from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.metrics import Value

_FIRST, _LARGEST = 256, 8192  # sides of the matrices
_LONG = 0.01  # seconds of a product, from which on a larger one is no faster
_TIMES = 5
_HELD = 4.0  # times as long as the host takes for a step, the GPU is kept busy before one that is timed


class CountFlops(EngineCallback):
    """Counts the floating-point operations of forward and backward of one train step, by torch's counter.

    It is that of the second step, or of a sole one.

    Args:
        counts: whether to count; a compiled net's operations are not seen.

    Attributes:
        flops: matrix products, convolutions and attention; None where none was counted.
        images: whether the batch has a floating-point tensor of four dimensions.
    """

    order = Order.LAST  # what other callbacks do at a step's beginning is not counted

    def __init__(self, *, counts: bool = True) -> None:
        self.flops: float | None = None
        self.images = False
        self._counts = counts
        self._seen = 0
        self._step = contextlib.ExitStack()

    def on_batch_start(self, batch: RankBatch) -> None:
        """A step begins."""
        from torch.utils.flop_counter import FlopCounterMode

        self._seen += 1
        self.images = self.images or (self._seen == 1 and _has_images(batch.batch))
        if self._seen > 2 or not self._counts:
            return
        self._counter = FlopCounterMode(display=False)
        self._step.enter_context(self._counter)

    def on_batch_end(self, batch: RankBatch, values: Mapping[str, Value]) -> None:
        """A step is done."""
        if self._seen <= 2 and self._counts:
            self._step.close()
            self.flops = float(self._counter.get_total_flops()) or None

    def close(self) -> None:
        """Looks away, also in the midst of a step that failed."""
        self._step.close()


def _has_images(batch: Any) -> bool:
    if isinstance(batch, Tensor):
        return batch.ndim == 4 and batch.is_floating_point()
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return any(map(_has_images, parts))


def matrix_rate(device: torch.device, dtype: torch.dtype, wait: Callable[[], object]) -> float:
    """Returns the floating-point operations a second of a product of large square matrices.

    Args:
        device: where it is computed.
        dtype: of the matrices.
        wait: returns once the device has done what it was sent.
    """
    best, side = 0.0, _FIRST
    while True:
        left = torch.ones(side, side, device=device, dtype=dtype)
        seconds = _least_seconds(lambda left=left: left @ left, wait)  # type: ignore[misc]
        best = max(best, 2 * side**3 / seconds)
        if side >= _LARGEST or seconds >= _LONG:
            return best
        side *= 2


def _least_seconds(work: Callable[[], object], wait: Callable[[], object]) -> float:
    work()  # the first one readies the library
    spans = []
    for _ in range(_TIMES):
        wait()
        began = time.perf_counter()
        work()
        wait()
        spans.append(time.perf_counter() - began)
    return max(min(spans), 1e-9)


@dataclass(frozen=True)
class Queue:
    """A device that works off what the host has sent it.

    Attributes:
        wait: returns once it has done all of it.
        hold: keeps it busy for so many seconds.
        mark: puts a mark after what it was sent so far.
        between: returns the seconds between two marks that it has come to.
        now: the host's clock, in seconds.
    """

    wait: Callable[[], object]
    hold: Callable[[float], object]
    mark: Callable[[], Any]
    between: Callable[[Any, Any], float]
    now: Callable[[], float] = time.perf_counter


_CYCLES = 2e9  # a second, of most cards


def queue_of(device: torch.device) -> Queue | None:
    """Returns a CUDA device's queue; None on others."""
    if device.type != "cuda":
        return None

    def mark() -> Any:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    return Queue(
        wait=lambda: torch.cuda.synchronize(device),
        hold=lambda seconds: torch.cuda._sleep(int(seconds * _CYCLES)),  # type: ignore[no-untyped-call]
        mark=mark,
        between=lambda one, other: one.elapsed_time(other) / 1e3,
    )


class MeasureLaunches(EngineCallback):
    """Times what the host takes to send a step to the device, and the device for what it was sent, by turns.

    The host is timed with an idle device. The device is timed while it is held back until the whole step was sent, so
    that it never waits for the host.

    Args:
        queue: the device's.
    """

    order = Order.LAST

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._host: list[float] = []
        self._device: list[float] = []
        self._seen = 0
        self._started: Any = None
        self._began = 0.0

    @property
    def host(self) -> float | None:
        """Seconds in which the host sends a step; None where that is not known."""
        return median(self._host[1:]) if len(self._host) > 1 else None

    @property
    def device(self) -> float | None:
        """Seconds in which the device computes a step; None where that is not known."""
        return median(self._device) if self._device else None

    def on_batch_start(self, batch: RankBatch) -> None:
        """A step begins."""
        self._seen += 1
        self._queue.wait()
        self._started = None
        if self._seen % 2 == 0:
            self._queue.hold(_HELD * self._host[-1])
            self._started = self._queue.mark()
        self._began = self._queue.now()

    def on_batch_end(self, batch: RankBatch, values: Mapping[str, Value]) -> None:
        """A step was sent."""
        host = self._queue.now() - self._began
        if self._started is None:
            self._host.append(host)
            return
        ended = self._queue.mark()
        self._queue.wait()
        self._device.append(self._queue.between(self._started, ended))
