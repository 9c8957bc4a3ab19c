"""Runs that are sent to a SLURM, and what tests look at afterwards."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import load_file

from dtrain.rundir.history import read_history
from dtrain.rundir.job_record import JobRecord, read_record
from helpers.cluster import Cluster, Job
from helpers.running import wait_for

RECIPES = Path(__file__).parents[1] / "recipes"
TEMPLATES = Path(__file__).parents[2] / "slurm"
# Short, with all that a resumed run must get right: shuffle, dropout, AdamW.
WORDS = ("epochs=3", "data.n_train=160", "model.pause=0", "checkpoint.every_steps=4", "run.name=it")
TIMES = ["seconds", "samples_per_second"]
NO_GPU = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


@dataclass
class Queued:
    """A run that is sent to a cluster, from a folder of its own.

    Attributes:
        slurm: where it goes.
        folder: that from which it is sent.
        job: its job, once it is sent.
    """

    slurm: Cluster
    folder: Path
    job: str = field(default="", init=False)

    def submit(self, *words: object, recipe: str = "long.py", slow: float = 0.0, **env: str) -> Queued:
        """Sends it by `dtrain submit`: 2 nodes with a rank each, where no word says otherwise."""
        self.folder.mkdir(parents=True, exist_ok=True)
        common = ("--cpu", "--nodes", 2, "--time", "10", "--no-check")
        done = self.slurm.dtrain("submit", RECIPES / recipe, *common, *words, cwd=self.folder, SLOW=str(slow), **env)
        assert done.code == 0, done.text
        found = re.search(r"submitted: job (\d+)", done.out)
        assert found is not None, done.text
        self.job = found[1]
        return self

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "runs/it"

    @property
    def record(self) -> JobRecord:
        """What its folder says of its job."""
        record = read_record(self.run)
        assert record is not None
        return record

    @property
    def checkpoints(self) -> list[str]:
        """The names of its checkpoints, the oldest first."""
        found = [path.name for path in (self.run / "checkpoints").glob("epoch-*")]
        return sorted(found, key=lambda name: [float(part or "inf") for part in f"{name}-step-".split("-")[1:4:2]])

    def until(self, *files: str, checkpoint: bool = False) -> None:
        """Waits until its ranks have left some files, and perhaps a checkpoint of an epoch's midst."""

        def there() -> bool:
            now = self.slurm.job(self.job)
            assert not now.over, self.slurm.account(now, f"at {files}")
            saved = not checkpoint or any("step" in name for name in self.checkpoints)
            return saved and all((self.folder / file).exists() for file in files)

        wait_for(there, f"job {self.job}: {files}")

    def at_work(self, *, checkpoint: bool = False) -> None:
        """Waits until both its ranks take steps."""
        self.until("train-0", "train-1", checkpoint=checkpoint)

    def go(self) -> None:
        """Lets it go on without pauses."""
        (self.folder / "go").touch()

    def wait(self, *states: str, seconds: float = 150, restarts: int = 0) -> Job:
        """Waits for its job to be in one of some states."""
        return self.slurm.wait(self.job, *states, seconds=seconds, restarts=restarts)


def outcome(run: Path) -> tuple[pd.DataFrame, dict[str, bytes]]:
    """A run's history and all that its last checkpoint holds, but for how long things took."""
    last = max((run / "checkpoints").glob("epoch-?"))
    tensors = {
        f"{name}/{key}": tensor.numpy().tobytes()
        for name in ("model", "state", "ranks")
        for key, tensor in load_file(last / f"{name}.safetensors").items()
    }
    structure: dict[str, Any] = json.loads((last / "state.json").read_text())
    pairs = [pair for pair in structure["dict"] if pair[0] not in ("seconds", "rows")]
    return read_history(run).drop(columns=TIMES), {**tensors, "structure": json.dumps(pairs).encode()}


def assert_same(one: Path, two: Path) -> None:
    """Compares two runs bit by bit."""
    (history, state), (other_history, other_state) = outcome(one), outcome(two)
    pd.testing.assert_frame_equal(history, other_history, check_exact=True)
    assert [name for name in state.keys() | other_state.keys() if state.get(name) != other_state.get(name)] == []
