"""What other launchers tell their processes: understood as ranks or nodes, or refused by name; none trains alone."""

from __future__ import annotations

import json

import pytest

from dtrain.errors import WorldError
from dtrain.launch.env.conventions import TASKS, read_nodes, read_pod
from dtrain.launch.env.rank_env import read_rank_facts
from dtrain.launch.options import LaunchOptions, among_tasks

# As the launchers set them, for the second of four tasks on two nodes.
TASKS_OF = {
    "jsrun": {
        "JSM_NAMESPACE_RANK": "1",
        "JSM_NAMESPACE_SIZE": "4",
        "JSM_NAMESPACE_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "4",
        "PMIX_RANK": "1",
    },
    "Flux": {"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "4", "FLUX_TASK_LOCAL_ID": "1", "PMI_RANK": "1", "PMI_SIZE": "4"},
    "PALS": {"PALS_RANKID": "1", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "2", "PMI_RANK": "1", "PMI_SIZE": "4"},
    "MVAPICH2": {
        "MV2_COMM_WORLD_RANK": "1",
        "MV2_COMM_WORLD_SIZE": "4",
        "MV2_COMM_WORLD_LOCAL_RANK": "1",
        "MV2_COMM_WORLD_LOCAL_SIZE": "2",
    },
    "MVAPICH": {
        "MVP_COMM_WORLD_RANK": "1",
        "MVP_COMM_WORLD_SIZE": "4",
        "MVP_COMM_WORLD_LOCAL_RANK": "1",
        "MVP_COMM_WORLD_LOCAL_SIZE": "2",
    },
    "mpirun": {
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "PMIX_RANK": "1",
    },
    "horovodrun": {
        "HOROVOD_RANK": "1",
        "HOROVOD_SIZE": "4",
        "HOROVOD_LOCAL_RANK": "1",
        "HOROVOD_LOCAL_SIZE": "2",
    },
    "mpiexec": {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
    "PMIx": {"PMIX_RANK": "1", "PMIX_NAMESPACE": "prterun-1@1"},
}
SINGLE = {
    "JSM_NAMESPACE_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "FLUX_JOB_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "HOROVOD_SIZE",
}
MEET = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}

# As the platforms set them, on the second of two nodes with two GPUs each.
NODES_OF = {
    "PET_NNODES": {
        "PET_NNODES": "2",
        "PET_NODE_RANK": "1",
        "PET_NPROC_PER_NODE": "2",
        "PET_MASTER_ADDR": "n1",
        "PET_MASTER_PORT": "29500",
    },
    "SKYPILOT_NUM_NODES": {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "n1\nn2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "2",
    },
    "SM_HOSTS": {"SM_HOSTS": '["n1", "n2"]', "SM_CURRENT_HOST": "n2", "SM_NUM_GPUS": "2"},
}
TF_CONFIG = {"TF_CONFIG": json.dumps({"cluster": {"chief": ["a:1"], "worker": ["b:1"]}, "task": {"type": "worker"}})}


def test_each_row_is_tried() -> None:
    assert set(TASKS_OF) == {row.launcher for row in TASKS}


@pytest.mark.parametrize("launcher", TASKS_OF)
def test_tasks_that_do_not_know_where_they_meet_are_refused_by_name(launcher: str) -> None:
    with pytest.raises(WorldError, match=rf"^{launcher} started .* would train alone") as caught:
        read_rank_facts(TASKS_OF[launcher])
    row = next(row for row in TASKS if row.launcher == launcher)
    assert "dtrain launch -n" in str(caught.value)
    assert row.one_a_node.partition(" NODES")[0] in str(caught.value)
    assert f"unset {row.rank}" in str(caught.value)
    if row.local_size and launcher != "PMIx":
        assert "dtrain launch -n 2 --nodes 2 --rdzv FIRST_NODE:29500" in str(caught.value)


@pytest.mark.parametrize("launcher", sorted(set(TASKS_OF) - {"PMIx"}))
def test_tasks_that_know_where_they_meet_are_ranks(launcher: str) -> None:
    facts = read_rank_facts(TASKS_OF[launcher] | MEET)
    assert (facts.rank, facts.size, facts.local_rank, facts.launched) == (1, 4, 1, True)
    assert facts.local_size in (2, 4)


def test_all_tasks_on_one_node_are_sent_to_its_own_launcher() -> None:
    env = TASKS_OF["mpirun"] | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    with pytest.raises(WorldError, match=r"Start instead: dtrain train -n 4 \.\.\."):
        read_rank_facts(env)


@pytest.mark.parametrize("launcher", sorted(set(TASKS_OF) - {"PMIx"}))
def test_a_single_task_trains(launcher: str) -> None:
    env = {name: "1" if name.endswith("_SIZE") else "0" for name in TASKS_OF[launcher] if name != "PMIX_RANK"}
    assert read_rank_facts(env) == read_rank_facts({})


@pytest.mark.parametrize("variable", NODES_OF)
def test_one_process_on_one_of_several_nodes_is_refused_with_the_command(variable: str) -> None:
    with pytest.raises(WorldError, match=r"one process on each of 2 nodes") as caught:
        read_rank_facts(NODES_OF[variable])
    assert "dtrain launch -n 2 --nodes 2 --node-rank 1 --rdzv n1:29500 -- train" in str(caught.value)
    assert variable in str(caught.value)


@pytest.mark.parametrize("variable", NODES_OF)
def test_a_launcher_on_one_of_several_nodes_knows_them(variable: str) -> None:
    asked = among_tasks(LaunchOptions(), None, NODES_OF[variable])
    assert (asked.nodes, asked.node_rank, asked.rdzv, asked.ranks) == (2, 1, "n1:29500", 2)
    kept = among_tasks(LaunchOptions(ranks=4, rdzv="n1:3"), None, NODES_OF[variable])
    assert (kept.ranks, kept.rdzv) == (4, "n1:3")
    for other in (LaunchOptions(nodes=3), LaunchOptions(node_rank=0)):
        with pytest.raises(WorldError, match=f"leave --node.* out, or unset {variable}"):
            among_tasks(other, None, NODES_OF[variable])


def test_nodes_whose_meeting_place_is_unknown_are_refused() -> None:
    with pytest.raises(WorldError, match="one process on each of 2 nodes"):
        read_rank_facts(TF_CONFIG)
    with pytest.raises(WorldError, match="give --rdzv HOST:PORT"):
        among_tasks(LaunchOptions(), None, TF_CONFIG)
    assert among_tasks(LaunchOptions(rdzv="a:2", node_rank=1), None, TF_CONFIG).nodes == 2


def test_a_pod_of_pytorchjob_is_a_rank_and_for_a_launcher_a_node() -> None:
    pod = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "PET_NNODES": "2"}
    facts = read_rank_facts(pod)
    assert (facts.rank, facts.size, facts.local_rank, facts.local_size) == (1, 2, 0, 1)
    assert facts.local_unknown, "which of them share a host is seen when they meet"
    asked = among_tasks(LaunchOptions(), None, pod)
    assert (asked.nodes, asked.node_rank, asked.rdzv) == (2, 1, "job-master-0:23456")
    assert read_pod(pod | {"LOCAL_RANK": "0"}) is None, "a rank of torchrun's"


@pytest.mark.parametrize("launcher", sorted(set(TASKS_OF) - {"PMIx"}))
def test_launchers_that_know_nothing_of_each_other_are_refused(launcher: str) -> None:
    with pytest.raises(WorldError, match=f"{launcher} started 4 launchers"):
        among_tasks(LaunchOptions(ranks=2), None, TASKS_OF[launcher])
    told = LaunchOptions(ranks=2, nodes=4, rdzv="n1:2")
    assert among_tasks(told, None, TASKS_OF[launcher]) == told


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"PET_NNODES": "1"},
        {"PET_NNODES": "1:4"},  # how many there are is not known yet
        {"PET_NNODES": "x"},
        {"SKYPILOT_NUM_NODES": "1"},
        {"SM_HOSTS": '["algo-1"]'},
        {"SM_HOSTS": "[broken"},
        {"TF_CONFIG": "[]"},
        {"TF_CONFIG": '{"cluster": {"worker": ["a:1"]}}'},
    ],
)
def test_one_node_or_nonsense_is_one_process(env: dict[str, str]) -> None:
    assert read_nodes(env) is None
    assert read_rank_facts(env).size == 1


def test_srun_may_set_pmis_variables_besides_its_own() -> None:
    from dtrain.launch.env.conventions import task_variables

    assert task_variables(TASKS_OF["mpiexec"], 4) == {}
    assert task_variables({"PMIX_RANK": "0"}, 1) == {}
    with pytest.raises(WorldError, match="mpirun started 4 tasks"):
        task_variables(TASKS_OF["mpirun"], 2)  # by its own servers, which srun started, one a node
