"""An array of runs, and what tells of it, with SLURM's accounting and without."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cluster import Cluster, Plan, cluster, missing, need
from helpers.commands import BIN
from helpers.queued import RECIPES
from helpers.running import wait_for

from dtrain.rundir.history import read_history
from dtrain.rundir.job_record import JobAttempt, read_record

WORDS = ("epochs=12", "data.n_train=16", "model.pause=0", "run.name=grid")
EPOCHS, CANCELLED = 12, (1, 5)


@pytest.fixture(params=[False, True], ids=["without-accounting", "with-accounting"])
def either(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    if not request.param:
        yield request.getfixturevalue("slurm")
        return
    need(missing(accounting=True))
    with cluster(Plan(nodes=2, accounting=True)) as made:
        yield made


def test_six_runs_two_at_once(either: Cluster, tmp_path: Path) -> None:
    grid = ("--array", "lr=0.01,0.02 seed=1,2,3", "--at-once", 2)
    common = ("--cpu", "-n", 1, "--time", "10", "--no-check", "--stop-before", 60)
    done = either.dtrain("submit", RECIPES / "long.py", *WORDS, *grid, *common, cwd=tmp_path, SLOW="0.3")
    found = re.search(r"submitted: job (\d+)", done.out)
    assert found is not None, done.text
    job = found[1]
    runs = [tmp_path / f"runs/grid-{number}" for number in range(6)]
    wait_for(lambda: all((run / "history.csv").exists() for run in runs[:2]), "both to have a row")
    check_shown_as_they_run(either, job, tmp_path)
    follower = either.start(BIN / "dtrain", "logs", f"{job}_0", "-f", cwd=tmp_path)
    try:
        for number in CANCELLED:
            done = either.dtrain("cancel", f"{job}_{number}", cwd=tmp_path)
            assert done.code == 0, done.text
        either.wait(f"{job}_1", "CANCELLED")
        (tmp_path / "go").touch()
        followed, _ = follower.communicate(timeout=120)
    finally:
        follower.kill()
        follower.communicate()
    assert follower.returncode == 0
    assert [f"EPOCH = {epoch}," in followed for epoch in (1, EPOCHS)] == [True, True], followed
    for number in (0, 2, 3, 4):  # of 5, which never began, SLURM itself knows no more
        either.wait(f"{job}_{number}", "COMPLETED", seconds=150)
    check_over(either, job, runs, tmp_path)


def check_shown_as_they_run(slurm: Cluster, job: str, folder: Path) -> None:
    lines = shown(slurm, folder, job)
    assert ["RUNNING" in line for line in lines] == [True, True, False, False, False, False], lines
    assert all(re.search(r"\b\d+/12\b", line) and "loss" in line for line in lines[:2]), lines
    assert all("PENDING" in line and "JobArrayTaskLimit" in line for line in lines[2:]), lines


def shown(slurm: Cluster, folder: Path, job: str) -> list[str]:
    """What `dtrain jobs` says of each task, in their order."""
    done = slurm.dtrain("jobs", cwd=folder)
    assert done.code == 0, done.text
    lines = [line for line in done.out.splitlines() if re.search(rf"\b{job}_\d\b", line)]
    assert len(lines) == 6, done.text
    return sorted(lines, key=lambda line: line[line.index(f"{job}_") :])


def check_over(slurm: Cluster, job: str, runs: list[Path], folder: Path) -> None:
    complete = [run for number, run in enumerate(runs) if number not in CANCELLED]
    assert [len(read_history(run)) for run in complete] == [EPOCHS] * len(complete)
    rates = [re.search(r"lr: ([0-9.]+)", (run / "config.yaml").read_text()) for run in complete]
    assert [rate and rate[1] for rate in rates] == ["0.01", "0.01", "0.02", "0.02"]
    assert list((runs[1] / "checkpoints").glob("epoch-*")), "what ran was saved"
    assert not (runs[5] / "checkpoints").exists(), "it never began"
    assert most_at_once(complete) == 2
    lines = shown(slurm, folder, job)
    # What SLURM has forgotten is told in small letters, by the run's own folder.
    assert ["CANCELLED" in line.upper() for line in lines] == [number in CANCELLED for number in range(6)], lines
    assert sum("COMPLETED" in line for line in lines) == 4, lines


def most_at_once(runs: list[Path]) -> int:
    """How many runs' jobs were there at the same time."""
    spans: list[JobAttempt] = []
    for run in runs:
        record = read_record(run)
        assert record is not None
        spans += record.incarnations
    ends = [one.ended for one in spans if one.ended is not None]
    assert len(ends) == len(spans)
    begins = [one.started for one in spans]
    return max(sum(begin <= at < end for begin, end in zip(begins, ends, strict=True)) for at in begins)
