"""SLURM as a login node sees it, and the variables that a launcher or SLURM left in this shell."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from dtrain.errors import DtrainError
from dtrain.slurm.client import has_client, run_client
from dtrain.tools.doctor.finding import Finding, passed
from dtrain.tools.doctor.words import MIB, many, size

SLURM, NODES, JOB, TASK, ENVIRONMENT = "SLURM", "SLURM nodes", "SLURM job", "SLURM task", "environment"
_NEEDED_FOR = "dtrain doctor"
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
_UP = ("idle", "mixed", "allocated", "completing", "reserved", "planned")
_FLAGS = "*~#!%$@^-+"  # not responding, saving power, rebooting ...; see sinfo(1)


def check_environment(environ: Mapping[str, str] | None = None) -> Finding:
    """Looks for variables that would make a process a rank, or send its traffic to an interface that is not there."""
    env = os.environ if environ is None else environ
    there = [name for _, name in socket.if_nameindex()]
    for name in _INTERFACES:
        wanted = [one.lstrip("^=") for one in env.get(name, "").split(",") if one]
        lost = [one for one in wanted if not any(real.startswith(one) for real in there)]
        if lost and not env[name].startswith("^"):
            words = f"{name}={env[name]}: this machine has {', '.join(there)}"
            return Finding(
                ENVIRONMENT, "fail", words, f"unset {name}, or set it to an existing interface (see `ip addr`)"
            )
    left = [f"{name}={env[name]}" for name in _LAUNCHERS if name in env]
    if "RANK" in env or "WORLD_SIZE" in env:
        words = f"this shell's environment is a rank's: {' '.join(left)}"
        return Finding(ENVIRONMENT, "warn", words, f"unset {' '.join(name for name in _LAUNCHERS if name in env)}")
    tuned = sorted(
        f"{name}={value}" for name, value in env.items() if name.startswith(("NCCL_", "GLOO_", "TORCH_NCCL"))
    )
    return passed(ENVIRONMENT, ", ".join(tuned) if tuned else "no variables of launchers, NCCL or gloo")


def check_job(environ: Mapping[str, str] | None = None) -> Finding:
    """Tells whether SLURM's variables in this shell are those of a job that runs here."""
    env = os.environ if environ is None else environ
    job = env.get("SLURM_JOB_ID")
    if job is None:
        return Finding(JOB, "skip", "not inside a job")
    words = f"job {job}, {env.get('SLURM_JOB_NUM_NODES', '?')} nodes: {env.get('SLURM_JOB_NODELIST', '?')}"
    node = env.get("SLURMD_NODENAME")
    if node is not None and node.partition(".")[0] != socket.gethostname().partition(".")[0]:
        words = f"{words}; SLURMD_NODENAME={node}, but this is {socket.gethostname()}"
        return Finding(JOB, "warn", words, "these variables come from another node: start a new shell")
    if has_client("squeue") and not job_runs(job):
        return Finding(
            JOB,
            "warn",
            f"{words}; it is not running (any more)",
            "start a new shell: this one has the variables of an old job",
        )
    return passed(JOB, words)


def check_task(nodes: int, ranks: int, environ: Mapping[str, str] | None = None) -> Finding:
    """Looks at the variables that SLURM gives a step's task, one a node, and at the name that it has for the node.

    Args:
        nodes: how many there should be.
        ranks: that each task will start.
        environ: by default the process's.
    """
    env = os.environ if environ is None else environ
    needed = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
    missing = [name for name in needed if name not in env]
    if missing:
        return Finding(
            TASK, "fail", f"not set: {', '.join(missing)}", "start it with srun; check TaskProlog and --export"
        )
    words = f"task {env['SLURM_PROCID']} of {env['SLURM_STEP_NUM_TASKS']} on {env['SLURM_STEP_NODELIST']}"
    cpus = env.get("SLURM_CPUS_ON_NODE", "?")
    words += f", {cpus} CPUs, {many(ranks, 'rank')}"
    if env["SLURM_STEP_NUM_TASKS"] != str(nodes):
        return Finding(TASK, "fail", f"{words}: expected {nodes}", "use srun --ntasks-per-node=1")
    if cpus.isdigit() and int(cpus) < ranks:
        return Finding(TASK, "warn", words, f"request at least one CPU per rank: --cpus-per-task={ranks}")
    node, host = env.get("SLURMD_NODENAME", ""), socket.gethostname()
    if node.partition(".")[0] != host.partition(".")[0]:
        words = f"{words}; SLURM calls this node {node}, its host name is {host}"
        return Finding(TASK, "warn", words, "use one name (hostnamectl), or make sure that both resolve on all nodes")
    return passed(TASK, words)


def job_runs(job: str) -> bool:
    """Whether SLURM says that a job runs now."""
    try:
        return run_client(["squeue", "-h", "-j", job, "-o", "%T"], needed_for=_NEEDED_FOR).strip() == "RUNNING"
    except DtrainError:  # it does not know the job any more
        return False


def check_slurm() -> list[Finding]:
    """Tells SLURM's version, its partitions with their limits, and whether its nodes are up."""
    if not has_client("sinfo"):
        return [Finding(SLURM, "skip", "not on this machine")]
    try:
        version = _ask("sinfo", "--version").strip()
        partitions = _ask("sinfo", "-h", "-o", "%P|%a|%l|%L|%s|%D|%c|%m|%G")
        nodes = _ask("sinfo", "-h", "-N", "-o", "%N|%T|%E")
    except DtrainError as error:
        remedy = "on a cluster: ask its administrators (scontrol ping); elsewhere ignore this"
        return [Finding(SLURM, "warn", _last_line(str(error)), remedy)]  # nothing here needs it to train
    told = [_partition(line) for line in dict.fromkeys(partitions.splitlines()) if line.count("|") >= 8]
    return [passed(SLURM, version), *told, judge_nodes(nodes)]


def _ask(*argv: str) -> str:
    return run_client(argv, needed_for=_NEEDED_FOR)


def _last_line(text: str) -> str:
    """Returns the last line of what a command said: the first ones are what led to it."""
    return text.strip().splitlines()[-1].strip()


def _partition(line: str) -> Finding:
    name, state, limit, usual, nodes_a_job, nodes, cpus, memory, gres = line.split("|", 8)
    parts = [
        f"{many(int(nodes), 'node')} of {cpus} CPUs" if nodes.isdigit() else f"{nodes} nodes of {cpus} CPUs",
        size(int(memory.rstrip("+")) * MIB) if memory.rstrip("+").isdigit() else memory,
        *([gres] if gres not in ("(null)", "") else []),
        f"time limit {limit}, default {usual}" if usual != "n/a" else f"time limit {limit}",
        f"{nodes_a_job} nodes per job",
    ]
    title = f"partition {name.rstrip('*')}"
    words = ", ".join(parts) + (" (the default)" if name.endswith("*") else "")
    if state != "up":
        return Finding(title, "warn", f"{state}: {words}", "submit to another partition: --partition")
    return passed(title, words)


def judge_nodes(lines: str) -> Finding:
    """Judges the states of all nodes.

    Args:
        lines: NODE|STATE|REASON each; a node is there once for each of its partitions.
    """
    rows = dict.fromkeys(tuple(line.split("|", 2)) for line in lines.splitlines() if line.count("|") >= 2)
    states = {name: (state, reason) for name, state, reason in rows}
    up = [name for name, (state, _) in states.items() if state.rstrip(_FLAGS) in _UP and "*" not in state]
    kinds = [state.rstrip(_FLAGS) for state, _ in states.values()]
    words = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    words = f"{len(up)} of {len(states)} up: {words}"
    if len(up) == len(states):
        return passed(NODES, words)
    away = [
        f"{name} is {state}{f' ({reason})' if reason not in ('none', '') else ''}"
        for name, (state, reason) in states.items()
        if name not in up
    ]
    more = f" and {len(away) - 5} more" if len(away) > 5 else ""
    words = f"{words}; {'; '.join(away[:5])}{more}"
    remedy = "ask your cluster's administrators; to return a repaired node: scontrol update nodename=NAME state=resume"
    return Finding(NODES, "warn" if up else "fail", words, remedy)
