"""How much memory a rank may take, how much it took, and its end where it is about to take more."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size

_LOOK_SECONDS = 0.005
_PAGE = resource.getpagesize()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the machine."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, Exception) and bool(should_reduce_batch_size(error))


def limit_device(device: torch.device, limit: int | None) -> int:
    """Lets torch take at most so much of a GPU's memory.

    Returns:
        the bytes that there are for this process.
    """
    free, total = torch.cuda.mem_get_info(device)
    if limit is None:
        return int(free)
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    return min(int(free), limit)


def peak_of(device: torch.device) -> int:
    """Returns the most bytes that were taken at once: of a GPU's memory by tensors, else of the machine's by all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest << 10


def taken_now() -> int:
    """Returns the bytes of the machine's memory that this process has now; its peak where that is not told."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except OSError:
        return peak_of(torch.device("cpu"))


class Guard:
    """Ends this process before it drives the machine into swapping or has the kernel end some process.

    Args:
        limit: bytes of the machine's memory.
        last: is called with what was taken, right before the end.
    """

    def __init__(self, limit: int, last: Callable[[int], None]) -> None:
        self._limit = limit
        self._last = last
        threading.Thread(target=self._watch, name="memory guard", daemon=True).start()

    def _watch(self) -> None:
        while (taken := taken_now()) <= self._limit:
            time.sleep(_LOOK_SECONDS)
        self._last(taken)
        os._exit(1)
