"""The way of batches to the device: beside the steps, on a stream of its own, where that is a CUDA GPU.

::

    stream of the copies      | batch 1 |      | batch 2 |       | batch 3 |
    stream of the steps                 | step 1  .........| step 2  .........| step 3
    Python            fetch 1, step 1, fetch 2, step 2, fetch 3, ...

A step is only sent to the GPU when Python goes on. So the next batch is fetched, and its copy begins, while the GPU
still computes: batches are fetched in the order, and between the same steps, as without any of this, and a checkpoint
knows of no batch that is underway. A step that waits for the GPU (`loss.item()`) lets nothing go on beside it; so of a
DataLoader whose workers read ahead anyway, the next batch is fetched, and its copy begins, before the step.

Memory is handed over from one stream to the other: the steps wait for the copy's end, and the allocator is told that
the steps use what the copies' stream has allocated. Pageable memory is copied to pinned memory first, since the GPU
could else not read it by itself.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections import UserDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dtrain.data.partition import RankBatch

logger = logging.getLogger(__name__)

LEAST = 256 * 1024  # bytes of a batch that is copied beside the steps: a smaller one takes no longer than to arrange it
_MOST = 3  # batches that Python may be ahead of the GPU: else those that wait could fill its memory


class Streams(Protocol):
    """What copies beside the steps need of a device; see `CudaStreams`."""

    def copying(self) -> AbstractContextManager[Any]:
        """While inside, what is sent to the device goes to the copies' stream."""

    def pin(self, part: Any) -> Any:
        """Returns a tensor, or what has `pin_memory`, in pinned memory."""

    def mark(self) -> Any:
        """Returns an event: all that the copies' stream was given so far is done."""

    def hand_over(self, mark: Any, parts: Sequence[Any]) -> None:
        """Has the present stream wait for an event, and the allocator know that it uses these parts."""

    def pace(self) -> None:
        """Waits where the present stream is more than some batches behind."""


class CudaStreams:
    """The copies' stream of a CUDA device.

    Args:
        device: the rank's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._given: deque[Any] = deque()

    def copying(self) -> AbstractContextManager[Any]:
        """See `Streams`."""
        return torch.cuda.stream(self._stream)

    def pin(self, part: Any) -> Any:
        """See `Streams`."""
        return part if isinstance(part, Tensor) and part.is_pinned() else part.pin_memory()

    def mark(self) -> Any:
        """See `Streams`."""
        return self._stream.record_event()

    def hand_over(self, mark: Any, parts: Sequence[Any]) -> None:
        """See `Streams`."""
        present = torch.cuda.current_stream(self._device)
        present.wait_event(mark)
        for part in parts:
            part.record_stream(present)
        done: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._given.append(present.record_event(done))

    def pace(self) -> None:
        """See `Streams`."""
        while len(self._given) > _MOST:
            self._given.popleft().synchronize()


@dataclass(slots=True)
class Underway:
    """A batch whose copy has begun.

    Attributes:
        batch: on the device, once `mark` has come.
        mark: the copy's end; None where the present stream does it.
        parts: what was copied by the copies' stream.
    """

    batch: Any
    mark: Any = None
    parts: Sequence[Any] = ()


class BatchMover:
    """Moves batches to the device.

    Args:
        device: the rank's.
        streams: for copies beside the steps; None for none.
        send: moves a nested batch; by default Accelerate's `send_to_device`.
        least: bytes below which a batch is not copied beside the steps.
    """

    def __init__(
        self,
        device: torch.device,
        streams: Streams | None = None,
        send: Callable[[Any], Any] | None = None,
        least: int = LEAST,
    ) -> None:
        self._device, self._streams, self._least = device, streams, least
        self._send = functools.partial(_send, device=device) if send is None else send
        self._pins = True

    def __call__(self, batch: Any) -> Any:
        """Returns a batch on the device; the present stream will find it there."""
        return self.finish(self.begin(batch))

    def begin(self, batch: Any) -> Underway:
        """Begins to copy a batch."""
        parts = None if self._streams is None else parts_of(batch)
        if self._streams is None or parts is None:
            return Underway(self._send(batch))
        if all(isinstance(part, Tensor) and not part.is_cpu and part.device == self._device for part in parts):
            return Underway(batch)  # it was made there
        if sum(map(_size, parts)) < self._least:
            return Underway(self._send(batch))
        self._streams.pace()
        with self._streams.copying():
            moved = self._send(self._pinned(batch, self._streams))
            return Underway(moved, self._streams.mark(), parts_of(moved) or ())

    def finish(self, underway: Underway) -> Any:
        """Returns a batch whose copy has begun; what is sent to the device from now on finds it there."""
        if underway.mark is not None and self._streams is not None:
            self._streams.hand_over(underway.mark, underway.parts)
        return underway.batch

    def ahead(self, shares: Iterator[RankBatch]) -> Iterator[RankBatch]:
        """Yields shares on the device; the next one is fetched, and its copy begins, before each is given.

        What the loader raises is raised where its batch would have been given.
        """
        fetched = self._fetch(shares)
        while fetched is not None:
            if isinstance(fetched, BaseException):
                raise fetched
            (share, underway), fetched = fetched, self._fetch(shares)
            share.batch = self.finish(underway)
            yield share

    def _fetch(self, shares: Iterator[RankBatch]) -> tuple[RankBatch, Underway] | Exception | None:
        try:
            share = next(shares, None)
            return None if share is None else (share, self.begin(share.batch))
        except Exception as error:  # noqa: BLE001 - raised where it belongs
            return error

    def _pinned(self, batch: Any, streams: Streams) -> Any:
        if not self._pins:
            return batch
        try:
            return pinned(batch, streams.pin)
        except RuntimeError as error:
            self._pins = False
            logger.warning("batches cannot be copied to pinned memory, so their copies take longer: %s", error)
            return batch


def mover_of(device: torch.device, *, prefetch: bool = True) -> BatchMover | None:
    """Returns what moves batches to a rank's device; None for the CPU, where they are.

    Args:
        device: the rank's.
        prefetch: whether copies go beside the steps, on a CUDA device.
    """
    if device.type == "cpu":
        return None
    return _mover(device, prefetch and device.type == "cuda")


@functools.cache
def _mover(device: torch.device, beside: bool) -> BatchMover:
    """One for each device, since each stream keeps the memory that was allocated in it."""
    return BatchMover(device, CudaStreams(device) if beside else None)


def _send(batch: Any, device: torch.device) -> Any:
    from accelerate.utils import send_to_device

    return send_to_device(batch, device, non_blocking=True)


def parts_of(batch: Any) -> list[Any] | None:
    """Returns the tensors of a nested batch, and the objects that can tell the allocator of a stream themselves.

    Returns:
        None where it has something else that can be moved, of which it is not known what it consists of.
    """
    found: list[Any] = []
    return found if _collect(batch, found) else None


def _collect(batch: Any, found: list[Any]) -> bool:
    if isinstance(batch, Tensor):
        plain = batch.layout is torch.strided and not batch.is_nested and not is_traceable_wrapper_subclass(batch)
        found.append(batch)
        return plain
    if isinstance(batch, PackedSequence):
        return all(_collect(part, found) for part in tuple(batch))
    if all(callable(getattr(batch, name, None)) for name in ("to", "pin_memory", "record_stream")):
        found.append(batch)  # such as a graph of torch_geometric, or a TensorDict
        return True
    if hasattr(batch, "to") and not isinstance(batch, UserDict):
        return False
    if isinstance(batch, Mapping):
        return all(_collect(part, found) for part in batch.values())
    return not isinstance(batch, (list, tuple)) or all(_collect(part, found) for part in batch)


def _size(part: Any) -> int:
    """The bytes of a part that is to be copied."""
    if isinstance(part, Tensor):
        return part.nbytes if part.is_cpu else 0
    return LEAST


def pinned(batch: Any, pin: Callable[[Any], Any]) -> Any:
    """Returns a nested batch of the same types with its plain CPU tensors in pinned memory; others are as they were."""
    if isinstance(batch, Tensor):
        return pin(batch) if type(batch) is Tensor and batch.is_cpu and not batch.requires_grad else batch
    if isinstance(batch, PackedSequence):
        return pin(batch) if batch.data.is_cpu and not batch.data.requires_grad else batch
    if type(batch) is dict:
        return {key: pinned(part, pin) for key, part in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(pinned(part, pin) for part in batch)
    if isinstance(batch, UserDict):  # BatchEncoding of transformers, say
        own = copy.copy(batch)
        own.data = {key: pinned(part, pin) for key, part in batch.data.items()}
        return own
    named = isinstance(batch, tuple) and hasattr(batch, "_fields")
    return type(batch)(*(pinned(part, pin) for part in batch)) if named else batch
