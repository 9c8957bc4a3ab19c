"""What a launcher said about this process: rank facts, read from the environment before torch is loaded."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import WorldError
from dtrain.launch.env.conventions import refuse_alone, task_variables
from dtrain.launch.env.inherited import drop_inherited
from dtrain.launch.env.slurm_env import rank_variables, read_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankFacts:
    """One process's place in the job, as its launcher stated it.

    Attributes:
        rank: 0 to size - 1 over all nodes.
        size: number of ranks in the job.
        local_rank: 0 to local_size - 1 on this node.
        local_size: number of ranks on this node.
        launched: whether a launcher started this process as a rank.
        local_unknown: whether the launcher did not say the two local ones: they are 0 and 1 until the ranks have met
            and know each other's hosts.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launched: bool = False
    local_unknown: bool = False


def read_rank_facts(environ: Mapping[str, str] | None = None) -> RankFacts:
    """Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, as torchrun, Accelerate and dtrain set them.

    For a task of srun's, which has others beside it and no launcher, they are set first, as a launcher would have; so
    they are for those of other launchers that are understood. What a program has inherited from a rank is dropped.

    Raises:
        WorldError: a variable is no number, or rank and size do not fit together, or another launcher has started
            several processes, each of which would train alone.
    """
    if environ is None:
        drop_inherited()
    env = os.environ if environ is None else environ
    if "RANK" not in env and "WORLD_SIZE" not in env:
        env = _with_launcher(env)
    if "RANK" not in env and "WORLD_SIZE" not in env:
        _refuse_silent_single(env)
        refuse_alone(env)
        if environ is None:
            _drop_local_rank()
        return RankFacts()
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    unknown = "LOCAL_RANK" not in env and size > 1
    local_rank = _number(env, "LOCAL_RANK", default=0)
    local_size = _number(env, "LOCAL_WORLD_SIZE", default=1 if unknown else size)
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise WorldError(
            f"RANK={rank} WORLD_SIZE={size} LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={local_size} are "
            "inconsistent: a rank is at least 0 and less than the size. Correct them, "
            "or unset all four to run a single process."
        )
    return RankFacts(rank, size, local_rank, local_size, launched=True, local_unknown=unknown)


def launched() -> bool:
    """Whether a launcher started this process as a rank; srun, which starts launchers too, is not counted."""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        other = "WORLD_SIZE" if name == "RANK" else "RANK"
        raise WorldError(
            f"{name}={text!r} is not a number, but {other}={env.get(other)!r} makes this a rank of a job. Set both, "
            f"or unset both to run a single process."
        ) from None


def _refuse_silent_single(env: Mapping[str, str]) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing (accelerate#2741).

    Its mark: Accelerate's one-process launcher sets MASTER_ADDR and MASTER_PORT only where more than one
    process was asked for, and never sets RANK.
    """
    if "ACCELERATE_MIXED_PRECISION" not in env or "MASTER_PORT" not in env or "MASTER_ADDR" not in env:
        return
    asked = _asked_of_accelerate(_parent_argv())
    if asked is not None and asked <= 1:
        return  # the variables came from the user's shell
    count = asked or 2
    words = f"{asked} processes" if asked else "more than one process"
    raise WorldError(
        f"accelerate was asked for {words} but started 1: with --cpu (or a CPU config file) it never starts more. "
        f"To train on {count} CPU ranks: dtrain train -n {count} --cpu ...\n"
        f"or: accelerate launch --multi_gpu --num_processes {count} -m dtrain train --cpu ..."
    )


def _with_launcher(env: Mapping[str, str]) -> Mapping[str, str]:
    """Returns the variables with those of a rank, for a task of several of srun's, or of another launcher's."""
    step = read_step(env)
    variables = task_variables(env, None if step is None else step.tasks)
    if not variables and step is not None and step.tasks > 1:
        variables = rank_variables(env, step)
    if env is os.environ:
        os.environ.update(variables)  # Accelerate and torch read them there
    return {**env, **variables}


def _drop_local_rank() -> None:
    """A LOCAL_RANK that was left from elsewhere would have Accelerate wait for other ranks."""
    found = os.environ.pop("LOCAL_RANK", "0")
    if found != "0":
        logger.warning("LOCAL_RANK=%s is ignored: it says nothing without RANK and WORLD_SIZE.", found)


@functools.cache
def _parent_argv() -> list[str]:
    """The command line of what has started this program, also in the rank that it has forked off since."""
    try:
        raw = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return []
    return [part.decode(errors="replace") for part in raw.split(b"\0")]


def _asked_of_accelerate(argv: list[str]) -> int | None:
    """Returns the number in --num_processes N or --num-processes=N of a launcher's command line."""
    for position, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name.replace("-", "_") in ("__num_processes", "__num_process"):
            text = value if equals else "".join(argv[position + 1 : position + 2])
            return int(text) if text.isdigit() else None
    return None
