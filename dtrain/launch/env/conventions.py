"""What launchers other than torchrun, Accelerate, srun and dtrain tell their processes, one row a convention.

Some start each rank (`TASKS`), others one process a node (`NODES`). None of them may end in N trainings that know
nothing of each other: a convention is understood, or refused by its name with a command that does what was meant.

Sources of the names: Open MPI's "Environment variables set for MPI applications" (docs.open-mpi.org); MVAPICH2's user
guide, "MPIRUN_RSH parameters"; jsrun's variables as in Lightning's LSFEnvironment; flux-core's flux-environment(7);
HPE's pals.h; MPICH's Hydra and PMI (PMI_RANK, PMI_SIZE); the PMIx standard, PMIX_RANK; Horovod's "Horovod with MPI";
torchrun's own PET_* defaults, which Kubeflow's TrainJob and PyTorchJob set; SkyPilot's "Distributed multi-node jobs";
SageMaker's training toolkit (ENVIRONMENT_VARIABLES.md); TF_CONFIG of tf.distribute, which Vertex AI and Katib set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dtrain.errors import WorldError

_PORT = 29500  # torch's own default


@dataclass(frozen=True)
class Tasks:
    """A launcher that starts each rank by itself.

    Attributes:
        launcher: as people know it.
        rank: the variable that numbers the processes.
        size: their number; several names where versions differ; none where it is not told.
        local_rank: the number within the node.
        local_size: the number of processes on the node.
        one_a_node: the command that starts one process on each node.
    """

    launcher: str
    rank: str
    size: tuple[str, ...]
    local_rank: str
    local_size: str
    one_a_node: str

    def size_in(self, env: Mapping[str, str]) -> int | None:
        """Returns the number of processes; None where it is not told."""
        return next((int(env[name]) for name in self.size if env.get(name, "").isdigit()), None)


# The first row whose rank is in the environment holds: jsrun and PALS set others' names besides their own.
TASKS = (
    Tasks(
        "jsrun",
        "JSM_NAMESPACE_RANK",
        ("JSM_NAMESPACE_SIZE",),
        "JSM_NAMESPACE_LOCAL_RANK",
        "",
        "jsrun -r 1 -a 1 -c ALL_CPUS -g ALL_GPUS",
    ),
    Tasks(
        "Flux", "FLUX_TASK_RANK", ("FLUX_JOB_SIZE",), "FLUX_TASK_LOCAL_ID", "", "flux run --tasks-per-node=1 -N NODES"
    ),
    Tasks("PALS", "PALS_RANKID", ("PALS_SIZE", "PMI_SIZE"), "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE", "mpiexec --ppn 1"),
    Tasks(
        "MVAPICH2",
        "MV2_COMM_WORLD_RANK",
        ("MV2_COMM_WORLD_SIZE",),
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
        "mpirun_rsh -np NODES",
    ),
    Tasks(
        "MVAPICH",
        "MVP_COMM_WORLD_RANK",
        ("MVP_COMM_WORLD_SIZE",),
        "MVP_COMM_WORLD_LOCAL_RANK",
        "MVP_COMM_WORLD_LOCAL_SIZE",
        "mpiexec -ppn 1",
    ),
    Tasks(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_SIZE",),
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "mpirun --map-by ppr:1:node",
    ),
    Tasks("horovodrun", "HOROVOD_RANK", ("HOROVOD_SIZE",), "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE", "ssh NODE"),
    Tasks("mpiexec", "PMI_RANK", ("PMI_SIZE",), "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "mpiexec -ppn 1"),
    Tasks("PMIx", "PMIX_RANK", (), "PMIX_LOCAL_RANK", "PMIX_LOCAL_SIZE", "prun --map-by ppr:1:node"),
)

RANK_VARIABLES = tuple(
    {
        name
        for row in TASKS
        for name in (row.rank, *row.size, row.local_rank, row.local_size, "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE")
        if name
    }
)


def task_variables(env: Mapping[str, str], tasks_of_srun: int | None) -> dict[str, str]:
    """Returns what makes a process that another launcher started a rank; nothing where no such launcher did.

    Args:
        env: the variables, without a RANK and a WORLD_SIZE.
        tasks_of_srun: the number of tasks where srun started this process, which may set PMI's variables, too.

    Raises:
        WorldError: such a launcher started several processes, and it is not known where they meet.
    """
    row = _row(env)
    if row is None:
        return {}
    size = row.size_in(env)
    if size == 1 or (tasks_of_srun is not None and size in (None, tasks_of_srun)):
        return {}
    rank, local_rank, local_size = (env.get(name, "") for name in (row.rank, row.local_rank, row.local_size))
    if size is None or not rank.isdigit() or not (env.get("MASTER_ADDR") and env.get("MASTER_PORT")):
        raise WorldError(_tasks_refused(row, size, rank, local_size))
    found = {"RANK": rank, "WORLD_SIZE": str(size), "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
    return {name: value for name, value in found.items() if value.isdigit()}


def _row(env: Mapping[str, str]) -> Tasks | None:
    return next((row for row in TASKS if row.rank in env or (row.size and row.size[0] in env)), None)


def _tasks_refused(row: Tasks, size: int | None, rank: str, local_size: str) -> str:
    if size is None:
        return (
            f"{row.launcher} started this process as number {rank} ({row.rank}={rank}) and does not say of how many, "
            f"and each would train alone. Start one launcher a node instead: {row.one_a_node} dtrain launch -n RANKS "
            f"--nodes NODES --rdzv FIRST_NODE:{_PORT} -- train ... To train in one process, unset {row.rank}."
        )
    name = next(iter(row.size))
    here = int(local_size) if local_size.isdigit() and int(local_size) else None
    nodes = None if here is None else -(-size // here)
    many = f"{row.one_a_node.replace('NODES', str(nodes or 'NODES'))} dtrain launch -n {here or 'RANKS'} "
    many += f"--nodes {nodes or 'NODES'} --rdzv FIRST_NODE:{_PORT} -- train ..."
    command = f"dtrain train -n {size} ..." if nodes == 1 else many
    if nodes is None:
        command = f"dtrain train -n {size} ... on one node, on several {many}"
    return (
        f"{row.launcher} started {size} tasks ({name}={size}), but neither RANK nor WORLD_SIZE is set, and where they "
        f"meet is not known, so that each would train alone. Start instead: {command} "
        "Or give all tasks the same MASTER_ADDR and MASTER_PORT, the first node's address and a port that is free "
        f"there: then each is a rank. To train in one process, unset {row.rank}."
    )


@dataclass(frozen=True)
class Nodes:
    """What a platform tells that starts one process on each node.

    Attributes:
        platform: as people know it.
        variable: the one that tells the number of nodes.
        nodes: their number.
        node_rank: which one this is; None where it is not told.
        address: HOST:PORT where the nodes meet; None where it is not told.
        ranks: processes on each node; None where it is not told.
    """

    platform: str
    variable: str
    nodes: int
    node_rank: int | None
    address: str | None
    ranks: int | None = None

    @property
    def command(self) -> str:
        """The command that trains on all nodes, run on each of them."""
        number = "" if self.node_rank is None else f" --node-rank {self.node_rank}"
        ranks = "" if self.ranks is None else f" -n {self.ranks}"
        return f"dtrain launch{ranks} --nodes {self.nodes}{number} --rdzv {self.address or 'FIRST_NODE:29500'}"


def read_nodes(env: Mapping[str, str]) -> Nodes | None:
    """Returns what a platform tells of its nodes, where there are several; None where none does, or there is one.

    RANK and WORLD_SIZE without a LOCAL_RANK are not looked at: a pod of PyTorchJob is a rank as well as a node.
    """
    found = next((nodes for read in _PLATFORMS if (nodes := read(env)) is not None), None)
    return None if found is None or found.nodes <= 1 else found


def read_pod(env: Mapping[str, str]) -> Nodes | None:
    """Returns what RANK and WORLD_SIZE tell a launcher on a platform that numbers pods by them; else None.

    PyTorchJob and Alibaba's DLC set them for each pod, with MASTER_ADDR and MASTER_PORT; whoever starts ranks by
    themselves sets LOCAL_RANK, too.
    """
    rank, size = _number(env.get("RANK")), _number(env.get("WORLD_SIZE"))
    host, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if rank is None or size is None or "LOCAL_RANK" in env or not host or not port:
        return None
    return Nodes("the platform (PyTorchJob, say)", "WORLD_SIZE", size, rank, f"{host}:{port}")


def refuse_launchers(env: Mapping[str, str]) -> None:
    """Refuses several launchers of one node each that know nothing of each other.

    Raises:
        WorldError: mpirun or the like has started several, and none was told of the others.
    """
    row = _row(env)
    size = None if row is None else row.size_in(env)
    if row is not None and size is not None and size > 1:
        raise WorldError(
            f"{row.launcher} started {size} launchers ({row.size[0]}={size}), and each would train alone. Tell each of "
            f"the others, one launcher a node: {row.one_a_node.replace('NODES', str(size))} dtrain launch -n RANKS "
            f"--nodes {size} --rdzv FIRST_NODE:{_PORT} -- train ... To train on each alone, unset {row.rank} and "
            f"{row.size[0]}."
        )


def refuse_alone(env: Mapping[str, str]) -> None:
    """Refuses a single process on one of several nodes, each of which would train alone.

    Raises:
        WorldError: a platform started one process on each of several nodes.
    """
    nodes = read_nodes(env)
    if nodes is not None:
        raise WorldError(
            f"{nodes.platform} started one process on each of {nodes.nodes} nodes ({nodes.variable}), and each would "
            f"train alone. Start instead, on each node: {nodes.command} -- train ... (`dtrain launch` reads nodes and "
            f"address from these variables, too). To train on this node alone, unset {nodes.variable}."
        )


def _torchrun_defaults(env: Mapping[str, str]) -> Nodes | None:
    least, _, most = env.get("PET_NNODES", "").partition(":")
    if not least.isdigit() or (most and most != least):
        return None
    host, port = env.get("PET_MASTER_ADDR") or env.get("MASTER_ADDR"), env.get("PET_MASTER_PORT")
    address = f"{host}:{port or env.get('MASTER_PORT') or _PORT}" if host else env.get("PET_RDZV_ENDPOINT") or None
    return Nodes(
        "the platform (Kubeflow's TrainJob or PyTorchJob, say)",
        "PET_NNODES",
        int(least),
        _number(env.get("PET_NODE_RANK")),
        address,
        _number(env.get("PET_NPROC_PER_NODE")),
    )


def _skypilot(env: Mapping[str, str]) -> Nodes | None:
    count = _number(env.get("SKYPILOT_NUM_NODES"))
    if count is None:
        return None
    hosts = env.get("SKYPILOT_NODE_IPS", "").split()
    ranks = _number(env.get("SKYPILOT_NUM_GPUS_PER_NODE")) or None
    rank = _number(env.get("SKYPILOT_NODE_RANK"))
    return Nodes("SkyPilot", "SKYPILOT_NUM_NODES", count, rank, _first(hosts), ranks)


def _sagemaker(env: Mapping[str, str]) -> Nodes | None:
    hosts = _json(env.get("SM_HOSTS"))
    if not isinstance(hosts, list) or not hosts or not all(isinstance(host, str) for host in hosts):
        return None
    here = env.get("SM_CURRENT_HOST")
    rank = hosts.index(here) if here in hosts else None
    return Nodes("SageMaker", "SM_HOSTS", len(hosts), rank, _first(hosts), _number(env.get("SM_NUM_GPUS")) or None)


def _tf_config(env: Mapping[str, str]) -> Nodes | None:
    found = _json(env.get("TF_CONFIG"))
    cluster = found.get("cluster") if isinstance(found, dict) else None
    if not isinstance(cluster, dict):
        return None
    kinds = [hosts for kind in ("chief", "master", "worker") if isinstance(hosts := cluster.get(kind), list)]
    places = [str(host) for hosts in kinds for host in hosts]
    return Nodes("the platform (Vertex AI or Katib, say)", "TF_CONFIG", len(places), None, None)


_PLATFORMS: tuple[Callable[[Mapping[str, str]], Nodes | None], ...] = (
    _torchrun_defaults,
    _skypilot,
    _sagemaker,
    _tf_config,
)


def _first(hosts: list[str]) -> str | None:
    return f"{hosts[0]}:{_PORT}" if hosts else None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _json(text: str | None) -> object:
    try:
        return json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
