"""Builders that take total_steps, steps_per_epoch, epochs or world_size get what the run will really do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks, write_once

from dtrain.config import load_settings
from dtrain.distributed.world import World, bring_up
from dtrain.errors import AgreedError
from dtrain.trainer.train import train_run

RECIPE = """
import json
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset


class Stream(IterableDataset):
    def __iter__(self):
        yield from torch.ones(20, 1)


got, steps = {{}}, []


def build_model(world_size, width: int = 1):
    got["model"] = [world_size]
    return nn.Linear(1, width)


def build_dataloaders(n: int = 22, epochs: int | None = None):
    got["data"] = [epochs]
    return DataLoader({data}, batch_size=2), None


def build_optimizer(model, steps_per_epoch=None, lr: float = 0.1):
    got["optimizer"] = [steps_per_epoch]
    return torch.optim.SGD(model.parameters(), lr=lr)


def build_scheduler(optimizer, total_steps, epochs, world_size: int = 7):
    got["scheduler"] = [total_steps, epochs, world_size]
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=total_steps + 1), "step"


def train_step(model, x):
    return model(x).square().mean()


def after_epoch(run):
    got["taken"] = run.step


def after_train(run):
    with open(f"{{run.folder}}/got-{{run.rank}}.json", "w") as file:
        json.dump(got, file)
"""
MAP = "TensorDataset(torch.ones(n, 1))"


def start(folder: Path, *words: str, data: str = MAP, world: World | None = None) -> dict[str, Any]:
    write_once(folder / "supplied.py", RECIPE.format(data=data), world)
    how = [f"run.dir={folder}", "run.name=it", *words]
    world = world or bring_up(cpu=True)
    run = train_run(load_settings(str(folder / "supplied.py"), how, {}), world)
    found: dict[str, Any] = json.loads((run / f"got-{world.rank}.json").read_text())
    return found


def of_ranks(world: World, folder: str, words: list[str]) -> dict[str, Any]:
    return start(Path(folder), *words, world=world)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch", ["global", "per_rank"])
def test_they_are_the_steps_that_the_run_takes(tmp_path: Path, ranks: int, batch: str) -> None:
    words = ["epochs=3", f"train.batch={batch}", "train.accumulation=2"]
    each = -(-11 // (2 if batch == "global" else 2 * ranks))  # 11 batches of 2
    for got in run_ranks(of_ranks, ranks, folder=str(tmp_path), words=words):
        assert got["taken"] == 3 * each
        assert got["scheduler"] == [3 * each, 3, 7], "a default is a value"
        assert (got["optimizer"], got["model"], got["data"]) == ([each], [ranks], [3])


def test_a_limit_of_steps_counts(tmp_path: Path) -> None:
    got = start(tmp_path, "train.max_steps=13")
    assert (got["taken"], got["scheduler"][:2]) == (13, [13, 2])
    assert start(tmp_path, "run.name=b", "train.max_steps=13", "epochs=1")["scheduler"][:2] == [11, 1]
    assert start(tmp_path, "run.name=c", "limit_batches=4", "epochs=2")["scheduler"][:2] == [8, 2]


def test_epochs_that_max_steps_alone_leaves_open_are_asked_for(tmp_path: Path) -> None:
    assert start(tmp_path, "train.max_steps=13")["data"] == [None], "a default holds"
    text = RECIPE.format(data=MAP).replace("n: int = 22, epochs: int | None = None", "epochs: int, n: int = 22")
    (tmp_path / "needs.py").write_text(text)
    settings = load_settings(str(tmp_path / "needs.py"), [f"run.dir={tmp_path}", "train.max_steps=13"], {})
    told = r"takes epochs, which is not known: only train\.max_steps is set\..* or set train\.epochs"
    with pytest.raises(AgreedError, match=told):
        train_run(settings, bring_up(cpu=True))


def test_what_the_config_says_counts_first(tmp_path: Path) -> None:
    got = start(tmp_path, "scheduler.total_steps=99", "scheduler.world_size=3", "epochs=1")
    assert got["scheduler"] == [99, 1, 3]


def test_of_a_stream_only_a_limit_says_it(tmp_path: Path) -> None:
    told = r"supplied.py:\d+ takes total_steps, which is not known: the training loader has no length"
    with pytest.raises(AgreedError, match=told):
        start(tmp_path, "epochs=2", data="Stream()")
    got = start(tmp_path, "epochs=2", "train.max_steps=15", data="Stream()")
    assert (got["scheduler"][0], got["optimizer"]) == (15, [None])


def test_other_parameters_are_still_required(tmp_path: Path) -> None:
    text = RECIPE.format(data=MAP).replace("total_steps, epochs", "total_step, epochs")
    (tmp_path / "supplied.py").write_text(text)
    with pytest.raises(AgreedError, match=r"scheduler\.total_step is required but not set"):
        train_run(load_settings(str(tmp_path / "supplied.py"), [f"run.dir={tmp_path}"], {}), bring_up(cpu=True))
