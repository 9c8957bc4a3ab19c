"""How long it takes until something happens, and how much memory that takes, beside programs without dtrain.

    python tests/bench/startup.py [--pairs 5]

- `dtrain --help` against `accelerate launch --help`;
- `dtrain train` to the first train step against a bare script that imports torch and pandas and trains;
- `dtrain train -n 2` to the first step against `accelerate launch --multi_gpu --num_processes 2` of such a script;
- peak memory of `dtrain train` over that of the bare script, on one rank.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BIN = Path(sys.executable).parent

DATA = """
import os, time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

x = torch.randn(512, 64)
data = TensorDataset(x, x[:, :1])
loss_func = nn.MSELoss()

def first_step():
    path = os.environ["FIRST_STEP"]
    if not os.path.exists(path):
        with open(path, "w") as file:
            file.write(str(time.time()))
"""
RECIPE = (
    DATA
    + """
def build_model():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))

def build_dataloaders():
    return DataLoader(data, batch_size=32, shuffle=True), DataLoader(data, batch_size=32)

def build_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)

def train_step(model, features, labels):
    first_step()
    return loss_func(model(features), labels)

def valid_step(model, features, labels):
    return loss_func(model(features), labels)
"""
)
BARE = (
    DATA
    + """
import pandas as pd

model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
loader, valid = DataLoader(data, batch_size=32, shuffle=True), DataLoader(data, batch_size=32)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
if "WORLD_SIZE" in os.environ:
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader, valid = accelerator.prepare(model, optimizer, loader, valid)
rows = []
for features, labels in loader:
    first_step()
    optimizer.zero_grad()
    loss = loss_func(model(features), labels)
    loss.backward()
    optimizer.step()
    rows.append(loss.item())
with torch.no_grad():
    for features, labels in valid:
        rows.append(loss_func(model(features), labels).item())
pd.DataFrame({"loss": rows}).to_csv("history.csv")
"""
)


def timed(argv: list[str], folder: Path) -> dict[str, float]:
    """Runs a command; returns its seconds, those until the first train step, and its peak memory in MB."""
    mark = folder / "first_step"
    mark.unlink(missing_ok=True)
    began = time.time()
    process = subprocess.Popen(
        argv,
        cwd=folder,
        env={**os.environ, "FIRST_STEP": str(mark)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    told = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(argv)} failed:\n{told.decode()}")
    found = {"seconds": time.time() - began, "memory": usage.ru_maxrss / 1024}
    return found | ({"first step": float(mark.read_text()) - began} if mark.exists() else {})


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    pairs = parser.parse_args().pairs
    dtrain, accelerate = [str(BIN / "dtrain")], [str(BIN / "accelerate"), "launch"]
    two = ["--multi_gpu", "--num_processes", "2", "bare.py"]
    rows = [
        ("--help", "seconds", [*dtrain, "--help"], [*accelerate, "--help"]),
        ("1 rank", "first step", [*dtrain, "train", "recipe.py", "epochs=1"], [sys.executable, "bare.py"]),
        ("1 rank", "memory", [*dtrain, "train", "recipe.py", "epochs=1"], [sys.executable, "bare.py"]),
        ("2 ranks", "first step", [*dtrain, "train", "recipe.py", "epochs=1", "-n", "2", "--cpu"], [*accelerate, *two]),
    ]
    print(f"{'what':<22}{'dtrain':>10}{'the other':>12}{'ratio':>8}  medians of {pairs} pairs")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipe.py").write_text(RECIPE)
        (folder / "bare.py").write_text(BARE)
        for what, figure, ours, theirs in rows:
            found = [(timed(ours, folder)[figure], timed(theirs, folder)[figure]) for _ in range(pairs)]
            mine, other = (statistics.median(column) for column in zip(*found, strict=True))
            ratio = statistics.median(one / two for one, two in found)
            unit = "MB" if figure == "memory" else "s"
            label = f"{what}, {figure}" if figure != "seconds" else what
            print(
                f"{label:<22}{mine:>8.2f} {unit}{other:>10.2f} {unit}{ratio:>8.2f}  ({mine - other:+.2f} {unit})",
                flush=True,
            )


if __name__ == "__main__":
    main()
