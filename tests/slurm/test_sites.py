"""SLURM as sites have set it up: --export=NONE, hostile files in the working folder, other programs on the nodes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers.cluster import Cluster
from helpers.commands import BIN
from helpers.queued import NO_GPU, RECIPES, TEMPLATES
from helpers.running import wait_for

from dtrain import read_history

SEEN = "import os\nopen(f\"seen-{os.environ.get('RANK')}\", 'w').write(str(os.environ.get('FROM_SETUP')))\n"


def recipe(folder: Path, name: str = "long.py") -> Path:
    """A recipe that notes what the environment of its ranks has from the batch script; among files of hostile names."""
    folder.mkdir(parents=True, exist_ok=True)
    for shadow in ("random", "types", "queue"):
        (folder / f"{shadow}.py").write_text('raise ImportError("the user\'s own " + __file__)\n')
    (folder / "recipes").mkdir()
    path = folder / "recipes" / "mine.py"
    path.write_text(SEEN + (RECIPES / name).read_text())
    return path


@pytest.mark.timeout(300)
def test_a_requeued_job_resumes_its_own_run_where_srun_hands_nothing_on(slurm: Cluster, tmp_path: Path) -> None:
    """The batch script by hand, with --export=NONE and no run.name."""
    mine = recipe(tmp_path)
    ready = f"export FROM_SETUP=yes PYTHON={sys.executable} SLOW=0.3 " + " ".join(
        f"{k}='{v}'" for k, v in NO_GPU.items()
    )
    text = (TEMPLATES / "train.sbatch").read_text()
    assert "# source ~/my-environment.sh\n" in text
    script = tmp_path / "own.sbatch"
    path = f"export PATH={Path(slurm.told('sh', '-c', 'command -v srun').strip()).parent}:$PATH"
    conf = f"export SLURM_CONF={slurm.base}/etc/slurm.conf"
    script.write_text(text.replace("# source ~/my-environment.sh\n", f"{ready}\n{path}\n{conf}\n"))
    words = (mine, "epochs=3", "data.n_train=32", "model.pause=0")
    job = slurm.sbatch("--export=NONE", "--time=10", "--nodes=2", "--cpus-per-task=1", script, *words, cwd=tmp_path)
    runs = tmp_path / "runs"
    wait_for(lambda: list(runs.glob("*/history.csv")), "an epoch")
    slurm.told("scancel", "--signal=USR1", "--batch", job)
    slurm.wait(job, "PENDING", "RUNNING", restarts=1)
    (tmp_path / "go").touch()
    slurm.wait(job, "COMPLETED", restarts=1, seconds=200)
    (run,) = runs.iterdir()
    assert run.name == f"mine-job{job}"
    assert list(read_history(run)["epoch"]) == [1, 2, 3]
    said = slurm.job(job).text
    assert said.count(f"run {Path('runs') / run.name}") == 2, "two starts of one run"
    assert "without a secret" not in said, "srun hands the job's secret on, too"
    assert [(tmp_path / f"seen-{rank}").read_text() for rank in (0, 1)] == ["yes", "yes"]


@pytest.mark.timeout(200)
def test_ranks_of_one_node_take_a_port_that_no_other_job_has(slurm: Cluster, tmp_path: Path) -> None:
    """Where srun starts each rank: the port that both could work out is another program's."""
    mine = recipe(tmp_path, "small.py")
    script = tmp_path / "ranks.sbatch"
    listen = (
        "import socket, sys, time; from dtrain.launch.env.slurm_env import Step; "
        "port = Step(sys.argv[1], '0', '0', 2, 0, 0, (2,), 0, 'n').port; "
        "held = socket.create_server(('', port)); open('held', 'w').write(str(port)); time.sleep(120)"
    )
    script.write_text(
        "#!/bin/bash\n"
        f'{sys.executable} -I -c "{listen}" $SLURM_JOB_ID & held=$!\n'
        "until [ -s held ]; do sleep 0.05; done\n"
        f"srun -n2 {BIN}/dtrain train {mine} epochs=1 run.name=it --cpu; code=$?\n"
        "kill $held; exit $code\n"
    )
    job = slurm.sbatch("--nodes=1", "--ntasks=2", "--time=5", script, cwd=tmp_path, **NO_GPU)
    slurm.wait(job, "COMPLETED", seconds=100)
    assert (tmp_path / "held").read_text() != ""
    assert list(read_history(tmp_path / "runs/it")["epoch"]) == [1]
    assert "2 ranks x batch" in slurm.job(job).text
