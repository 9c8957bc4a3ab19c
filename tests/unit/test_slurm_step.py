"""What SLURM's variables say: believed of srun's own tasks, and never of what merely inherited them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers.commands import clean_environment
from hypothesis import given
from hypothesis import strategies as st

from dtrain.errors import WorldError
from dtrain.launch.env.rank_env import read_rank_facts
from dtrain.launch.env.slurm_env import Step, expand_counts, first_host, rank_variables, read_step
from dtrain.launch.options import LaunchOptions, among_tasks

# Of the fourth of five tasks on three nodes, as srun 22.05 sets them.
TASK = {
    "SLURM_JOB_ID": "812",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "node[07-08,11]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_TASK_PID": "4711",
}


def step_of(environ: dict[str, str]) -> Step:
    step = read_step(environ, lambda _: True)
    assert step is not None
    return step


def test_a_task_is_a_rank() -> None:
    variables = rank_variables(TASK, step_of(TASK))
    assert {name: variables[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
    }
    assert variables["MASTER_ADDR"] == "node07"
    assert 20_000 <= int(variables["MASTER_PORT"]) < 32_000


def test_each_step_of_each_start_is_told_from_the_others() -> None:
    others = [TASK, TASK | {"SLURM_STEP_ID": "4"}, TASK | {"SLURM_JOB_ID": "813"}, TASK | {"SLURM_RESTART_COUNT": "1"}]
    variables = [rank_variables(env, step_of(env)) for env in others]
    assert len({one["DTRAIN_JOB"] for one in variables}) == 4
    assert len({one["MASTER_PORT"] for one in variables[:3]}) == 3


def test_where_job_numbers_begin_anew_the_port_is_in_another_file() -> None:
    one_node = TASK | {"SLURM_STEP_TASKS_PER_NODE": "5", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "node07"}
    starts = [
        {"SLURM_SRUN_COMM_PORT": port, "SLURM_JOB_START_TIME": time}
        for port, time in [("4", "1"), ("5", "1"), ("4", "2")]
    ]
    files = [rank_variables(one_node | start, step_of(one_node | start))["DTRAIN_PORT_FILE"] for start in starts]
    assert len(set(files)) == 3


def test_an_address_of_the_users_holds() -> None:
    env = TASK | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"}
    variables = rank_variables(env, step_of(env))
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("10.0.0.7", "1234")


@pytest.mark.parametrize(
    "changed",
    [{"SLURM_PROCID": "5"}, {"SLURM_PROCID": "x"}, {"SLURM_STEP_TASKS_PER_NODE": "2"}, {"SLURM_NODEID": "3"}],
)
def test_what_does_not_fit_is_refused(changed: dict[str, str]) -> None:
    with pytest.raises(WorldError, match="SLURM_"):
        step_of(TASK | changed)


def test_what_a_shell_left_behind_is_not_believed() -> None:
    assert read_step(TASK) is None, "no process 4711 is above this one"
    assert read_step({**TASK, "SLURM_TASK_PID": ""}) is None
    assert read_rank_facts(TASK).size == 1


@pytest.mark.parametrize("program", ["print(rank_facts())", "os.execv(sys.executable, [sys.executable, '-c', CODE])"])
def test_a_task_and_what_it_starts_are_believed(program: str) -> None:
    code = "import os; from dtrain.launch.env.rank_env import read_rank_facts as f; print(f().rank, f().size, os.environ['RANK'])"
    # The task itself; and a shell of it that starts dtrain.
    mine = f"import os, subprocess, sys\nos.environ['SLURM_TASK_PID'] = str(os.getpid())\nCODE = {code!r}\n"
    run = "subprocess.run([sys.executable, '-c', CODE], check=True)" if "print" in program else program
    done = subprocess.run(
        [sys.executable, "-c", mine + run],
        env=clean_environment() | TASK,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.split() == ["3", "5", "3"]


def test_the_parent_of_a_task_is_not_one() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert read_step(TASK | {"SLURM_TASK_PID": str(child.pid)}) is None
        assert read_step(TASK | {"SLURM_TASK_PID": str(os.getpid())}) is not None
    finally:
        child.communicate(b"\n", timeout=30)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-4]", "n1"),
        ("n[01-04,7],m3", "n01"),
        ("rack[2-3]node[05,7]", "rack2node05"),
        ("a-b.c,d", "a-b.c"),
        ("gpu[3]-ib", "gpu3-ib"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), min_size=1, max_size=9))
def test_tasks_of_nodes(groups: list[tuple[int, int]]) -> None:
    text = ",".join(f"{count}(x{nodes})" if nodes > 1 else str(count) for count, nodes in groups)
    assert list(expand_counts(text)) == [count for count, nodes in groups for _ in range(nodes)]


class TestLaunchers:
    """srun starts one `dtrain launch` a node."""

    env = TASK | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "1(x3)", "SLURM_PROCID": "1"}

    def test_nodes_and_meeting_place_come_from_slurm(self) -> None:
        step = step_of(self.env)
        asked = among_tasks(LaunchOptions(ranks=4), step, {})
        assert (asked.ranks, asked.nodes, asked.node_rank) == (4, 3, 1)
        assert (asked.rdzv, asked.job_id) == (f"node07:{step.port}", "slurm-812.3.0")

    def test_what_the_user_says_besides_must_fit(self) -> None:
        step = step_of(self.env)
        assert among_tasks(LaunchOptions(nodes=3, rdzv="node07:29500"), step, {}).rdzv == "node07:29500"
        with pytest.raises(WorldError, match=r"--nodes 2, but srun .* node 1 of 3"):
            among_tasks(LaunchOptions(nodes=2), step, {})

    def test_more_than_one_a_node_is_refused(self) -> None:
        with pytest.raises(WorldError, match=r"5 launchers on 3 nodes, 2 on this one: .*--ntasks-per-node=1"):
            among_tasks(LaunchOptions(), step_of(TASK), {})

    def test_alone_it_is_as_without_slurm(self) -> None:
        alone = TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0"}
        assert among_tasks(LaunchOptions(), step_of(alone | {"SLURM_NODEID": "0"}), {}) == LaunchOptions()
