"""`dtrain bench` on the GPU: what it counts, its share of the card, launches, and trials with their gains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RECIPE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def build_model():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def build_dataloaders(num_workers: int = 0):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(4096, 64), torch.randint(10, (4096,)))
    return DataLoader(data, 32, shuffle=True, num_workers=num_workers), None


def build_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def train_step(model, x, y, reads: bool = False):
    loss = nn.functional.cross_entropy(model(x), y)
    return {"loss": loss, "told": loss.item() if reads else loss.detach()}
"""


def bench(folder: Path, device: torch.device, *words: str) -> tuple[str, dict[str, Any]]:
    (folder / "recipe.py").write_text(RECIPE)
    line = [sys.executable, "-m", "dtrain", "bench", "recipe.py", *words, "--json", "out.json"]
    line += ["--cpu"] if device.type == "cpu" else []
    done = subprocess.run(
        line, cwd=folder, env={**os.environ}, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "out.json").read_text())["1"]


def test_bench_tries_what_helps_here(tmp_path: Path, device: torch.device, note: Callable[..., None]) -> None:
    text, found = bench(tmp_path, device, "num_workers=2")
    assert found["reads"] == {}, "what AdamW reads are its own counts, on the CPU"
    assert "reads values of tensors" not in text
    assert "compute: " in text
    tried = {one["name"]: one for one in found["trials"]}
    assert {"num_workers=0", "fused=True", "batch_size=64"} <= tried.keys()
    assert tried["num_workers=0"]["tried"], "it was tried"
    if device.type == "cuda":
        (line,) = [line for line in text.splitlines() if line.startswith("  num_workers=0")]
        assert "times as fast" in line, text
        assert 0 < found["device_seconds"] < found["enqueue_seconds"], "a tiny step is all launches"
        assert "precision=bf16" in tried
        (launches,) = [line for line in text.splitlines() if line.startswith("launches: ")]
        note("bench, tiny MLP", launches)
    for line in text.splitlines():
        if line.startswith(("  num_workers", "  fused", "  cuda_graph", "  batch_size", "  precision", "compute: ")):
            note("bench, tiny MLP with num_workers=2", line.strip())


def test_bench_names_the_line_of_a_read(tmp_path: Path, device: torch.device, note: Callable[..., None]) -> None:
    text, found = bench(tmp_path, device, "step.reads=true", "--no-trials")
    line = 1 + next(n for n, one in enumerate(RECIPE.splitlines()) if ".item()" in one)
    assert found["reads"] == {f"recipe.py:{line} (item)": 1.0}
    assert (f"recipe.py:{line} (item) 1 times" in text) == (device.type == "cuda")
    assert found["enqueue_seconds"] is None, "it waits for the GPU"
    note("bench names the line of an .item()", "yes")
