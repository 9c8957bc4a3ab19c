"""Tasks of srun's that are ranks: each has a supervisor of its own, as under any other launcher."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import psutil
from helpers.apart import STUCK, failure, write_recipe
from helpers.cluster import Cluster
from helpers.commands import BIN
from helpers.queued import NO_GPU
from helpers.running import wait_for

SRUN = ("srun", "--nodes=1", "--ntasks=2", "--time=10", BIN / "dtrain", "train", "recipe.py", "run.name=one", "--cpu")


def ranks_of(folder: Path) -> list[psutil.Process]:
    """All processes of the step, as this machine knows them: those that have the folder as their own."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and "dtrain" in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return [one for one in found if "srun" not in one.cmdline()[0]]


def test_a_hang_of_a_task_is_ended_and_its_line_named(slurm: Cluster, tmp_path: Path) -> None:
    write_recipe(tmp_path, f"RANK == 1 and {STUCK}")
    done = slurm.run(*SRUN, "train.hang_seconds=2", cwd=tmp_path, **NO_GPU)
    assert done.code != 0
    assert re.search(r"a hang was stopped: rank 1 has been in epoch 1, train step 5 .* in .*recipe.py:\d+", done.text)
    assert failure(tmp_path) == [1, 1, "hang"]


def test_tasks_do_not_outlive_the_one_who_has_started_them(slurm: Cluster, tmp_path: Path) -> None:
    write_recipe(tmp_path, "time.sleep(0.05)")
    with slurm.start(*SRUN, "epochs=1000", cwd=tmp_path, **NO_GPU) as srun:
        try:
            wait_for(lambda: all((tmp_path / f"trainer-{rank}").exists() for rank in (0, 1)), "both ranks train")
            ranks = ranks_of(tmp_path)
            assert len(ranks) >= 4, "each has a supervisor"
            daemons = {above.pid: above for rank in ranks for above in rank.parents() if above.name() == "slurmstepd"}
            assert daemons
            for daemon in daemons.values():
                daemon.send_signal(signal.SIGKILL)
            _, alive = psutil.wait_procs(ranks, timeout=60)
            assert not alive
        finally:
            srun.kill()
    assert "end of slurmstepd" in (tmp_path / "runs/one/logs/rank-0.log").read_text()
