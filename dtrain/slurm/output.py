"""Where a job's output is, and that of its ranks."""

from __future__ import annotations

from pathlib import Path

from dtrain.errors import UsageError
from dtrain.layout import SLURM
from dtrain.slurm.queue import output_file
from dtrain.slurm.runs import RunJob, earlier_output

_LOGS = "logs"  # in the run's folder


def output_of(one: RunJob, name: str) -> Path:
    """Returns the file that a job's output goes to.

    Args:
        one: run and job.
        name: what the person asked for: the number of a job that the run was earlier means that one's output.

    Raises:
        UsageError: it is not known.
    """
    earlier = earlier_output(one, name)
    if earlier is not None:
        return earlier
    known = one.record.output if one.record is not None else None
    if not known and one.job is not None:
        known = output_file(one.id, needed_for="dtrain logs")
    path = Path(known) if known else one.run / SLURM / f"job-{one.id}.out" if one.run is not None else None
    if path is None:
        raise UsageError(f"{one.words}: its output file is unknown; SLURM no longer reports it.")
    return path


def rank_log(one: RunJob, rank: int) -> Path:
    """Returns the log of one rank, which may still be to come.

    Raises:
        UsageError: there is none, and none will come.
    """
    if one.run is None:
        raise UsageError(f"{one.words}: is not a dtrain run, so there is no log of rank {rank}.")
    folder = one.run / _LOGS
    path = folder / f"rank-{rank}.log"
    ranks = sorted(int(file.stem.removeprefix("rank-")) for file in folder.glob("rank-*.log"))
    if path.exists() or not (ranks or one.is_over):
        return path
    there = (
        f"There are logs of ranks {', '.join(map(str, ranks))}."
        if ranks
        else "If srun starts each rank, all output is in the job's output."
    )
    raise UsageError(f"{one.words}: there is no log of rank {rank} in {folder}. {there}")
