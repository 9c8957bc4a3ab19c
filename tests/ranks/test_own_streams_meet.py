"""Streams of each rank's own where they meet other things: prediction, supplied lengths, BatchNorm, a script's run."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import clean_environment
from helpers.ranks import run_ranks, write_once
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import dtrain
from dtrain.config import load_settings
from dtrain.engine.options import RunOptions
from dtrain.engine.predict import predict
from dtrain.errors import UsageError
from dtrain.trainer.setup import load_task
from dtrain.trainer.train import train_run

RECIPE = """
from types import SimpleNamespace
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, IterableDataset


class Part(IterableDataset):
    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def __iter__(self):
        return (torch.tensor([float(i), 1.0]) for i in range(self.rank, 24, self.size))


class Sized(Part):
    def __len__(self):
        return len(range(self.rank, 24, self.size))


def build_model():
    return nn.Linear(2, 1)


def build_dataloaders(rank, world_size, kind: str = "split"):
    data = (Sized if kind == "sized" else Part)(rank, world_size)
    if kind == "split":  # as Hugging Face's split_dataset_by_node does
        data._distributed = SimpleNamespace(rank=rank, world_size=world_size)
    return DataLoader(data, 2), None


def build_optimizer(model, lr: float = 0.001, total_steps=None):
    model.told = total_steps
    return optim.SGD(model.parameters(), lr=lr)


def train_step(model, x):
    return model(x).square().mean()
"""


def supplied(world: Any) -> list[Any]:
    folder = Path(world.gather_json(tempfile.mkdtemp())[0])
    recipe = write_once(folder / "own.py", RECIPE, world)
    found = []
    for name, words in {"a": ["epochs=2", "kind=sized"], "b": ["epochs=2", "kind=split"], "c": ["max_steps=3"]}.items():
        settings = load_settings(str(recipe), [f"run.dir={folder}", f"run.name={name}", *words], {})
        found.append(load_task(settings).module.told)  # type: ignore[union-attr]
        train_run(settings, world)
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_a_rank_s_own_part_does_not_say_how_long_the_run_is(size: int) -> None:
    """Neither by its length, of which dtrain has no half to take, nor is a split for rank 1 another one than its own."""
    assert run_ranks(supplied, size) == [[24 if size == 1 else None, None, 3]] * size


class Part(IterableDataset):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def __iter__(self) -> Any:
        return (torch.tensor([float(i)]) for i in range(self.rank, 12, self.size))


class Own(IterableDataset):
    sharded_by_rank = True

    def set_rank(self, rank: int, world_size: int) -> None:
        self.rank = rank

    def __iter__(self) -> Any:
        return iter(torch.randn(3 + 4 * self.rank, 3, generator=torch.Generator().manual_seed(self.rank)))


def refused(world: Any) -> list[Any]:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    net, loader = dtrain.prepare(net, DataLoader(Own(), 2))
    found: list[Any] = []
    try:
        predict(nn.Identity(), DataLoader(Part(world.rank, world.size), 2), world, RunOptions(data_sharding="loader"))
    except UsageError as error:
        found.append(str(error))
    net.eval()
    with torch.no_grad():
        try:
            for batch in loader:
                net(batch)
        except UsageError as error:
            found.append(str(error))
    return found


def test_what_own_streams_cannot_have_is_refused() -> None:
    """Half of the predictions were left out, and loops over unequal parts waited for each other's BatchNorm."""
    for first, second in run_ranks(refused, 2, timeout=60):
        assert first.startswith("the predict loader shards itself by rank")
        assert second.startswith("1: BatchNorm with track_running_stats=False") and "sharded_by_rank = False" in second


SCRIPT = """
import os, signal, sys
import torch
from torch.utils.data import DataLoader, IterableDataset
import dtrain


class Stream(IterableDataset):
    def __init__(self, n):
        self.n, self.at, self.start = n, 0, 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.start = state["at"]

    def __iter__(self):
        self.at, self.start = self.start, 0
        while self.at < self.n:
            self.at += 1
            yield torch.tensor([float(self.at)])


torch.manual_seed(0)
net = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.001)
net, train, valid = dtrain.prepare(net, DataLoader(Stream(9), 2), DataLoader(Stream(7), 2), cpu=True)
run, steps = dtrain.run(sys.argv[1], net, optimizer, config={"checkpoint.every_steps": 1}), 0
for epoch in run.epochs(3):
    meter = dtrain.Meter()
    net.train()
    for x in train:
        optimizer.zero_grad()
        (net(x) - 1).square().mean().backward()
        optimizer.step()
        steps += 1
        if steps == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
    net.eval()
    with torch.no_grad():
        for x in valid:
            meter.add(loss=(net(x) - 1).square().mean())
    run.history.append({"epoch": epoch, **meter.means()})
print(run.history.rows)
"""


def test_a_resumed_script_reads_a_validation_stream_with_a_state_from_its_start(tmp_path: Path) -> None:
    """Its state is that of its end, of which the pass must begin anew."""
    script = tmp_path / "loop.py"
    script.write_text(SCRIPT)

    def start(run: str, steps: int) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, str(script), str(tmp_path / run), str(steps)]
        return subprocess.run(words, capture_output=True, text=True, env=clean_environment(), timeout=120, check=False)

    whole = start("whole", 0)
    assert start("killed", 7).returncode == -signal.SIGKILL  # in the second epoch
    resumed = start("killed", 0)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.splitlines()[-1] == whole.stdout.splitlines()[-1]
