"""What SLURM says of the job whose batch script this process is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.errors import DtrainError
from dtrain.slurm.client import run_client

_NODE_LIMIT_SECONDS = 300.0  # SLURM's own default for finding that a node is lost


@dataclass(frozen=True)
class OwnJob:
    """What SLURM says of the job that this process is the batch script of.

    Attributes:
        job_id: its number, which scontrol and scancel take; a task of an array has one of its own.
        name: as a person knows it: "123", or "123_4" for a task of an array.
        restart: how often it was started before.
        nodes: where it runs.
        node_count: number of these.
    """

    job_id: str
    name: str
    restart: int
    nodes: str
    node_count: int = 1

    @classmethod
    def read(cls, env: Mapping[str, str]) -> OwnJob | None:
        """Returns it, or None outside of a job."""
        if not env.get("SLURM_JOB_ID", "").isdigit():
            return None
        array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
        return cls(
            job_id=env["SLURM_JOB_ID"],
            name=f"{array}_{task}" if array and task else env["SLURM_JOB_ID"],
            restart=int(env.get("SLURM_RESTART_COUNT") or 0),
            nodes=env.get("SLURM_JOB_NODELIST", ""),
            node_count=int(env.get("SLURM_JOB_NUM_NODES") or 1),
        )


def nodes_answer(place: OwnJob) -> bool:
    """Whether something can be run on every node of the job; SLURM itself may take minutes to find that one is lost."""
    count = str(place.node_count)
    argv = ["srun", f"--jobid={place.job_id}", "--overlap", f"--nodes={count}", f"--ntasks={count}"]
    try:
        run_client([*argv, "--ntasks-per-node=1", "--quiet", "true"], needed_for="a job that lost a rank")
    except DtrainError:
        return False
    return True


def is_preempted(job_id: str) -> bool:
    """Whether a job that still runs has to make room for another one, as far as SLURM tells."""
    try:
        told = run_client(["scontrol", "show", "job", "--oneliner", job_id], needed_for="a preempted job")
    except DtrainError:
        return False
    return re.search(r" JobState=RUNNING ", told) is not None and re.search(r" PreemptTime=\d", told) is not None


def node_limit() -> float:
    """Returns how many seconds SLURM may take to find that a node is lost."""
    try:
        found = re.search(
            r"^SlurmdTimeout\s*=\s*(\d+)", run_client(["scontrol", "show", "config"], needed_for=""), re.M
        )
    except DtrainError:
        found = None
    # SLURM looks in turns that take up to a third of the limit.
    return 1.5 * (float(found[1]) if found else _NODE_LIMIT_SECONDS)
