"""How many threads a rank may use: the cores that are really there for it, shared among local ranks."""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

from dtrain.launch.env.cgroups import own_folders

_CPUS = Path("/sys/devices/system/cpu")


def usable_cores() -> int:
    """Returns the number of physical cores in this process's affinity mask, within its cgroup's quota."""
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
    cores = len({_siblings(cpu) for cpu in cpus})
    quota = cgroup_quota()
    return max(1, min(cores, math.ceil(quota)) if quota else cores)


def _siblings(cpu: int) -> str:
    """Names the physical core of a logical one."""
    try:
        return (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def cgroup_quota() -> float | None:
    """Returns the CPUs that cgroup v2 or v1 allows, by the tightest of those that hold this process; None for all."""
    quotas = [quota for folder in own_folders("cpu") if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _quota(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def set_threads(local_size: int, environ: MutableMapping[str, str] | None = None) -> None:
    """Sets OMP_NUM_THREADS for this rank where nobody has; must come before torch is loaded.

    Args:
        local_size: ranks that share this machine.
        environ: the environment to change, by default the process's.
    """
    env = os.environ if environ is None else environ
    env.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // local_size)))
