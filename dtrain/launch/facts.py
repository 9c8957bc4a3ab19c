"""What a launcher said about this process: rank facts, read from the environment before torch is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import WorldError
from dtrain.launch.slurm_step import rank_variables, read_step


@dataclass(frozen=True)
class RankFacts:
    """One process's place in the job, as its launcher stated it.

    Attributes:
        rank: 0 to size - 1 over all nodes.
        size: number of ranks in the job.
        local_rank: 0 to local_size - 1 on this node.
        local_size: number of ranks on this node.
        launched: whether a launcher started this process as a rank.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launched: bool = False


def read_rank_facts(environ: Mapping[str, str] | None = None) -> RankFacts:
    """Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, as torchrun, Accelerate and dtrain set them.

    For a task of srun's, which has others beside it and no launcher, they are set first, as a launcher would have.

    Raises:
        WorldError: a variable is no number, or rank and size do not fit together, or Accelerate was
            asked for several CPU processes and started one.
    """
    env = os.environ if environ is None else environ
    if "RANK" not in env and "WORLD_SIZE" not in env:
        env = _with_srun(env)
    if "RANK" not in env and "WORLD_SIZE" not in env:
        _refuse_silent_single(env)
        _refuse_unknown_launcher(env)
        return RankFacts()
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    local_rank = _number(env, "LOCAL_RANK", default=rank)
    local_size = _number(env, "LOCAL_WORLD_SIZE", default=size)
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise WorldError(
            f"RANK={rank} WORLD_SIZE={size} LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={local_size} do not fit "
            "together: ranks count from 0 and are less than the size. Correct them, or unset all four to run alone."
        )
    return RankFacts(rank, size, local_rank, local_size, launched=True)


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
            f"{name}={text!r} is no number, although {other}={env.get(other)!r} says that this is a rank of a job. "
            f"Set both, or unset both to run alone."
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
        f"accelerate was asked for {words} but has started 1: with --cpu (or a config file that says so) it never "
        f"starts more. To train on {count} CPU ranks: dtrain train -n {count} --cpu ...\n"
        f"or: accelerate launch --multi_gpu --num_processes {count} -m dtrain train --cpu ..."
    )


def _with_srun(env: Mapping[str, str]) -> Mapping[str, str]:
    """Returns the variables with those of a rank, for a task of several of srun's."""
    step = read_step(env)
    if step is None or step.tasks == 1:
        return env
    variables = rank_variables(env, step)
    if env is os.environ:
        os.environ.update(variables)  # Accelerate and torch read them there
    return {**env, **variables}


_OTHER_LAUNCHERS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}


def _refuse_unknown_launcher(env: Mapping[str, str]) -> None:
    """Under mpirun with several tasks, each would train alone, all of them rank 0."""
    for name, launcher in _OTHER_LAUNCHERS.items():
        tasks = env.get(name, "1")
        if tasks.isdigit() and int(tasks) > 1:
            raise WorldError(
                f"{launcher} started {tasks} tasks ({name}={tasks}), but neither RANK nor WORLD_SIZE is set, so that "
                f"each would train alone. Start one `dtrain launch` a node, or unset {name} to train in one process."
            )


def _parent_argv() -> list[str]:
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
