"""A run whose job is ended before its time goes on in the next start, to the same end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.cluster import Cluster
from helpers.queued import WORDS, Queued, assert_same
from helpers.wandb_files import wandb_rows

from dtrain import read_history

WANDB = ("track.wandb.project=mine", "track.wandb.mode=offline")


@pytest.mark.timeout(400)
def test_three_starts_under_a_time_limit_are_one_run(queued: Queued, whole: Callable[[int], Path]) -> None:
    """SLURM looks at limits every 30 s, and so asks up to so much earlier than --stop-before says."""
    queued.submit(*WORDS, *WANDB, "--time", "1", "--stop-before", 15, slow=0.7)
    queued.wait("RUNNING", restarts=2, seconds=180)
    queued.go()
    job = queued.wait("COMPLETED")
    assert_same(queued.run, whole(2))
    starts = queued.record.incarnations
    assert [one.code for one in starts] == [75] * job.restarts + [0], starts
    begun = [one.progress for one in starts]
    assert begun == sorted(set(begun)), f"each start went on where the one before had come to: {begun}"
    assert job.text.count("stopped before the time limit") == job.restarts
    assert "TIME LIMIT" not in job.text, "the limit itself was never reached"
    parts = sorted((queued.run / "wandb").glob("offline-run-*"))
    assert len(parts) == len(starts)
    assert len({part.name.rpartition("-")[2] for part in parts}) == 1, "one run of W&B's"
    sent = [row for part in parts for row in wandb_rows(next(part.glob("run-*.wandb")))]
    assert [row for row in sent if "epoch" in row] == [
        pytest.approx(row) for row in read_history(queued.run).to_dict("records")
    ]


@pytest.mark.timeout(400)
def test_a_lost_node_takes_no_more_than_the_steps_since_the_last_checkpoint(
    slurm: Cluster, tmp_path: Path, whole: Callable[[int], Path]
) -> None:
    """The one with the batch script, and another one."""
    runs = [Queued(slurm, tmp_path / name) for name in ("first", "second")]
    for run, way in zip(runs, ([], ["--per-rank"]), strict=True):
        run.submit(*WORDS, *way, slow=0.3)
    lost = []
    for run, place in zip(runs, (0, 1), strict=True):
        run.at_work(checkpoint=True)
        nodes = slurm.told("scontrol", "show", "hostnames", slurm.job(run.job).nodes).split()
        assert len(nodes) == 2
        lost.append(nodes[place])
    assert len(set(lost)) == 2
    for name in lost:
        slurm.power_off(name)
    for run in runs:
        run.wait("PENDING", "RUNNING", seconds=150, restarts=1)
        run.go()
    for name in lost:
        slurm.power_on(name)
    for run in runs:
        job = run.wait("COMPLETED", seconds=150)
        assert job.restarts == 1
        assert "resuming from runs/it/checkpoints/epoch-" in job.text
        assert_same(run.run, whole(2))


def test_a_job_that_is_preempted_saves_and_comes_back(queued: Queued, whole: Callable[[int], Path]) -> None:
    queued.submit(*WORDS, "checkpoint.every_steps=null", slow=0.3)
    queued.at_work()
    urgent = queued.slurm.sbatch(
        "--partition=urgent", "--nodes=4", "--exclusive", "--output=none", "--wrap=sleep 1", cwd=queued.folder
    )
    queued.slurm.wait(urgent, "COMPLETED", seconds=150)
    queued.go()
    job = queued.wait("COMPLETED", seconds=150)
    assert job.restarts == 1
    assert "stopped on request (SIGTERM), in epoch 1" in job.text
    assert "resuming from runs/it/checkpoints/epoch-1-step-" in job.text
    assert_same(queued.run, whole(2))
