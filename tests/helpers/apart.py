"""A recipe whose ranks do something besides from the fifth step on, and leave word of where they are."""

from __future__ import annotations

import json
from pathlib import Path

import psutil

RECIPE = """
import os, pathlib, signal, time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

RANK = int(os.environ.get("RANK", 0))

def build_model():
    return nn.Linear(4, 1)

def build_dataloaders(workers: int = 0):
    x = torch.randn(256, 4)
    loader = DataLoader(TensorDataset(x, x[:, :1]), batch_size=8, num_workers=workers, persistent_workers=workers > 0)
    return loader, DataLoader(TensorDataset(x, x[:, :1]), batch_size=8)

def build_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)

steps = [0]

def train_step(model, x, y):
    steps[0] += 1
    if steps[0] == 5:
        pathlib.Path(f"trainer-{RANK}.part").write_text(str(os.getpid()))
        os.rename(f"trainer-{RANK}.part", f"trainer-{RANK}")
    if steps[0] >= 5:
        {then}
    return ((model(x) - y) ** 2).mean()

def valid_step(model, x, y):
    return ((model(x) - y) ** 2).mean()
"""
STUCK = "time.sleep(600)"


def write_recipe(folder: Path, then: str) -> None:
    """Writes recipe.py; `then` is what each rank does, whose number is RANK."""
    (folder / "recipe.py").write_text(RECIPE.replace("{then}", then))


def trainer(folder: Path, rank: int) -> psutil.Process:
    """The process that trains as a rank, which is in its fifth step by now."""
    return psutil.Process(int((folder / f"trainer-{rank}").read_text()))


def failure(folder: Path) -> list[object]:
    """Rank, local rank and cause in failure.json."""
    found = json.loads((folder / "runs/one/failure.json").read_text())
    return [found[name] for name in ("rank", "local_rank", "cause")]
