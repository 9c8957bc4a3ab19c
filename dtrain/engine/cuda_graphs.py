"""CUDA graphs: what a captured step needs of a device, and nothing else."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import torch


class Graphs(Protocol):
    """What a captured step needs of a device; see `CudaGraphs`."""

    def beside(self) -> AbstractContextManager[Any]:
        """While inside, operations go to the stream of the captures; what is outside comes before or after all."""

    def strict(self) -> AbstractContextManager[Any]:
        """While inside, an operation for which the CPU would wait for the device raises a RuntimeError."""

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Captures what a function does on the device, which does not do it yet.

        Returns:
            what does it, and what the function returned: tensors that have values after each replay.
        """


class CudaGraphs:
    """CUDA graphs of one device.

    Args:
        device: the rank's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def beside(self) -> Iterator[None]:
        """See `Graphs`. Steps that warm up, and ragged ones, run in the captures' stream: autograd and cuBLAS keep
        streams and workspaces of before."""
        present = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(present)
        try:
            with torch.cuda.stream(self._stream):
                yield
        except BaseException:
            with suppress(RuntimeError):  # of a device that has failed; the error that comes is its first one
                present.wait_stream(self._stream)
            raise
        present.wait_stream(self._stream)

    @contextmanager
    def strict(self) -> Iterator[None]:
        """See `Graphs`."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """See `Graphs`. Only this thread's calls are watched: a loader's thread may pin memory meanwhile."""
        graph = torch.cuda.CUDAGraph()
        gc.collect()
        collects = gc.isenabled()
        gc.disable()  # what is collected within a capture might free memory of the device
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                returned = function()
        finally:
            if collects:
                gc.enable()
        return graph.replay, returned


def graphs_of(device: torch.device) -> Graphs | None:
    """Returns the graphs of a rank's device; None where it has none."""
    return CudaGraphs(device) if device.type == "cuda" else None
