"""A recipe whose builder gets the rank: each rank reads its own shards, and goes on in them after a SIGKILL."""

from __future__ import annotations

from pathlib import Path

from helpers.commands import Dtrain
from safetensors.torch import load_file

from dtrain.checkpoint.locate import find_good
from dtrain.checkpoint.weights import WEIGHTS
from dtrain.rundir.history import read_history

TIMES = ["seconds", "samples_per_second"]
SAMPLES = [5 + 3 + 4, 8 + 10]  # of each rank: 4 and 6 batches of 3


def test_ranks_go_on_in_their_own_shards_after_a_sigkill(dtrain: Dtrain, recipes: Path) -> None:
    words = ("train", recipes / "streams.py", "epochs=3", "kill=1:9", "every_steps=1", "asynchronous=false")
    ranks = ("-n", 2, "--cpu")
    (dtrain.folder / "killed").touch()
    whole = dtrain(*words, *ranks, "run.name=whole")
    assert whole.code == 0, whole.err
    assert [done(dtrain, rank) for rank in range(2)] == [[18, 3 * n] for n in SAMPLES], "each reads its part alone"
    assert "reads all of the" not in whole.err
    (dtrain.folder / "killed").unlink()
    assert dtrain(*words, *ranks, "run.name=killed").code == 1
    other = dtrain(*words, "run.name=killed")
    assert other.code == 2
    assert "the run had 2 ranks and now has 1" in other.err
    assert "Start 2 ranks" in other.err
    last = dtrain(*words, *ranks, "run.name=killed")
    assert last.code == 0, last.err
    # Of the second epoch's six batches two were done (and the next one was read, which counts again).
    assert [done(dtrain, rank) for rank in range(2)] == [[10, n - 6 + n] for n in SAMPLES], "what was left"
    for name in ("history", "weights"):
        one, two = (read(dtrain.folder / "runs" / run, name) for run in ("whole", "killed"))
        assert one == two, name


def done(dtrain: Dtrain, rank: int) -> list[int]:
    """The train steps and reads of the process that was the rank last."""
    return [int(number) for number in (dtrain.folder / f"done-{rank}").read_text().split()]


def read(run: Path, name: str) -> object:
    if name == "history":
        return read_history(run / "history.csv").drop(columns=TIMES).to_dict()
    found = find_good(run / "checkpoints")
    return {key: value.tolist() for key, value in load_file(found.saved.path / WEIGHTS).items()}
