"""The run folder's file system: room, speed, locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dtrain.tools.doctor.finding import Finding, passed
from dtrain.tools.doctor.words import GIB, MIB, rate, seconds, size

ROOM, SPEED, LOCKS = "run folder", "disk speed", "file locks"
_BLOCK, _BLOCKS, _SECONDS = MIB, 32, 1.0
_ROWS = 5
_ROOM_NEEDED, _ROOM_WISHED = 100 * MIB, 5 * GIB
_SLOW_WRITE, _SLOW_SYNC = 20e6, 0.25
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_ELSEWHERE = "use another folder for runs: run.dir=FOLDER"


@dataclass(frozen=True)
class WriteSpeed:
    """How fast files are written where runs are kept.

    Attributes:
        bytes_per_second: of a file, its sync included.
        sync: seconds that one line takes to be on the disk; the median of five.
    """

    bytes_per_second: float
    sync: float


def nearest_there(folder: Path) -> Path:
    """Returns the folder, or the nearest one above it that is there: a run's folder is made with its first run."""
    folder = folder.expanduser().absolute()
    return next(one for one in (folder, *folder.parents) if one.exists())


def check_folder(runs: Path) -> list[Finding]:
    """Looks at the folder of all runs by writing there, and leaves nothing behind.

    Args:
        runs: it need not be there yet.
    """
    there = nearest_there(runs)
    with contextlib.ExitStack() as stack:
        try:
            work = stack.enter_context(scratch(there))
        except OSError as error:
            why = f"{runs}: cannot write in {there}: {(error.strerror or str(error)).lower()}"
            return [Finding(ROOM, "fail", why, _ELSEWHERE)]
        return [_room(runs, there), _speed(work), _locks(work)]


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Makes a folder for the checks' own files, and takes it away again."""
    with tempfile.TemporaryDirectory(prefix=".dtrain-doctor-", dir=folder, ignore_cleanup_errors=True) as name:
        yield Path(name)


def _room(runs: Path, there: Path) -> Finding:
    stat = os.statvfs(there)
    free, total = stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize
    kind = file_system(there)
    words = f"{runs}: {size(free)} free of {size(total)}{f', {kind}' if kind else ''}"
    if stat.f_files and not stat.f_favail:
        return Finding(ROOM, "fail", f"{words}: no inodes left", f"remove files, or {_ELSEWHERE}")
    if total and free < _ROOM_NEEDED:
        return Finding(ROOM, "fail", f"{words}: too little space for checkpoints", f"free space, or {_ELSEWHERE}")
    if total and free < _ROOM_WISHED:
        return Finding(
            ROOM, "warn", words, f"a checkpoint takes three times the size of the weights: free space, or {_ELSEWHERE}"
        )
    if kind in ("tmpfs", "ramfs"):
        return Finding(ROOM, "warn", f"{words}: it is in memory, and lost at the next reboot", _ELSEWHERE)
    return passed(ROOM, words)


def file_system(folder: Path) -> str:
    """Returns the kind of file system that a folder is on ("ext4", "nfs4"), "" where it cannot be told."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    best, kind = -1, ""
    for line in lines:
        left, _, right = line.partition(" - ")
        point = Path(left.split()[4].encode().decode("unicode_escape"))
        if len(point.parts) >= best and folder.resolve().is_relative_to(point):  # the last one mounted is on top
            best, kind = len(point.parts), right.split()[0]
    return kind


def _speed(work: Path) -> Finding:
    try:
        written = measure_writes(work)
    except OSError as error:
        why = f"a file could not be written: {(error.strerror or str(error)).lower()}"
        return Finding(SPEED, "fail", why, f"free space, check the quota, or {_ELSEWHERE}")
    words = f"{rate(written.bytes_per_second)} synced, {seconds(written.sync)} to sync a line"
    if written.bytes_per_second < _SLOW_WRITE or written.sync > _SLOW_SYNC:
        slow = "checkpoints will be slow: save less often (checkpoint.every_steps), or use a faster disk"
        return Finding(SPEED, "warn", words, f"{slow}: run.dir=FOLDER")
    return passed(SPEED, words)


def measure_writes(work: Path) -> WriteSpeed:
    """Writes up to 32 MiB in a second, synced; then lines, each synced, as a history gets them.

    Raises:
        OSError: it cannot be written.
    """
    block, path = os.urandom(_BLOCK), work / "speed"  # a file system that packs its data gets nothing to pack
    began, count = time.monotonic(), 0
    with path.open("wb", buffering=0) as file:
        while count < _BLOCKS and time.monotonic() < began + _SECONDS:
            file.write(block)
            count += 1
        os.fsync(file.fileno())
    speed = count * _BLOCK / (time.monotonic() - began)
    path.unlink()
    with (work / "lines").open("ab", buffering=0) as file:
        spans = [_synced_line(file.fileno()) for _ in range(_ROWS)]
    return WriteSpeed(speed, statistics.median(spans))


def _synced_line(file: int) -> float:
    began = time.monotonic()
    os.write(file, b"1,0.5,0.9,0.6,0.8\n")
    os.fsync(file)
    return time.monotonic() - began


def _locks(work: Path) -> Finding:
    path = work / "lock"
    path.touch()
    with path.open("rb+") as first, path.open("rb+") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            words = f"this file system has no locks (flock: {(error.strerror or str(error)).lower()})"
            slower = "a second process on the same run is then detected by heartbeats, which takes up to 30 s"
            return Finding(
                LOCKS, "warn", words, f"{slower}; mount it with locks (NFS: without nolock; Lustre: -o flock)"
            )
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return passed(LOCKS, "flock excludes a second process")
    remedy = (
        "a run still has one owner, but an owner killed on another machine is only detected after 30 s; "
        "mount this file system with locks (Lustre: -o flock), or use another folder for runs: run.dir=FOLDER"
    )
    return Finding(LOCKS, "warn", "flock does not exclude a second process", remedy)
