"""Every way into a job is the same run, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from helpers.cluster import Cluster
from helpers.commands import BIN
from helpers.queued import NO_GPU, RECIPES, TEMPLATES, WORDS, Queued, assert_same

TRAIN = ("train", RECIPES / "long.py", *WORDS)


def states(slurm: Cluster) -> dict[str, str]:
    """Of all jobs, also of those that are over."""
    lines = slurm.told("squeue", "--noheader", "--states=all", "--format=%i %T").splitlines()
    return dict(line.split() for line in lines)


def test_two_nodes_are_one_world_however_it_starts(
    slurm: Cluster, tmp_path: Path, whole: Callable[[int], Path]
) -> None:
    """Two ranks a node; but for the batch script with a task per rank, and within salloc, where one will do.

    The GPUs are no more than numbers: as many ranks as there are of them.
    """
    before = states(slurm)
    ranks = {"submit": 4, "launchers": 4, "srun": 4, "tasks": 2, "salloc": 2}
    ways = {name: tmp_path / name for name in ranks}
    for folder in ways.values():
        folder.mkdir()
    jobs = [Queued(slurm, ways["submit"]).submit(*WORDS, "-n", 2).job]
    run = ("--time=10", TEMPLATES / "train.sbatch", *TRAIN[1:])
    jobs.append(slurm.sbatch("--nodes=2", "--gpus-per-node=2", *run, cwd=ways["launchers"], **NO_GPU))
    run = ("--ntasks-per-node=1", "--time=10", TEMPLATES / "train_per_rank.sbatch", *TRAIN[1:])
    jobs.append(slurm.sbatch("--nodes=2", *run, cwd=ways["tasks"], **NO_GPU))
    size = ("--nodes=2", "--ntasks-per-node=2", "--time=10")
    done = slurm.run("srun", *size, BIN / "dtrain", *TRAIN, cwd=ways["srun"], **NO_GPU)
    assert done.code == 0, done.text
    assert done.out.count("EPOCH = 3") == 1, "rank 0 alone speaks"
    # Within an allocation srun makes ranks, and a command of its own stays alone, whatever variables it inherits.
    alone = f"{BIN}/dtrain train {RECIPES}/small.py epochs=1 run.name=alone --cpu"
    script = f'{alone} && exec srun {BIN}/dtrain "$@"'
    size = ("--nodes=2", "--ntasks-per-node=1", "--time=10")
    done = slurm.run("salloc", *size, "sh", "-c", script, "sh", *TRAIN, cwd=ways["salloc"], **NO_GPU)
    assert done.code == 0, done.text
    assert "epoch 1/1, 3 steps" in done.out, "12 samples in batches of 4"
    for job in jobs:
        slurm.wait(job, "COMPLETED")
    for name, folder in ways.items():
        assert_same(folder / "runs/it", whole(ranks[name]))
    after = states(slurm)
    assert [after[job] for job in after.keys() - before.keys()] == ["COMPLETED"] * len(ways)
