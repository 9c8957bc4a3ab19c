"""Every way into a job is the same run, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from helpers.cluster import Cluster
from helpers.commands import BIN
from helpers.queued import NO_GPU, RECIPES, TEMPLATES, WORDS, Queued, assert_same

SIZE = ("--nodes=2", "--ntasks-per-node=2")
TRAIN = ("train", RECIPES / "long.py", *WORDS)


def states(slurm: Cluster) -> dict[str, str]:
    """Of all jobs, also of those that are over."""
    lines = slurm.told("squeue", "--noheader", "--states=all", "--format=%i %T").splitlines()
    return dict(line.split() for line in lines)


def test_two_nodes_of_two_ranks_are_four_ranks_here(
    slurm: Cluster, tmp_path: Path, whole: Callable[[int], Path]
) -> None:
    before = states(slurm)
    ways = [tmp_path / name for name in ("submit", "launchers", "tasks", "srun", "salloc")]
    for folder in ways:
        folder.mkdir()
    submit, launchers, tasks, srun, salloc = ways
    jobs = [Queued(slurm, submit).submit(*WORDS, "-n", 2).job]
    words = ("--time=10", TEMPLATES / "train.sbatch", RECIPES / "long.py", *WORDS)
    jobs.append(slurm.sbatch("--nodes=2", *words, cwd=launchers, RANKS="2", **NO_GPU))
    words = ("--time=10", TEMPLATES / "train_per_rank.sbatch", RECIPES / "long.py", *WORDS)
    jobs.append(slurm.sbatch(*SIZE, *words, cwd=tasks, **NO_GPU))
    done = slurm.run("srun", *SIZE, "--time=10", BIN / "dtrain", *TRAIN, cwd=srun, **NO_GPU)
    assert done.code == 0, done.text
    assert done.out.count("EPOCH = 3") == 1, "rank 0 alone speaks"
    # Within an allocation srun makes ranks, and a command of its own stays alone, whatever variables it inherits.
    alone = f"{BIN}/dtrain train {RECIPES}/small.py epochs=1 run.name=alone --cpu"
    script = f'{alone} && exec srun {BIN}/dtrain "$@"'
    done = slurm.run("salloc", *SIZE, "--time=10", "sh", "-c", script, "sh", *TRAIN, cwd=salloc, **NO_GPU)
    assert done.code == 0, done.text
    assert "epoch 1/1, 3 steps" in done.out, "12 samples in batches of 4"
    for job in jobs:
        slurm.wait(job, "COMPLETED")
    for folder in ways:
        assert_same(folder / "runs/it", whole(4))
    after = states(slurm)
    assert [after[job] for job in after.keys() - before.keys()] == ["COMPLETED"] * len(ways)
