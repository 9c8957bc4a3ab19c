"""`--retries`: the whole job starts again, and the run resuming from its last checkpoint, in the same folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.commands import Dtrain


@pytest.mark.parametrize(("ranks", "fault"), [(1, "kill"), (2, "raise")])
def test_a_run_goes_on_after_a_rank_failed(dtrain: Dtrain, recipes: Path, ranks: int, fault: str) -> None:
    """The recipe counts its steps anew in each process: the attempt that begins in epoch 2 does not come to the fault."""
    words = ["train", recipes / "faults.py", "--cpu", "epochs=2", f"length={16 * ranks}", "asynchronous=false"]
    where = [f"model.fault={fault}", f"model.rank={ranks - 1}", "model.epoch=2", "model.step=2"]
    done = dtrain(*words, *where, *(["-n", ranks] if ranks > 1 else []), "--retries", 1)
    assert done.code == 0, done.text
    assert "dtrain: attempt 1 failed; retrying in 1 s." in done.err
    folder = dtrain.run_folder()  # there is one, although run.name was left to the time of the start
    assert f"resuming from {folder.relative_to(dtrain.folder)}/checkpoints/epoch-1" in done.out
    assert [line.split(",")[0] for line in (folder / "history.csv").read_text().splitlines()] == ["epoch", "1", "2"]
    assert not (folder / "failure.json").exists()
    told = json.loads((folder / "failure-1.json").read_text())
    assert (told["rank"], told["epoch"], told["step"]) == (ranks - 1, 2, 2)


def test_it_is_given_up_without_progress_and_never_tried_for_bad_usage(dtrain: Dtrain, recipes: Path) -> None:
    words = ["train", recipes / "small.py", "--cpu", "run.name=it"]
    done = dtrain(*words, "model.fault=raise-in-valid", "--retries", 1)
    assert done.code == 1, done.text
    assert done.err.count("ValueError: a fault in validation") == 2
    assert "giving up after 2 failures without progress" in done.err
    assert (dtrain.folder / "runs/it/failure.json").exists()
    assert (dtrain.folder / "runs/it/failure-1.json").exists()
    bad = dtrain(*words, "model.width=wide", "--retries", 3)
    assert bad.code == 2
    assert "attempt" not in bad.err
    other = dtrain(*words, "--retries", 3, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    assert other.code == 2
    assert "--retries: this rank was started by another launcher" in other.err
