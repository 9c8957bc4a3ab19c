"""Learning-rate schedules count optimizer steps or epochs, never ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import Dtrain
from helpers.ranks import run_ranks
from helpers.sweep import some
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

# 19 samples in global batches of 4 are 5 batches; two a step make 3 optimizer steps an epoch.
STEPS = {1: 5, 2: 3}


def train(world) -> dict[str, Any]:
    """One rank: the lr column, and the rate that each optimizer step used, for schedules that halve the rate."""
    import dtrain

    found = {}
    for interval in ("epoch", "step"):
        for accumulation in (1, 2):
            for kind in ("imperative", "declarative"):
                net = nn.Linear(2, 1)
                used: list[float] = []
                optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
                optimizer.register_step_pre_hook(lambda o, *_, used=used: used.append(o.param_groups[0]["lr"]))
                net.optimizer = optimizer

                def step(model, x, y, kind=kind):
                    loss = model(x).mean()
                    if kind == "imperative" and model.training:
                        model.optimizer.zero_grad()
                        loss.backward()
                        model.optimizer.step()
                    return loss if kind == "declarative" else loss.item()

                frame = dtrain.train_model(
                    net,
                    3,
                    DataLoader(TensorDataset(torch.ones(19, 2), torch.ones(19)), batch_size=4),
                    train_step=step,
                    scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
                    scheduler_interval=interval,
                    accumulation=accumulation,
                    batch="global",
                    verbose=False,
                    world=world,
                )
                found[f"{interval} {accumulation} {kind}"] = [frame["lr"].tolist(), used]
    return found


@pytest.mark.parametrize("ranks", some([3], [1, 2]))
def test_the_lr_column_is_the_same_on_any_number_of_ranks(ranks: int) -> None:
    for found in run_ranks(train, ranks):
        assert len(found) == 8
        for case, (column, used) in found.items():
            interval, accumulation, _ = case.split()
            steps = STEPS[int(accumulation)]
            halvings = [k // steps if interval == "epoch" else k for k in range(3 * steps)]
            assert used == [0.5**k for k in halvings], case
            assert column == used[steps - 1 :: steps], "the rate of the epoch's last step"


def scheduled(world, recipe: str, cases: list[list[str]]) -> list[list[float]]:
    """One rank: the rate of each optimizer step, for schedules by name."""
    from dtrain.config import load_settings
    from dtrain.trainer.setup import configured_engine, load_task

    found = []
    for words in cases:
        settings = load_settings(recipe, [*words, "lr=0.5", "n_train=19", "train.batch=global", "epochs=4"])
        task = load_task(settings)
        used: list[float] = []
        task.optimizer.register_step_pre_hook(lambda o, *_, used=used: used.append(o.param_groups[0]["lr"]))
        configured_engine(task, world, settings, epochs=settings.config.train.epochs).fit()
        found.append(used)
    return found


def by_hand(shape: str, total: int, warmup: int, floor: float) -> list[float]:
    rates = [0.5 * (step + 1) / warmup for step in range(warmup)]
    for step in range(warmup, total):
        part = (step - warmup) / (total - warmup)
        left = {"constant": 1.0, "linear": 1 - part, "cosine": 0.5 + 0.5 * math.cos(math.pi * part)}[shape]
        rates.append(0.5 * (left if shape == "constant" else floor + (1 - floor) * left))
    return rates


@pytest.mark.parametrize("ranks", some([3], [1, 4]))
def test_schedules_by_name_are_the_same_on_any_number_of_ranks(ranks: int, recipes: Path) -> None:
    """20 steps: 19 samples in global batches of 4, for 4 epochs; or 12 where two batches make a step."""
    cases = {
        ("cosine", 20, 0, 0.0): ["train.schedule=cosine"],
        ("cosine", 20, 3, 0.1): ["train.schedule=cosine", "warmup_steps=3", "train.min_lr_ratio=0.1"],
        ("linear", 12, 3, 0.0): ["train.schedule=linear", "warmup_epochs=1", "accumulation=2"],
        ("constant", 20, 5, 0.0): ["train.schedule=constant", "warmup_fraction=0.25"],
    }
    for found in run_ranks(scheduled, ranks, recipe=str(recipes / "small.py"), cases=list(cases.values())):
        for (shape, total, warmup, floor), used in zip(cases, found, strict=True):
            np.testing.assert_allclose(used, by_hand(shape, total, warmup, floor), rtol=1e-12, err_msg=shape)


def test_a_schedule_that_cannot_be_is_told(dtrain: Dtrain, recipes: Path) -> None:
    (dtrain.folder / "endless.py").write_text(
        (recipes / "small.py").read_text()
        + """
from torch.utils.data import IterableDataset
class Endless(IterableDataset):
    def __iter__(self):
        return iter([(torch.ones(3), torch.ones(1))] * 4)
def build_dataloaders():
    return DataLoader(Endless()), None
"""
    )
    for words, told in (
        (("digits", "train.schedule=cosine"), "the recipe has a scheduler (ExponentialLR). Use only one of them."),
        (("digits", "warmup_steps=3"), "warmup_steps needs train.schedule"),
        (
            (recipes / "small.py", "schedule=cosine", "warmup_steps=1", "warmup_epochs=1"),
            "exclude each other: set only one of them",
        ),
        (("endless.py", "schedule=cosine"), "the training loader has no length"),
    ):
        done = dtrain("train", *words, "epochs=1")
        assert done.code == 2 and told in done.err, done.text
    done = dtrain("train", "endless.py", "schedule=constant", "warmup_steps=2", "epochs=1")
    assert done.code == 0, "a warm-up by steps needs no end"
