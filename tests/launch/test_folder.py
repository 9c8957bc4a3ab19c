"""A run in a folder that others can write to, by its command: links, secrets, another working directory, a lost history."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from helpers.commands import Dtrain

RECIPE = """
import os
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

secrets = ["data.dsn"]

def build_model(): return nn.Linear(2, 1)

def build_dataloaders(token: str, dsn: str):
    assert (token, dsn) == ("hush-token", "hush-dsn")
    data = TensorDataset(torch.randn(16, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(16, 1))
    return DataLoader(data, 8), None

def build_optimizer(model): return torch.optim.SGD(model.parameters(), lr=0.1)

def train_step(model, x, y):
    os.chdir("/")
    with open("/proc/self/cmdline", "rb") as file:
        assert b"hush" not in file.read() or "RANK" not in os.environ
    return nn.functional.mse_loss(model(x), y)
"""


def holders(folder: Path, text: bytes) -> list[str]:
    """The files that hold a text, but for the copy of the recipe, which has it in an assert."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "mine.py")
    return sorted(str(path.relative_to(folder)) for path in files if text in path.read_bytes())


def test_a_run_where_others_can_write(dtrain: Dtrain) -> None:
    folder = dtrain.folder
    (folder / "mine.py").write_text(RECIPE)
    (folder / "victim").write_text("mine")
    run = folder / "runs/x"
    run.mkdir(parents=True)
    (run / "starts.jsonl").symlink_to(folder / "victim")
    words = ["train", "mine.py", "run.name=x", "data.token=hush-token", "dsn=hush-dsn", "track.tensorboard=true"]
    done = dtrain(*words, "epochs=2", "-n", "2", "--cpu")
    assert done.code == 0, done.text
    assert "starts.jsonl: a line could not be written: it is a symbolic link, which is not followed" in done.text
    assert "hush" not in done.text
    assert (folder / "victim").read_text() == "mine"
    assert holders(run, b"hush-") == ["secrets.json"]
    assert (run / "secrets.json").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in folder.iterdir()) == ["mine.py", "runs", "victim"]

    (run / "history.csv").unlink()
    (run / "history.csv").symlink_to(folder / "victim")
    done = dtrain("train", "--resume", "runs/x", "epochs=3", "checkpoint.change_ranks=true", "--cpu")
    assert done.code == 0, done.text
    assert "was modified: it is now history-1.csv" in done.text
    with (run / "history.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]
    assert not (run / "history.csv").is_symlink()
    assert (folder / "victim").read_text() == "mine"
    shown = dtrain("history", "--json")
    assert json.loads(shown.out)[0]["state"] == "damaged"
    assert [path.name for path in run.iterdir() if path.name.startswith((".owner", "owner"))] == []


MOVES_ITSELF = """
import os
import time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def build_model(): return nn.Linear(2, 1)

def build_dataloaders():
    data = TensorDataset(torch.randn(16, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(16, 1))
    return DataLoader(data, 8), None

def build_optimizer(model): return torch.optim.SGD(model.parameters(), lr=0.1)

def train_step(model, x, y):
    return nn.functional.mse_loss(model(x), y)

def before_epoch(epoch):
    if epoch == 2 and os.environ.get("RANK", "0") == "0":
        limit = time.monotonic() + 60
        while not os.path.exists("runs/x/checkpoints/epoch-1") and time.monotonic() < limit:
            time.sleep(0.01)  # it is written beside training
        os.rename("runs/x", "runs/elsewhere")
        os.mkdir("runs/x")
"""


@pytest.mark.parametrize("words", [("-n", "1"), ("-n", "2", "--cpu"), ("--no-supervisor",)])
def test_nothing_is_written_into_a_folder_that_was_put_in_the_place_of_the_runs(
    dtrain: Dtrain, words: tuple[str, ...]
) -> None:
    (dtrain.folder / "mine.py").write_text(MOVES_ITSELF)
    done = dtrain("train", "mine.py", "run.name=x", "epochs=4", *words)
    assert done.code == 1, done.text
    assert "was removed, moved or replaced during training. Nothing more is written." in done.text
    assert list((dtrain.folder / "runs/x").iterdir()) == []
    assert (dtrain.folder / "runs/elsewhere/checkpoints/epoch-1").is_dir()
