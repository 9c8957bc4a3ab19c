"""Writes checkpoints beside the training, from a copy in memory, or in its way where there is no room for the copy."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dtrain.checkpoint.tensors import total_bytes
from dtrain.launch.env.memory import read_memory

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

    def lacking(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns those of the tensors, by name, that there is no memory for yet."""
        return {name: tensor for name, tensor in tensors.items() if self._known(name, tensor) is None}

    def _known(self, name: str, tensor: Tensor) -> Tensor | None:
        known = self._room.get(name)
        fits = known is not None and known.shape == tensor.shape and known.dtype == tensor.dtype
        return known if fits else None

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        known = self._known(name, tensor)
        if known is None:
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
        self.settle()
        self.check()

    def settle(self) -> None:
        """Returns once the job is done; what it raised is raised by a later call."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

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


def fits_on_disk(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a copy of tensors takes at most half of the memory that is still free."""
    needed = total_bytes(tensors)
    if needed <= _LEAST_COPIED:
        return True
    memory = read_memory()
    return memory is None or needed * 2 <= memory.left
