"""What ends a job for good: a person's word, or a fault that another start would not mend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from helpers.cluster import Cluster
from helpers.queued import WORDS, Queued, assert_same
from helpers.running import wait_for

SECONDS = 15  # from a rank's end to that of the whole job


def test_a_person_ends_it_with_a_checkpoint(slurm: Cluster, tmp_path: Path, whole: Callable[[int], Path]) -> None:
    """By scancel, by the file STOP, and by `dtrain cancel`, after which it can be gone on with."""
    runs = {name: Queued(slurm, tmp_path / name) for name in ("scancel", "stop", "cancel")}
    for name, run in runs.items():
        way = ["--per-rank"] if name == "cancel" else []
        run.submit(*WORDS, "checkpoint.every_steps=null", *way, slow=0.3)
    for run in runs.values():
        run.at_work()
    slurm.told("scancel", runs["scancel"].job)
    (runs["stop"].run / "STOP").touch()
    done = slurm.dtrain("cancel", runs["cancel"].job, cwd=runs["cancel"].folder)
    assert done.code == 0, done.text
    for name, run in runs.items():
        job = run.wait("CANCELLED")
        assert job.restarts == 0
        (saved,) = run.checkpoints
        assert saved.startswith("epoch-1-step-"), f"{name}: {job.text}"
        assert not (run.run / "failure.json").exists()
    last = runs["cancel"]
    last.go()
    done = slurm.dtrain("requeue", last.job, cwd=last.folder)
    assert done.code == 0, done.text
    last.wait("COMPLETED")
    assert_same(last.run, whole(2))


FAULT = ("epochs=2", "run.name=it", "model.rank=1", "model.epoch=2", "model.step=2")


def test_a_fault_of_the_users_code_and_a_killed_rank_end_all_at_once(slurm: Cluster, tmp_path: Path) -> None:
    cases = {"code": ["model.fault=raise"], "killed": ["model.fault=kill"], "task": ["model.fault=kill", "--per-rank"]}
    runs = {}
    for name, words in cases.items():
        mark = f"model.mark={tmp_path}/{name}.time"
        runs[name] = Queued(slurm, tmp_path / name).submit(*FAULT, mark, *words, recipe="faults.py")
    for run in runs.values():
        assert run.wait("FAILED", seconds=150).restarts == 0
    for name, run in runs.items():
        wait_for(lambda run=run: run.record.incarnations[0].ended, f"the first start of {name} to end", 90)
        ended = run.record.incarnations[0].ended
        assert ended is not None
        assert ended - float((tmp_path / f"{name}.time").read_text()) < SECONDS
    logs = slurm.dtrain("logs", runs["code"].job, cwd=runs["code"].folder)
    assert logs.code == 0, logs.text
    assert "ZeroDivisionError" in logs.text and "rank 1" in logs.text, logs.text


def test_starts_without_progress_come_to_an_end(queued: Queued) -> None:
    queued.submit(*WORDS, "--requeues", 1, "model.setup=3")
    for start in range(2):
        queued.wait("RUNNING", seconds=150, restarts=start)
        queued.until("setup-0", "setup-1")
        for rank in range(2):
            (queued.folder / f"setup-{rank}").unlink()
        queued.slurm.told("scancel", "--batch", "--signal=USR1", queued.job)
        if start == 0:
            queued.wait("PENDING", "RUNNING", restarts=1)
    job = queued.wait("FAILED", restarts=1)
    assert job.restarts == 1
    assert "giving up: 2 starts in a row without a new epoch or checkpoint" in job.text
