"""Where each rank is, in a small memory-mapped file that its supervisor reads: also when the rank dies of a sudden.

What a process wrote to such a file stays there however it ends. A beat takes well below a microsecond: no system
call, no lock, no communication.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from dtrain.launch.monitor.exit_report import identity

_PLACE = struct.Struct("<QII16s")  # beats, epoch, step, phase
_DEVICE = struct.Struct("<16s")
_DEVICE_AT = 32
_SIZE = 64

SETUP, DONE = "setup", "done"
SCRIPT = "script"  # a program of the user's own, outside of loops over prepared loaders: it may work without beats


@dataclass(frozen=True)
class Beat:
    """What a rank wrote last.

    Attributes:
        count: beats so far; 0 where it never wrote.
        phase: setup, train, valid, checkpoint, or done; empty where it never wrote.
        epoch: 0 before the first one.
        step: 0 outside of the passes.
        device: where it computes; empty where it is not known yet.
    """

    count: int = 0
    phase: str = ""
    epoch: int = 0
    step: int = 0
    device: str = ""

    def __str__(self) -> str:
        """Words such as "epoch 2, train step 7", or "setup"."""
        where = f"{self.phase} step {self.step}" if self.step else self.phase
        return f"epoch {self.epoch}, {where}" if self.epoch else where or "its start"


class Heartbeat:
    """One rank's file; several objects may write to the same one, one after the other.

    Args:
        path: the file; it is made where it is not there, with its block on the disk: a beat that found none there, on a
            full disk, would be the process's end by SIGBUS.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            there = os.pread(descriptor, _SIZE, 0)
            if os.pwrite(descriptor, there.ljust(_SIZE, b"\0"), 0) != _SIZE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            self._map = mmap.mmap(descriptor, _SIZE)
        finally:
            os.close(descriptor)
        self._count, self._epoch, _, self._phase = _PLACE.unpack_from(self._map, 0)

    def enter(self, phase: str, epoch: int = 0) -> None:
        """Another phase begins."""
        self._phase, self._epoch = phase.encode(), epoch
        self.step(0)

    def step(self, step: int) -> None:
        """Another step of the phase begins."""
        self._count += 1
        _PLACE.pack_into(self._map, 0, self._count, self._epoch, step, self._phase)

    def computes_on(self, device: str) -> None:
        """Notes the rank's device."""
        _DEVICE.pack_into(self._map, _DEVICE_AT, device.encode())


def own_heartbeat() -> Heartbeat | None:
    """Returns the heartbeat of this process, None where no supervisor reads it, or it cannot be written."""
    me = identity()
    try:
        return None if me.reports is None else Heartbeat(_path(me.reports, me.rank))
    except OSError:  # a full disk
        return None


def read_beat(folder: Path, rank: int) -> Beat:
    """Returns what a rank wrote last into the folder of reports."""
    try:
        data = _path(folder, rank).read_bytes()
    except OSError:
        return Beat()
    if len(data) < _SIZE:
        return Beat()
    count, epoch, step, phase = _PLACE.unpack_from(data, 0)
    (device,) = _DEVICE.unpack_from(data, _DEVICE_AT)
    return Beat(count, _text(phase), epoch, step, _text(device))


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.beat"


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")
