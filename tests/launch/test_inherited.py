"""What a rank starts as a program of its own is no rank: dtrain's verbs, plain programs, jobs of SLURM's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import BIN, Dtrain, clean_environment

from dtrain.launch.env import inherited
from dtrain.launch.env.inherited import GIVEN, MARK, belonging, without_rank

RANK = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
    "KEPT": "yes",
}
OURS = {
    "DTRAIN_REPORT_DIR": "/gone",
    "DTRAIN_SUPERVISOR_PID": "1",
    "DTRAIN_RUN__NAME": "theirs",
    GIVEN: "DTRAIN_RUN__NAME",
}

SHOW = (
    "import json, os, dtrain; from dtrain.launch.env.inherited import mark_rank\n"
    "found = [dtrain.rank(), dtrain.world_size()]\n"
    "if found[1] > 1: mark_rank()\n"
    "print(json.dumps([*found, sorted(os.environ)]))"
)


def shown(**environment: str) -> tuple[int, int, set[str]]:
    out = subprocess.check_output([sys.executable, "-c", SHOW], env=clean_environment(**environment), text=True)
    rank, size, names = json.loads(out)
    return rank, size, set(names)


def marked(**environment: str) -> dict[str, str]:
    """The environment that a rank's children get before it has joined the others."""
    program = "import json, os; from dtrain.launch.env.inherited import mark_rank; mark_rank(); print(json.dumps(dict(os.environ)))"
    out = subprocess.check_output([sys.executable, "-c", program], env=clean_environment(**environment), text=True)
    found = json.loads(out)
    return {name: found[name] for name in {*environment, MARK}}


def test_words_that_can_be_read_once_reach_the_program_whole() -> None:
    program = (
        "import subprocess, sys; from dtrain.launch.env.inherited import mark_rank; mark_rank()\n"
        "subprocess.run(iter([sys.executable, '-c', 'import sys; print(sys.argv[1:])', 'a', 'b']), check=True)"
    )
    out = subprocess.check_output([sys.executable, "-c", program], env=clean_environment(**RANK), text=True)
    assert out == "['a', 'b']\n"


def test_variables_with_the_mark_of_another_process_are_void() -> None:
    rank, size, names = shown(**marked(**RANK, **OURS, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1"))
    assert not any(name.startswith("SLURM_") for name in names)
    assert (rank, size) == (0, 1)
    assert "KEPT" in names
    assert not names & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", *OURS, MARK}


def test_what_a_launcher_has_set_since_holds() -> None:
    """A rank that only starts others may start torchrun, whose ranks inherit the mark of the one above."""
    inner = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "4711", "TORCHELASTIC_RUN_ID": "x"}
    rank, size, names = shown(**marked(**RANK, **OURS) | inner)
    assert (rank, size) == (1, 2)
    assert not names & set(OURS), "the supervisor above is not theirs"
    assert MARK in names, "their own by now"


def test_tasks_that_srun_has_started_since_are_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    outer = marked(**RANK, SLURM_STEP_NUM_TASKS="1", SLURM_TASK_PID="7", SLURM_PROCID="0")
    task = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_TASK_PID": "8", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    for name, value in (outer | task).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(inherited._state, "marked", False)
    inherited.drop_inherited()
    assert "RANK" not in os.environ
    assert os.environ["SLURM_PROCID"] == "1"


def test_a_rank_marks_its_variables_and_goes_on_believing_them() -> None:
    rank, size, names = shown(**RANK)
    assert (rank, size) == (1, 2)
    assert MARK in names


def test_a_process_that_becomes_another_program_stays_the_rank() -> None:
    again = f"import os, sys\nfrom dtrain.launch.env.inherited import mark_rank\nmark_rank()\nos.execv(sys.executable, [sys.executable, '-c', {SHOW!r}])"
    out = subprocess.check_output([sys.executable, "-c", again], env=clean_environment(**RANK), text=True)
    assert json.loads(out)[:2] == [1, 2]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_multiprocessing_are_parts_of_their_rank(tmp_path: Path, method: str) -> None:
    (tmp_path / "w.py").write_text(
        "import multiprocessing, os, dtrain\nfrom dtrain.launch.env.inherited import mark_rank\n"
        "def ask(q): q.put((dtrain.rank(), os.environ['RANK'], dtrain.world_size()))\n"
        "if __name__ == '__main__':\n"
        "    mark_rank()\n"
        f"    context = multiprocessing.get_context({method!r})\n"
        "    q = context.SimpleQueue()\n"
        "    p = context.Process(target=ask, args=(q,)); p.start(); print(q.get()); p.join()\n"
    )
    out = subprocess.check_output([sys.executable, "w.py"], cwd=tmp_path, env=clean_environment(**RANK), text=True)
    assert out == "(1, '1', 2)\n"


@pytest.mark.parametrize(
    ("joins", "argv", "void"),
    [
        (False, "['env']", False),  # a script that starts the real trainer hands its place on
        (True, "['env']", True),
        (False, "['sbatch']", True),
        (False, "'sbatch x.sh'", True),
    ],
)
def test_what_a_rank_starts_as_a_program_gets_no_rank(tmp_path: Path, joins: bool, argv: str, void: bool) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\nexec env\n")
    sbatch.chmod(0o755)
    for env in ("None", "dict(os.environ, MORE='1')", "dict(os.environ, RANK='7')"):
        program = (
            "import os, subprocess\nfrom dtrain.launch.env.inherited import joined, mark_rank\nmark_rank()\n"
            f"{'joined()' if joins else ''}\nsubprocess.run({argv}, env={env}, shell=isinstance({argv}, str), check=True)"
        )
        environment = clean_environment(**RANK, PATH=f"{tmp_path}:{os.environ['PATH']}")
        out = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
        found = dict(line.partition("=")[::2] for line in out.splitlines())
        assert ("MASTER_PORT" not in found) == void
        assert found["KEPT"] == "yes"
        expected = "7" if "7" in env else None if void else "1"
        assert found.get("RANK") == expected, "what was set for this program alone stays"
        assert ("MORE" in found) == ("MORE" in env)


def test_a_shells_own_master_port_is_kept_for_a_job_and_a_ranks_is_not() -> None:
    assert without_rank({"MASTER_PORT": "1", "A": "b"}) == {"MASTER_PORT": "1", "A": "b"}
    assert without_rank({**RANK, **OURS, "SLURM_PROCID": "0", "OMPI_COMM_WORLD_RANK": "0"}) == {"KEPT": "yes"}
    assert "KEPT" not in belonging(RANK)


def test_the_names_are_those_that_launchers_set() -> None:
    from dtrain.launch.env.job import Job

    made = Job(2, environment={"DTRAIN_RUN__NAME": "x", "ACCELERATE_USE_CPU": "true"}).rank_environment(1, "reports")
    ours = {name for name in made if name not in os.environ and name != "OMP_NUM_THREADS"}
    kept = {"GLOO_SOCKET_IFNAME", "ACCELERATE_USE_CPU"}
    assert ours - set(belonging(made)) <= kept, "all that a launcher gives a rank is void in what the rank starts"
    assert inherited.MARK not in made


def test_a_rank_runs_verbs_and_torch_programs_of_their_own(dtrain: Dtrain, recipes: Path) -> None:
    """Today's habit of evaluating, or starting the next training, from the rank that has just trained."""
    (dtrain.folder / "plain.py").write_text(
        "import os, torch\nfrom accelerate import Accelerator\n"
        "print('plain', Accelerator(cpu=True).num_processes, 'RANK' in os.environ)\n"
    )
    (dtrain.folder / "mine.py").write_text(
        f"import subprocess, sys\nsys.path.insert(0, {str(recipes)!r})\nfrom small import *\n"
        "import dtrain\n"
        "def train_step(model, x, y):\n"
        "    if dtrain.rank() == 0 and not subprocess.os.path.exists('done'):\n"
        "        open('done', 'w').close()\n"
        f"        for words in ([{str(BIN / 'dtrain')!r}, 'train', {str(recipes / 'small.py')!r}, '--cpu',"
        " 'epochs=1', 'run.name=inner'], [sys.executable, 'plain.py']):\n"
        "            done = subprocess.run(words, capture_output=True, text=True)\n"
        "            print(done.returncode, done.stdout, done.stderr, flush=True)\n"
        "    return ((model(x) - y) ** 2).mean()\n"
    )
    done = dtrain("train", "mine.py", "-n", 2, "--cpu", "epochs=1", "run.name=outer")
    assert done.code == 0, done.text
    assert "\n0 plain 1 False" in done.out, "the inner ones returned 0"
    assert {path.name for path in (dtrain.folder / "runs").iterdir()} == {"outer", "inner"}
    assert done.out.count("EPOCH = 1") == 2, "the inner one trained"


PLACED = """
import subprocess, sys, dtrain
if dtrain.rank() == 0:
    sys.exit(subprocess.run(sys.argv[1:]).returncode)
"""
STARTER = "import subprocess, sys\nsys.exit(subprocess.run(sys.argv[1:]).returncode)\n"


@pytest.mark.parametrize(("script", "trained"), [(PLACED, 1), (STARTER, 2)])
def test_a_script_that_asks_for_its_rank_has_taken_it_and_one_that_only_starts_hands_it_on(
    dtrain: Dtrain, recipes: Path, script: str, trained: int
) -> None:
    """Neither is taken for a rank whose supervisor has died, as it is that one's grandchild."""
    (dtrain.folder / "s.py").write_text(script)
    words = (BIN / "dtrain", "train", recipes / "small.py", "--cpu", "epochs=1", "run.name=it")
    done = dtrain("launch", "-n", 2, "--cpu", "--", "s.py", *words)
    assert done.code == 0, done.text
    assert json.loads((dtrain.folder / "runs/it/starts.jsonl").read_text().splitlines()[0])["ranks"] == trained
    assert ("note: started by rank 0 of 2 of another job" in done.err) == (trained == 1)


def test_a_verb_that_a_script_starts_as_a_rank_says_that_it_is_none(dtrain: Dtrain) -> None:
    done = dtrain("--version", **marked(**RANK, **OURS))
    assert done.code == 0
    assert "note: started by rank 1 of 2 of another job" in done.err


def test_local_rank_alone_is_one_process(dtrain: Dtrain, recipes: Path) -> None:
    done = dtrain("train", recipes / "small.py", "--cpu", "epochs=1", LOCAL_RANK="0")
    assert done.code == 0, done.text
    assert "LOCAL_RANK" not in done.text
