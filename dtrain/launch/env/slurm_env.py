"""What SLURM says of this process: which task of which step it is, and so which rank, or which node's launcher.

SLURM's variables are inherited by whatever a task starts, by shells and by what they leave running. They are believed
only where this process descends from the very task that they tell of (SLURM_TASK_PID).
"""

from __future__ import annotations

import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import WorldError

NONCE = "DTRAIN_JOB"
PORT_FILE = "DTRAIN_PORT_FILE"  # where rank 0 of one node's tasks says which port it has taken
_TASKS = "SLURM_STEP_NUM_TASKS"
_LAUNCHED = ("SLURM_JOB_START_TIME", "SLURM_SRUN_COMM_PORT")  # seconds since the epoch; the same for all tasks
_FIRST_PORT, _PORTS = 20_000, 12_000  # below those that Linux gives out by itself


@dataclass(frozen=True)
class Step:
    """A step of a job (one `srun`), as seen from one of its tasks.

    Attributes:
        job: number of the job.
        step: number of the step in it.
        restart: how often the job was started before.
        tasks: number of tasks.
        task: which of them this is, from 0 to tasks - 1 over all nodes.
        local_task: which of them on this node.
        tasks_of_node: number of tasks on each node, in the order of the nodes.
        node: which node this is, from 0.
        first_host: the name of node 0.
        launched: what tells this start from those of other clusters, or of this one once its job numbers begin anew.
    """

    job: str
    step: str
    restart: str
    tasks: int
    task: int
    local_task: int
    tasks_of_node: tuple[int, ...]
    node: int
    first_host: str
    launched: str = ""

    @property
    def nonce(self) -> str:
        """A word that tells this step from any other."""
        return f"slurm-{self.job}.{self.step}.{self.restart}"

    @property
    def port(self) -> int:
        """A port that all tasks know without talking, and that another step on the same nodes hardly has."""
        return _FIRST_PORT + zlib.crc32(self.nonce.encode()) % _PORTS


def read_step(environ: Mapping[str, str] | None = None, descends: Callable[[int], bool] | None = None) -> Step | None:
    """Returns the step that this process is a task of, or was started by a task of; None where there is none.

    Args:
        environ: the variables; by default those of this process.
        descends: whether this process is, or descends from, the one with this number.

    Raises:
        WorldError: the variables do not fit together.
    """
    env = os.environ if environ is None else environ
    if _TASKS not in env:
        return None
    task_pid = env.get("SLURM_TASK_PID", "")
    if not task_pid.isdigit() or not (descends or _descends)(int(task_pid)):
        return None
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    step = Step(
        job=env.get("SLURM_JOB_ID", "0"),
        step=env.get("SLURM_STEP_ID", "0"),
        restart=env.get("SLURM_RESTART_COUNT", "0"),
        tasks=_number(env, _TASKS),
        task=_number(env, "SLURM_PROCID"),
        local_task=_number(env, "SLURM_LOCALID"),
        tasks_of_node=tuple(expand_counts(env.get("SLURM_STEP_TASKS_PER_NODE", env[_TASKS]))),
        node=_number(env, "SLURM_NODEID"),
        first_host=first_host(nodes) or "127.0.0.1",
        launched="-".join(env[name] for name in _LAUNCHED if env.get(name, "").isdecimal()),
    )
    if not step.task < step.tasks == sum(step.tasks_of_node) or step.node >= len(step.tasks_of_node):
        told = {name: value for name, value in sorted(env.items()) if name.startswith("SLURM_STEP_")}
        raise WorldError(
            f"SLURM's variables are inconsistent: SLURM_PROCID={step.task} SLURM_NODEID={step.node} and {told}. "
            "Start the ranks with srun, and do not change these variables."
        )
    return step


def rank_variables(environ: Mapping[str, str], step: Step) -> dict[str, str]:
    """Returns the variables that make a task a rank; a MASTER_ADDR and MASTER_PORT that are there hold.

    Where all tasks are on one node and nobody named a port, MASTER_PORT is one that all can work out, and rank 0 takes
    a free one in its place as the ranks meet (`PORT_FILE`).
    """
    publishes = len(step.tasks_of_node) == 1 and not environ.get("MASTER_PORT")
    return {
        "RANK": str(step.task),
        "WORLD_SIZE": str(step.tasks),
        "LOCAL_RANK": str(step.local_task),
        "LOCAL_WORLD_SIZE": str(step.tasks_of_node[step.node]),
        "NODE_RANK": str(step.node),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or ("127.0.0.1" if len(step.tasks_of_node) == 1 else step.first_host),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(step.port),
        NONCE: step.nonce,
    } | ({PORT_FILE: str(_port_file(step))} if publishes else {})


def _port_file(step: Step) -> Path:
    name = f"{step.nonce}-{step.launched}" if step.launched else step.nonce
    return Path(tempfile.gettempdir()) / f"dtrain-ports-{os.getuid()}" / name


def first_host(nodes: str) -> str:
    """Returns the first host of a list as SLURM writes it: `n01` of `n[01-04,7],m3`."""
    first = re.match(r"[^,\[]*(?:\[([^\]]*)\])?[^,\[]*", nodes)
    if first is None or first[1] is None:
        return first[0] if first is not None else ""
    number = re.split(r"[-,]", first[1])[0]
    rest = nodes[first.end() :]
    return first[0].replace(f"[{first[1]}]", number, 1) + (first_host(rest) if rest.startswith("[") else "")


def expand_counts(text: str) -> Iterator[int]:
    """Yields the number of tasks of each node, of a list as SLURM writes it: 2, 2, 1 of `2(x2),1`.

    Raises:
        WorldError: it is no such list.
    """
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise WorldError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not a list of task counts, such as '2(x2),1'.")
        yield from [int(found[1])] * int(found[2] or 1)


def _number(env: Mapping[str, str], name: str) -> int:
    text = env.get(name, "")
    if not text.isdigit():
        raise WorldError(f"{name}={text!r} is not a number, although {_TASKS}={env[_TASKS]} is set by srun.")
    return int(text)


def _descends(pid: int) -> bool:
    """Whether a process is this one, or one that this descends from."""
    mine = os.getpid()
    while mine > 1:
        if mine == pid:
            return True
        mine = _parent(mine)
    return mine == pid


def _parent(pid: int) -> int:
    """Returns the number of a process's parent; 0 where that cannot be known."""
    try:
        # "PID (NAME) STATE PPID ...", where the name may hold anything.
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0
