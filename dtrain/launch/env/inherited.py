"""What makes a process a rank belongs to that process alone: in the programs that it starts it is void.

A rank's variables are inherited by whatever it starts: `dtrain evaluate`, `sbatch`, another training. There they would
tell of a place in a world that another process has taken. A rank marks them with itself (`mark_rank`); a program that
finds the mark of another process drops them before it believes any (`drop_inherited`), as far as no launcher in between
has set them anew: torchrun or srun, which a rank may start, too. Programs that know nothing of
dtrain are started without them, once the rank has joined its world (`joined`): until then, a script that only starts
the real trainer hands its place on, as under any launcher.

Processes of multiprocessing, DataLoader workers among them, are parts of their rank, and read its variables as it does.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping, MutableMapping
from functools import wraps
from pathlib import PurePath
from typing import Any

from dtrain.launch.env.conventions import RANK_VARIABLES
from dtrain.launch.signals.owner import started_at

MARK = "DTRAIN_RANK_PROCESS"
GIVEN = "DTRAIN_GIVEN"  # names of further variables that a launcher gave its ranks, such as the run's name
_RANKS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"),
)
_OURS = (
    *("DTRAIN_REPORT_DIR", "DTRAIN_SUPERVISOR_PID", "DTRAIN_HANG_SECONDS", "DTRAIN_JOB_KEY", "DTRAIN_JOB"),
    *("DTRAIN_RDZV_TIMEOUT", "DTRAIN_PORT_FILE", GIVEN, MARK),
)
_TASK = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_TASK_PID")
_PREFIX = "TORCHELASTIC_"
_GROUPS = (_RANKS, _TASK, RANK_VARIABLES)  # each is set as a whole, by one launcher
_SUBMITS = ("sbatch", "salloc", "qsub", "bsub", "flux")  # what hands its environment on to a job

_state = {"marked": False, "joined": False}  # by this interpreter, or by the one that this was forked off


def mark_rank() -> None:
    """Marks the environment as that of this rank, once; from here on programs that it starts are no ranks."""
    if _state["marked"] or _is_worker():
        return
    os.environ[MARK] = _mark()
    _state["marked"] = True
    _start_others_clean()


def joined() -> None:
    """This rank has taken its place in the world: no program that it starts can take it any more."""
    _state["joined"] = True
    if MARK in os.environ and not _is_worker():
        os.environ[MARK] = _mark()  # its place on the host and rank 0's port may be known only since the ranks have met


def drop_inherited() -> str:
    """Drops the variables of a rank that has started this process, so that it is whatever it would be by itself.

    Returns:
        the rank whose they were, in words; empty where there was nothing to drop.
    """
    mark = os.environ.get(MARK)
    if mark is None or _state["marked"] or _is_worker():
        return ""
    process, *seen = mark.split(";")
    if process == _me():
        return ""
    whose = f"rank {os.environ.get('RANK', '?')} of {os.environ.get('WORLD_SIZE', '?')}"
    unchanged = [names for names, digest in zip(_groups(os.environ), seen, strict=False) if _digest(names) == digest]
    given = [name for name in os.environ.get(GIVEN, "").split(",") if name in os.environ]
    for name in {*given, *(name for name in _OURS if name in os.environ), *(name for one in unchanged for name in one)}:
        del os.environ[name]
    return whose if unchanged and unchanged[0] else ""


def belonging(environ: Mapping[str, str]) -> list[str]:
    """Returns the names of those variables of an environment that make a process a rank."""
    given = environ.get(GIVEN, "").split(",")
    groups = [name for names in _groups(environ) for name in names]
    return list(dict.fromkeys([*groups, *(name for name in (*_OURS, *given) if name in environ)]))


def without_rank(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns an environment for a job of its own: without what makes a process a rank, where it is a rank's.

    A MASTER_ADDR and MASTER_PORT of the user's own, beside which there is no rank, are kept.
    """
    if MARK not in environ and "RANK" not in environ:
        return dict(environ)
    dropped = set(belonging(environ))
    return {name: value for name, value in environ.items() if name not in dropped}


def _groups(environ: Mapping[str, str]) -> list[list[str]]:
    """Returns the names that are there, of each group of variables."""
    found = [[name for name in sorted(environ) if name in group] for group in _GROUPS]
    found[0] += [name for name in sorted(environ) if name.startswith(_PREFIX)]
    return found


def _mark() -> str:
    return ";".join([_me(), *map(_digest, _groups(os.environ))])


def _digest(names: list[str]) -> str:
    return f"{zlib.crc32(repr([(name, os.environ[name]) for name in names]).encode()):08x}"


def _me() -> str:
    return f"{socket.gethostname()}:{os.getpid()}:{started_at(os.getpid())}"


def _is_worker() -> bool:
    """Whether this is a process of multiprocessing, or of loky (joblib), so a part of what has started it."""
    module = sys.modules.get("multiprocessing.process")
    if module is not None and (
        module.parent_process() is not None or getattr(module.current_process(), "_inheriting", False)
    ):
        return True
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec is not None and "loky" in spec.name


def _start_others_clean() -> None:
    """Has `subprocess` start other programs without this rank's variables."""
    start = subprocess.Popen.__init__

    @wraps(start)
    def start_clean(self: Any, args: Any, *rest: Any, **options: Any) -> None:
        args = list(args) if isinstance(args, Iterator) else args  # which can be read once
        if "env" in options or len(rest) < _ENV_PLACE:  # by place nobody gives it
            options["env"] = _for_child(args, options.get("env"))
        start(self, args, *rest, **options)

    subprocess.Popen.__init__ = start_clean  # type: ignore[method-assign]


_ENV_PLACE = 10  # of `env` among the parameters that follow `args`


def _for_child(args: Any, env: Mapping[Any, Any] | None) -> Mapping[Any, Any] | None:
    """Returns what a program shall have as its environment; variables that were set for it alone stay."""
    if not _has_joined() and _program(args) not in _SUBMITS:
        return env
    mine: MutableMapping[str, str] = os.environ
    dropped = {name: mine[name] for name in belonging(mine)}
    return {k: v for k, v in (mine if env is None else env).items() if dropped.get(os.fsdecode(k)) != os.fsdecode(v)}


def _has_joined() -> bool:
    """Whether this rank has, by dtrain or by torch itself, taken its place in the world."""
    groups = sys.modules.get("torch.distributed.distributed_c10d")
    return _state["joined"] or (groups is not None and groups._default_pg_init_method is not None)


def _program(args: Any) -> str:
    first = args if isinstance(args, (str, bytes, os.PathLike)) else next(iter(args), "")
    words = os.fsdecode(first).split() if isinstance(args, (str, bytes)) else [os.fsdecode(first)]
    return PurePath(words[0]).name if words else ""
