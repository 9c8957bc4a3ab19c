"""Tests side by side: what waits beside what computes, with pytest-xdist where it is installed.

The tests of a file run in its order, in one process, and what needs the machine for itself (its mounts, a SLURM cluster,
a browser) is one group. On four cores and more, several files run at a time. On two or three, tests of ranks need all of
the cores already: one process runs these, and another one those that wait (a cluster, a browser) or that need one core.
`pytest -n 0` runs one test at a time, as does a run of single files, one with -k, or with --pdb.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

_TESTS = Path(__file__).resolve().parent.parent
# What counts or changes things of the whole machine: links, mounts, network namespaces.
_MACHINE = ("slurm/", "launch/test_nodes", "faults/test_fault_sweep")
# The long ones first. Last are those that most easily run beside others of their kind: they take no process to task.
_ORDER = ("machine", "page", "faults/", "launch/", "unit/", "ranks/")
_WAITING = ("machine", "page", "unit/")  # they wait, or need one core
_CORES_A_WORKER = 2


def group(path: str) -> str:
    """Returns what a test file is run with, by its path below tests/: its own path, or the name of a group."""
    if path.startswith(_MACHINE):
        return "machine"
    return "page" if path.startswith("page/") else path


def in_order(items: list[pytest.Item]) -> None:
    """Sorts tests by their groups; those of a group stay as they are."""
    items.sort(key=lambda item: _place(group(item.path.relative_to(_TESTS).as_posix())))


def _place(name: str) -> int:
    return next((place for place, start in enumerate(_ORDER) if name.startswith(start)), len(_ORDER))


def next_group(waiting: Iterable[str], number: int, few_cores: bool) -> str:
    """Returns which group a process runs next.

    Args:
        waiting: the groups that none has begun, in their order.
        number: of the process, from 0 on.
        few_cores: whether there are too few cores for two groups that compute.
    """
    names = list(waiting)
    if not few_cores:
        return names[0]
    computes = [name for name in names if not name.startswith(_WAITING)]
    if number > 0:
        return (computes or names)[0]
    return next((name for name in names if name.startswith(_WAITING)), names[-1])


def workers(config: pytest.Config) -> int | None:
    """Returns how many processes shall run tests, or None where the command line says so, or one shall."""
    options = config.option
    here = config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput")
    if not here or options.numprocesses is not None or options.tx or options.dist != "no":
        return None
    single = options.usepdb or options.collectonly or options.keyword or options.capture == "no"
    if single or not any(Path(word).is_dir() for word in config.args):
        return None
    cores = os.cpu_count() or 1
    return None if cores == 1 else max(2, min(4, cores // _CORES_A_WORKER))


def scheduler(config: pytest.Config, log: object) -> object:
    """Returns what deals the groups out to the processes: pytest-xdist's, with groups of ours."""
    from xdist.scheduler import LoadScopeScheduling

    few_cores = (os.cpu_count() or 1) < 2 * _CORES_A_WORKER

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = Path(nodeid.partition("::")[0])
            return group((config.rootpath / path).relative_to(_TESTS).as_posix())

        def _assign_work_unit(self, node: object) -> None:
            number = list(self.assigned_work).index(node)
            self.workqueue.move_to_end(next_group(self.workqueue, number, few_cores), last=False)
            super()._assign_work_unit(node)

    config.option.loadscopereorder = False  # the order is that of `in_order`
    return ByGroup(config, log)
