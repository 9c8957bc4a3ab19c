"""Tests side by side: what waits beside what computes, with pytest-xdist where it is installed.

On four cores and more, several files run at a time; on two, tests of ranks need both already. The tests of a file run in
its order, in one process, and what needs the machine for itself (its mounts, a SLURM cluster, a browser) is one group.
`pytest -n 0` runs one test at a time, as does a run of single files, one with -k, or with --pdb.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_TESTS = Path(__file__).resolve().parent.parent
# What counts or changes things of the whole machine: links, mounts, network namespaces.
_MACHINE = ("slurm/", "launch/test_nodes", "faults/test_fault_sweep")
_ORDER = ("machine", "page", "ranks/", "launch/", "faults/", "unit/")  # the long ones first, many short ones last
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


def workers(config: pytest.Config) -> int | None:
    """Returns how many processes shall run tests, or None where the command line says so, or one shall."""
    options = config.option
    here = config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput")
    if not here or options.numprocesses is not None or options.tx or options.dist != "no":
        return None
    single = options.usepdb or options.collectonly or options.keyword or options.capture == "no"
    if single or not any(Path(word).is_dir() for word in config.args):
        return None
    number = min(4, (os.cpu_count() or 1) // _CORES_A_WORKER)
    return number if number > 1 else None


def scheduler(config: pytest.Config, log: object) -> object:
    """Returns what deals the groups out to the processes: pytest-xdist's, with groups of ours."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = Path(nodeid.partition("::")[0])
            return group((config.rootpath / path).relative_to(_TESTS).as_posix())

    config.option.loadscopereorder = False  # the order is that of `in_order`
    return ByGroup(config, log)
