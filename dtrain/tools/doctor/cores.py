"""Cores that are really there for the ranks, threads, memory, and shared memory."""

from __future__ import annotations

import errno
import os
import resource
import tempfile
from collections.abc import Mapping
from pathlib import Path

from dtrain.launch.env.memory import read_memory
from dtrain.launch.env.socket_paths import is_too_long, short_folder
from dtrain.launch.env.threads import cgroup_quota, usable_cores
from dtrain.tools.doctor.finding import Finding, passed
from dtrain.tools.doctor.words import GIB, MIB, many, size

CORES, MEMORY, SHARED, FILES = "cores", "memory", "shared memory", "open files"
TEMPORARY = "temporary files"
_SHM = Path("/dev/shm")  # noqa: S108 - it is the thing to look at
_SHM_NEEDED, _SHM_WISHED = 16 * MIB, GIB
_RANK_NEEDS = GIB
_FILES_WISHED = 1024
_BINDING = ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def check_cores(ranks: int, environ: Mapping[str, str] | None = None) -> Finding:
    """Compares cores that may be used (affinity, cgroup) with ranks and OMP_NUM_THREADS.

    Args:
        ranks: on this machine.
        environ: by default the process's.
    """
    env = os.environ if environ is None else environ
    usable, there = usable_cores(), os.cpu_count() or 1
    quota = cgroup_quota()
    group = "" if quota is None else f", of which this cgroup may use {quota:g}"
    words = f"{usable} usable of {many(there, 'logical CPU')}{_bound()}{group}, {many(ranks, 'rank')}"
    fair = max(1, usable // ranks)
    asked = env.get("OMP_NUM_THREADS", "")
    words += f", OMP_NUM_THREADS={asked}" if asked else f", {many(fair, 'thread')} each"
    first = asked.partition(",")[0].strip()  # of nested levels, the outer one
    if asked and not (first.isdigit() and int(first) > 0):
        return Finding(CORES, "warn", words, "unset OMP_NUM_THREADS: it should be a number of threads")
    if ranks > usable:
        return Finding(CORES, "warn", words, _more_cores(env, ranks))
    if asked and int(first) * ranks > usable:
        words = f"{words}: {int(first) * ranks} threads on {many(usable, 'core')}"
        return Finding(CORES, "warn", words, f"unset OMP_NUM_THREADS (dtrain divides the cores), or set it to {fair}")
    bound = [name for name in _BINDING if env.get(name, "").lower() not in ("", "false", "none", "disabled")]
    if bound and ranks > 1:
        words = f"{words}, {bound[0]}={env[bound[0]]}: every rank's threads are bound to the same cores"
        return Finding(CORES, "warn", words, f"unset {bound[0]}, or let the launcher bind each rank to its own cores")
    return passed(CORES, words)


def _bound() -> str:
    """Says that this process may not run on all cores, where that is so."""
    try:
        mask = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return ""
    return "" if len(mask) == os.cpu_count() else f", bound to {_ranges(sorted(mask))}"


def _ranges(numbers: list[int]) -> str:
    """Returns 0,1,2,5 as "0-2,5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _more_cores(env: Mapping[str, str], ranks: int) -> str:
    if "SLURM_JOB_ID" in env:
        return f"request --cpus-per-task={ranks} or more from SLURM, and pass it to srun as well (SRUN_CPUS_PER_TASK)"
    return f"start fewer ranks, or give this process at least {ranks} cores"


def check_memory(ranks: int) -> Finding:
    """Compares the memory that is left, by machine and by cgroup, with what ranks need to start: about 1 GiB each."""
    memory = read_memory()
    if memory is None:
        return Finding(MEMORY, "skip", "unknown on this system")
    left, words = memory.left, f"{size(memory.free)} free of {size(memory.total)}"
    if memory.grouped and memory.group is not None:
        words = f"{size(left)} left of this cgroup's {size(memory.group[1])} ({words} in the machine)"
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        words, left = f"{words}, ulimit -v {size(space)}", min(left, space)
    if left < ranks * _RANK_NEEDS:
        remedy = (
            f"start fewer ranks, stop other programs, or request more memory: {many(ranks, 'rank')} take 1 GiB each"
        )
        return Finding(MEMORY, "warn", words, remedy)
    return passed(MEMORY, words)


def check_shared_memory(folder: Path = _SHM) -> Finding:
    """Takes some shared memory: DataLoader workers, gloo and NCCL pass their data through it."""
    if not folder.is_dir():
        return Finding(SHARED, "warn", f"there is no {folder}", "DataLoader workers need it: mount a tmpfs there")
    stat = os.statvfs(folder)
    total, free = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize
    words = f"{folder}: {size(free)} free of {size(total)}"
    larger = "increase it: docker run --shm-size=8g (or --ipc=host), or mount -o remount,size=8G /dev/shm"
    remedy = larger if total < _SHM_WISHED else f"remove files left by other programs: ls -lt {folder}"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, _SHM_NEEDED)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            return Finding(SHARED, "fail", f"{words}: {size(_SHM_NEEDED)} cannot be allocated", remedy)
        why = f"{words}: cannot be written: {error.strerror}"
        return Finding(SHARED, "fail", why, f"mount a tmpfs there that this user can write to: chmod 1777 {folder}")
    if free < _SHM_WISHED:
        return Finding(SHARED, "warn", f"{words}: DataLoader workers pass batches through it", remedy)
    return passed(SHARED, words)


def check_temporary() -> Finding:
    """Looks at the folder for temporary files, below which worker processes have their sockets."""
    folder, named = tempfile.gettempdir(), os.environ.get("TMPDIR", "")
    words = f"{folder}: {size(os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize)} free"
    if named and Path(named).resolve() != Path(folder).resolve():
        words = f"{words}, in place of TMPDIR={named}"
        return Finding(
            TEMPORARY, "warn", words, "let TMPDIR name a folder that is there and may be written, or unset it"
        )
    if not is_too_long(folder):
        return passed(TEMPORARY, words)
    words = f"{words}; its path has {len(os.fsencode(folder))} bytes, too many for sockets"
    if short_folder() is None:
        return Finding(TEMPORARY, "fail", words, "set TMPDIR to a shorter one: data loader workers would hang")
    return passed(TEMPORARY, f"{words}, which dtrain makes in {short_folder()}")


def check_open_files() -> Finding:
    """Looks at how many files a process may hold open: DataLoader workers take several a batch."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    words = f"ulimit -n {soft}, at most {hard}"
    if soft != resource.RLIM_INFINITY and soft < _FILES_WISHED:
        more = f"ulimit -n {min(hard, 65536) if hard >= 0 else 65536}"
        return Finding(FILES, "warn", f"{words}: DataLoader workers need more", more)
    return passed(FILES, words)
