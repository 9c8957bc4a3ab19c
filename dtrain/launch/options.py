"""What `dtrain launch` was asked for, made into a job; and shown, without starting it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dtrain.errors import UsageError, WorldError
from dtrain.launch.env.conventions import read_nodes, read_pod, refuse_launchers
from dtrain.launch.env.fingerprint import code_hash, file_hash
from dtrain.launch.env.hardware import gpu_count
from dtrain.launch.env.job import BY_ARRIVAL, DEFAULT_TIMEOUT, Job
from dtrain.launch.env.ports import check_free, free_port
from dtrain.launch.env.slurm_env import NONCE, Step
from dtrain.launch.nodes.agreement import COMMAND, CONTENT, NODE_RANK, NODES, PLACE, RANKS
from dtrain.launch.nodes.secret import read_secret


@dataclass(frozen=True)
class LaunchOptions:
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
        secret_file: the file that holds the nodes' secret.
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
    secret_file: Path | None = None

    def over(self, below: LaunchOptions) -> LaunchOptions:
        """Returns these values, and `below`'s where there are none; both environments."""
        mine = {name: value for name, value in vars(self).items() if value not in (None, "")}
        return replace(below, **mine | {"environment": below.environment | self.environment})


def among_tasks(asked: LaunchOptions, step: Step | None, environ: Mapping[str, str] | None = None) -> LaunchOptions:
    """Returns what was asked for with what srun says, where it started this launcher among several, one a node.

    Args:
        asked: what the command line says.
        step: srun's step, or None outside of one.
        environ: where a MASTER_ADDR and MASTER_PORT of the user's are looked for, and what a platform says that starts
            one process a node.

    Raises:
        WorldError: srun's tasks are not one a node, or the command line says something else; or another launcher has
            started several of these, which know nothing of each other.
    """
    env = os.environ if environ is None else environ
    if step is None or step.tasks == 1:
        return _among_nodes(asked, env)
    nodes = len(step.tasks_of_node)
    if step.tasks != nodes:
        raise WorldError(
            f"srun started {step.tasks} launchers on {nodes} nodes, {step.tasks_of_node[step.node]} on this one: start "
            "one per node (--ntasks-per-node=1), with the number of ranks as -n; or omit `dtrain "
            "launch`, so that each task is a rank: srun dtrain train ..."
        )
    for option, value, theirs in (("--nodes", asked.nodes, nodes), ("--node-rank", asked.node_rank, step.node)):
        if value not in (None, theirs):
            raise WorldError(
                f"{option} {value}, but srun started this launcher as node {step.node} of {nodes}: remove {option}."
            )
    address = f"{env.get('MASTER_ADDR') or step.first_host}:{env.get('MASTER_PORT') or step.port}"
    return replace(
        asked, nodes=nodes, node_rank=step.node, rdzv=asked.rdzv or address, job_id=asked.job_id or step.nonce
    )


def _among_nodes(asked: LaunchOptions, env: Mapping[str, str]) -> LaunchOptions:
    nodes = read_pod(env) or read_nodes(env)
    if nodes is None or nodes.nodes == 1:
        if asked.nodes is None:
            refuse_launchers(env)
        return asked
    theirs = {"--nodes": (asked.nodes, nodes.nodes), "--node-rank": (asked.node_rank, nodes.node_rank)}
    for option, (value, said) in theirs.items():
        if value is not None and said is not None and value != said:
            raise WorldError(
                f"{option} {value}, but {nodes.platform} says {said} ({nodes.variable}={env[nodes.variable]}): leave "
                f"{option} out, or unset {nodes.variable}."
            )
    if asked.rdzv is None and nodes.address is None:
        raise WorldError(
            f"{nodes.platform} started one launcher on each of {nodes.nodes} nodes ({nodes.variable}), but "
            "does not say where they meet: give --rdzv HOST:PORT, the first node's address, the same on every node."
        )
    rank = nodes.node_rank if asked.node_rank is None else asked.node_rank
    return replace(
        asked,
        nodes=nodes.nodes,
        node_rank=rank,
        rdzv=asked.rdzv or nodes.address,
        ranks=asked.ranks or nodes.ranks,
    )


def make_job(asked: LaunchOptions) -> Job:
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
    secret = read_secret(asked.secret_file)
    return replace(common, nodes=nodes, node_rank=node_rank, host=host, rdzv_port=port, secret=secret)


def _made(folder: Path | None) -> Path | None:
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--log-dir {folder}: cannot be created: {error.strerror}.") from None
    return None if folder is None else folder.resolve()  # a link that a person named is followed


def _node_rank(asked: LaunchOptions, nodes: int) -> int:
    if asked.node_rank is None:
        return BY_ARRIVAL
    if not 0 <= asked.node_rank < nodes:
        raise WorldError(f"--node-rank {asked.node_rank} of --nodes {nodes}: should be 0 to {nodes - 1}.")
    return asked.node_rank


def _rdzv(asked: LaunchOptions) -> tuple[str, int]:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    text = asked.rdzv or (f"{address}:{port}" if address and port else None)
    if text is None:
        raise WorldError(
            "several nodes need --rdzv HOST:PORT: the first node's address and a free port there, the same on every "
            "node."
        )
    host, _, number = text.rpartition(":")
    if not host or not number.isdigit() or not 0 < int(number) < 1 << 16:
        raise WorldError(f"--rdzv {text}: should be HOST:PORT, such as node1:29500.")
    return host.strip("[]"), int(number)


def _one_nodes_port(asked: LaunchOptions) -> int:
    """Returns the port that was named, if it is free, or else any that is."""
    if asked.node_rank not in (None, 0):
        raise WorldError(f"--node-rank {asked.node_rank} needs --nodes.")
    named = os.environ.get("MASTER_PORT", "")
    port = _rdzv(asked)[1] if asked.rdzv else int(named) if named.isdigit() else 0
    if port == 0:
        return free_port()
    check_free(port)
    return port


def must_agree(asked: LaunchOptions, job: Job, command: Sequence[str], files: Mapping[str, Path]) -> dict[str, str]:
    """Returns what must be the same on all nodes, by the names that a person knows it by.

    Args:
        asked: what the command line says.
        job: this node's part of it.
        command: the script or verb with its arguments.
        files: the files it runs, by name.
    """
    from dtrain import __version__

    return {
        PLACE: shlex.join([f"{job.host}:{job.rdzv_port}", *([asked.job_id] if asked.job_id else [])]),
        NODES: str(job.nodes),
        NODE_RANK: "not given" if job.node_rank == BY_ARRIVAL else "given",
        RANKS: str(job.ranks),
        "dtrain's version": __version__,
        "dtrain's code": code_hash(),
        COMMAND: shlex.join(command),
        **{f"{CONTENT}{name}": file_hash(path) for name, path in files.items()},
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
            values[NONCE] = "(created at the start)"
            if job.port == 0:
                values["MASTER_PORT"] = "(chosen by node 0)"
            words = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
            lines.append(f"  rank {part.first_rank + local_rank}: {' '.join(words)}")
    return "\n".join(lines)
