"""What may be asked of SLURM: each wrong value is one message with its name, itself and what it should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dtrain.errors import UsageError
from dtrain.slurm.grid import read_grid
from dtrain.slurm.request import JobRequest, seconds_of


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"nodes": 0}, "--nodes 0: should be a whole number of at least 1"),
        ({"ranks": -1}, "-n -1: should be"),
        ({"cpus_per_task": 0}, "--cpus-per-task 0: should be"),
        ({"requeues": -1}, "--requeues -1: should be"),
        ({"tasks": 3, "at_once": 0}, "--at-once 0: should be"),
        ({"at_once": 2}, "--at-once 2: needs --array"),
        ({"gpus_per_node": "0"}, "--gpus-per-node '0': should be a number"),
        ({"gpus_per_node": "8\n#SBATCH -x"}, r"--gpus-per-node '8\\n#SBATCH -x': should be"),
        ({"gpus_per_node": "a100:4", "ranks": 8}, "-n 8 with --gpus-per-node a100:4: should be at most 4"),
        ({"gpus_per_node": "4", "cpu": True}, "--gpus-per-node 4 with --cpu: use only one of them"),
        ({"retries": 1, "per_rank": True}, "--retries 1 with --per-rank: use only one of them"),
        ({"mem": "64 G"}, "--mem '64 G': should be a number with K, M, G or T"),
        ({"mem": "1G\n"}, "--mem '1G\\\\n': should be"),
        ({"partition": ""}, "--partition '': should not be empty"),
        ({"account": "a\nb"}, r"--account 'a\\nb': should be text without line breaks"),
        ({"qos": "a\rb"}, r"--qos 'a\\rb': should be text without"),
        ({"constraint": "a\x1bb"}, r"--constraint 'a\\x1bb': should be text without"),
        ({"job_name": "a\u2028b"}, r"--job-name 'a\\u2028b': should be text without"),
        ({"job_name": "\udcff"}, r"--job-name '\\udcff': should be text without"),
        ({"time": "4h"}, "--time '4h': should be minutes, MM:SS"),
        ({"time": "0"}, "--time '0': should be more than 0"),
        ({"time": "1:2:3:4"}, "--time '1:2:3:4': should be"),
        ({"time": "2"}, "--stop-before 120: should be less than --time 2, which is 120 seconds"),
        ({"stop_before": 70_000}, "--stop-before 70000: should be at most 65535 seconds"),
        ({"env_setup": Path("/no/such")}, "--env-setup '/no/such': should be a shell file"),
        ({"sbatch_args": ("-x node1",)}, "--sbatch-arg '-x node1': should be a long sbatch option"),
        ({"sbatch_args": ("--comment=a\nb",)}, r"--sbatch-arg '--comment=a\\nb': should be text without"),
        ({"sbatch_args": ("--output=x",)}, "--sbatch-arg '--output=x': the script sets --output itself"),
        ({"sbatch_args": ("--sig=x",)}, "--sbatch-arg '--sig=x': use the dtrain option --stop-before"),
        ({"srun_args": ("python",)}, "--srun-arg 'python': should be an srun option"),
    ],
)
def test_a_wrong_value_is_named(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("(", r"\(")) as refusal:
        JobRequest(**{"job_name": "n"} | asked).check()
    assert len(str(refusal.value).splitlines()) == 1


def test_all_wrong_values_are_told_at_once() -> None:
    with pytest.raises(UsageError) as refusal:
        JobRequest("n", nodes=0, time="x", mem="y", sbatch_args=("z",)).check()
    assert len(str(refusal.value).splitlines()) == 4


def test_what_is_right_passes(tmp_path: Path) -> None:
    (tmp_path / "setup.sh").touch()
    JobRequest(
        "größe $(x) 'y'",
        nodes=2,
        gpus_per_node="a100:8",
        time="2-0",
        constraint="[rack1|rack2]&!old",
        mem="0",
        env_setup=tmp_path / "setup.sh",
        sbatch_args=("--exclusive", "--mem-per-gpu=4G", "--time-min=1", "--nodelist=n[1-2]", "--comment=a b"),
        srun_args=("--cpu-bind=none", "-v"),
    ).check()


def test_a_start_without_time_to_train_is_remarked_on() -> None:
    assert (
        JobRequest("n", time="4:0:0").remarks()
        == JobRequest("n").remarks()
        == JobRequest("n", time="UNLIMITED").remarks()
        == []
    )
    assert "leaves 0 s per start" in JobRequest("n", time="1", stop_before=30).remarks()[0]
    assert "leaves 40 s per start" in JobRequest("n", time="2", stop_before=20).remarks()[0]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("4:00:00", 14_400),
        ("1-2", 93_600),
        ("1-2:03", 93_780),
        ("1-2:03:04", 93_784),
        ("unlimited", None),
    ],
)
def test_times_are_those_of_sbatch(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "1-", "-1", "1.5", "1-2:3:4:5", "٣", "1:2:", " 1", "1\n"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        seconds_of(text or "x")


def test_ranks_are_as_many_as_gpus_or_one() -> None:
    assert JobRequest("n", nodes=2, gpus_per_node="a100:8").world_size == 16
    assert JobRequest("n", nodes=2, gpus_per_node="8", ranks=2).world_size == 4
    assert (JobRequest("n", cpu=True).world_size, JobRequest("n").world_size) == (1, 1)
    assert (JobRequest("n", ranks=4).task_cpus, JobRequest("n", ranks=4, per_rank=True).task_cpus) == (4, 1)


class TestGrid:
    def test_all_combinations_the_last_key_fastest(self) -> None:
        grid = read_grid(["lr=1e-3,1e-4", "seed=1,2"])
        assert grid == [["lr=1e-3", "seed=1"], ["lr=1e-3", "seed=2"], ["lr=1e-4", "seed=1"], ["lr=1e-4", "seed=2"]]
        assert read_grid(["lr=1e-3,1e-4  seed=1,2 "]) == grid

    def test_commas_and_spaces_in_brackets_and_quotes_part_nothing(self) -> None:
        grid = read_grid(["""a=[1, [2,3]],{x: 1, y: 2} t='a, b',"c d",it's,$(x)"""])
        assert [one[0] for one in grid[::4]] == ["a=[1, [2,3]]", "a={x: 1, y: 2}"]
        assert [one[1] for one in grid[:4]] == ["t='a, b'", 't="c d"', "t=it's", "t=$(x)"]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "should be key=value,value"),
            ("lr", "'lr' should be key=value,value"),
            ("=1", "'=1' should be key=value,value"),
            ("lr=", "a value of lr is missing"),
            ("lr=1,,2", "a value of lr is missing"),
            ("lr=1 lr=2", "lr should appear once"),
            ("lr=1,1", "lr=1 should appear once"),
            ("a=[1,2", "a bracket is not balanced"),
            ("a=1]", "a bracket is not balanced"),
            ("a='1,2", "' is not balanced"),
            ("run.name=a,b", "run.name should be the same for all runs"),
            ("recipe=a.py,b.py", "recipe should be the same for all runs"),
        ],
    )
    def test_what_is_no_grid(self, text: str, words: str) -> None:
        with pytest.raises(UsageError, match=words):
            read_grid([text])
