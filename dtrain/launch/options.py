"""What `dtrain launch` was asked for, made into a job; and shown, without starting it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dtrain.errors import UsageError, WorldError
from dtrain.launch.fingerprint import code_hash, file_hash
from dtrain.launch.hardware import gpu_count
from dtrain.launch.job import BY_ARRIVAL, DEFAULT_TIMEOUT, Job
from dtrain.launch.ports import check_free, free_port
from dtrain.launch.slurm_step import NONCE, Step


@dataclass(frozen=True)
class Asked:
    """What the command line or a launch profile says; None where it says nothing.

    Attributes:
        ranks: ranks on each node.
        nodes: number of nodes.
        node_rank: which of them this is.
        rdzv: HOST:PORT of the first node.
        timeout: seconds for all nodes and ranks to come.
        job_id: any word that tells this job from another one.
        environment: further variables for every rank.
        hang_seconds: how long a rank may stand still; 0 is for ever.
        log_dir: where each rank's output is kept.
    """

    ranks: int | None = None
    nodes: int | None = None
    node_rank: int | None = None
    rdzv: str | None = None
    timeout: float | None = None
    job_id: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    hang_seconds: float | None = None
    log_dir: Path | None = None

    def over(self, below: Asked) -> Asked:
        """Returns these values, and `below`'s where there are none; both environments."""
        mine = {name: value for name, value in vars(self).items() if value not in (None, "")}
        return replace(below, **mine | {"environment": below.environment | self.environment})


def among_tasks(asked: Asked, step: Step | None, environ: Mapping[str, str] | None = None) -> Asked:
    """Returns what was asked for with what srun says, where it started this launcher among several, one a node.

    Args:
        asked: what the command line says.
        step: srun's step, or None outside of one.
        environ: where a MASTER_ADDR and MASTER_PORT of the user's are looked for.

    Raises:
        WorldError: srun's tasks are not one a node, or the command line says something else.
    """
    if step is None or step.tasks == 1:
        return asked
    env = os.environ if environ is None else environ
    nodes = len(step.tasks_of_node)
    if step.tasks != nodes:
        raise WorldError(
            f"srun started {step.tasks} launchers on {nodes} nodes, {step.tasks_of_node[step.node]} on this one: start "
            "one a node (--ntasks-per-node=1), and give it the number of ranks with -n; or leave `dtrain launch` out, "
            "so that each task is a rank: srun dtrain train ..."
        )
    for option, value, theirs in (("--nodes", asked.nodes, nodes), ("--node-rank", asked.node_rank, step.node)):
        if value not in (None, theirs):
            raise WorldError(
                f"{option} {value}, but srun started this launcher as node {step.node} of {nodes}: leave {option} out."
            )
    address = f"{env.get('MASTER_ADDR') or step.first_host}:{env.get('MASTER_PORT') or step.port}"
    return replace(
        asked, nodes=nodes, node_rank=step.node, rdzv=asked.rdzv or address, job_id=asked.job_id or step.nonce
    )


def make_job(asked: Asked) -> Job:
    """Returns this node's part of the job that was asked for; its port is chosen for one node only.

    Raises:
        WorldError: something is missing or does not fit together.
    """
    nodes = asked.nodes or 1
    ranks = asked.ranks or gpu_count(os.environ | asked.environment) or 1
    timeout = DEFAULT_TIMEOUT if asked.timeout is None else asked.timeout
    common = Job(
        ranks,
        timeout=timeout,
        environment=asked.environment,
        hang_seconds=asked.hang_seconds,
        log_dir=_made(asked.log_dir),
    )
    if nodes == 1:
        port = _one_nodes_port(asked)
        return replace(common, port=port)
    node_rank = _node_rank(asked, nodes)
    host, port = _rdzv(asked)
    return replace(common, nodes=nodes, node_rank=node_rank, host=host, rdzv_port=port)


def _made(folder: Path | None) -> Path | None:
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--log-dir {folder}: cannot be made: {error.strerror}.") from None
    return folder


def _node_rank(asked: Asked, nodes: int) -> int:
    if asked.node_rank is None:
        return BY_ARRIVAL
    if not 0 <= asked.node_rank < nodes:
        raise WorldError(f"--node-rank {asked.node_rank} of --nodes {nodes}: should be 0 to {nodes - 1}.")
    return asked.node_rank


def _rdzv(asked: Asked) -> tuple[str, int]:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    text = asked.rdzv or (f"{address}:{port}" if address and port else None)
    if text is None:
        raise WorldError(
            "several nodes need a place to meet: --rdzv HOST:PORT, the first node's address and a port that is free "
            "there, the same on every node."
        )
    host, _, number = text.rpartition(":")
    if not host or not number.isdigit() or not 0 < int(number) < 1 << 16:
        raise WorldError(f"--rdzv {text}: should be HOST:PORT, as in node1:29500.")
    return host.strip("[]"), int(number)


def _one_nodes_port(asked: Asked) -> int:
    """Returns the port that was named, if it is free, or else any that is."""
    if asked.node_rank not in (None, 0):
        raise WorldError(f"--node-rank {asked.node_rank} without --nodes: give the number of nodes.")
    named = os.environ.get("MASTER_PORT", "")
    port = _rdzv(asked)[1] if asked.rdzv else int(named) if named.isdigit() else 0
    if port == 0:
        return free_port()
    check_free(port)
    return port


def must_agree(asked: Asked, job: Job, command: Sequence[str], files: Mapping[str, Path]) -> dict[str, str]:
    """Returns what must be the same on all nodes, by the names that a person knows it by.

    Args:
        asked: what the command line says.
        job: this node's part of it.
        command: the script or verb with its arguments.
        files: the files it runs, by name.
    """
    from dtrain import __version__

    return {
        "--rdzv and --job-id": shlex.join([f"{job.host}:{job.rdzv_port}", *([asked.job_id] if asked.job_id else [])]),
        "--nodes": str(job.nodes),
        "--node-rank": "not given" if job.node_rank == BY_ARRIVAL else "given",
        "-n": str(job.ranks),
        "dtrain's version": __version__,
        "dtrain's code": code_hash(),
        "the command": shlex.join(command),
        **{f"the content of {name}": file_hash(path) for name, path in files.items()},
    }


def dry_run_text(job: Job, argv: Sequence[str]) -> str:
    """Returns what would be started, and with which variables, on each node."""
    lines = [f"each rank runs: {shlex.join([sys.executable, *argv])}"]
    for node in range(job.nodes):
        part = replace(job, node_rank=node)
        here = " (this one)" if node == job.node_rank and job.nodes > 1 else ""
        lines.append(f"node {node}{here}: ranks {part.first_rank} to {part.first_rank + part.ranks - 1}")
        for local_rank in range(job.ranks):
            values = {k: v for k, v in part.defaults().items() if k not in os.environ} | part.variables(local_rank)
            values[NONCE] = "(made at the start)"
            if job.port == 0:
                values["MASTER_PORT"] = "(chosen by node 0)"
            words = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
            lines.append(f"  rank {part.first_rank + local_rank}: {' '.join(words)}")
    return "\n".join(lines)
