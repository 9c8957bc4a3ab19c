"""Writes checkpoints beside the training, from a copy in memory, or in its way where there is no room for the copy."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dtrain.checkpoint.tensors import total_bytes

logger = logging.getLogger(__name__)

_LEAST_COPIED = 1 << 16  # below this a copy takes no room worth a thought


class Snapshot:
    """A copy of tensors in the CPU's memory; the next copy goes into the same memory, where it fits.

    Fresh memory costs a page fault each 4 KiB, which takes longer than the copy itself.
    """

    def __init__(self) -> None:
        self._room: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies; waits until all is copied.

        Args:
            tensors: by name, on any device.

        Returns:
            contiguous tensors on the CPU, none of which shares memory with what was given. They hold until the next
            call.
        """
        self._room = {name: self._copied(name, tensor) for name, tensor in tensors.items()}
        if any(not tensor.is_cpu for tensor in tensors.values()):
            torch.accelerator.synchronize()
        return self._room

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        known = self._room.get(name)
        if known is None or known.shape != tensor.shape or known.dtype != tensor.dtype:
            known = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return known.copy_(tensor.detach(), non_blocking=True)


class Writer:
    """Runs one job at a time; what a job raises is raised by the next call.

    Args:
        beside: whether jobs run in a thread.
    """

    def __init__(self, *, beside: bool) -> None:
        self.beside = beside
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is not done yet."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, job: Callable[[], None], *, beside: bool | None = None) -> None:
        """Waits for the job before, then starts this one.

        Raises:
            BaseException: what the job before raised, or this one where it does not run beside.
        """
        self.wait()
        if self.beside if beside is None else beside:
            self._thread = threading.Thread(target=self._run, args=(job,), name="dtrain-checkpoint")
            self._thread.start()
            return
        job()

    def wait(self) -> None:
        """Returns once the job is done.

        Raises:
            BaseException: what it raised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raises what a job raised, once."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001 - it is raised where the training is
            self._failure = error


def fits_beside(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a copy of tensors takes at most half of the memory that is still free."""
    needed = total_bytes(tensors)
    return needed <= _LEAST_COPIED or needed * 2 <= free_memory()


def free_memory() -> int:
    """Returns the bytes that this process could still take: of the machine, or of its control group."""
    free = [_machine_free()]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        numbers = [_number(Path("/sys/fs/cgroup") / name) for name in (limit, used)]
        if numbers[0] is not None and numbers[1] is not None:
            free.append(max(0, numbers[0] - numbers[1]))
    return min(free)


def _machine_free() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 1 << 62  # not Linux: not known
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 1 << 62)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max": no limit


def timed(job: Callable[[], None]) -> float:
    """Runs a job and returns its seconds."""
    started = time.perf_counter()
    job()
    return time.perf_counter() - started
