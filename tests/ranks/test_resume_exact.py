"""A run that is ended anywhere and goes on equals one that was not, to the last bit, on the same number of ranks.

DTRAIN_TEST_SWEEP=full pytest tests/ranks/test_resume_exact.py    # hundreds of cases for each number of ranks
"""

from __future__ import annotations

import random
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.callbacks import on
from helpers.rank_pool import RankPool
from helpers.sweep import FULL
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from dtrain.checkpoint.locate import Parts, find_good, read
from dtrain.checkpoint.saver import Checkpointer
from dtrain.checkpoint.state import restore
from dtrain.checkpoint.tree import flatten
from dtrain.config.schema import CheckpointConfig
from dtrain.distributed.world import World
from dtrain.engine.callback import Order
from dtrain.engine.loop import Engine
from dtrain.engine.options import RunOptions
from dtrain.engine.train_step import Task
from dtrain.errors import StopRequested

EXAMPLES = 300 if FULL else 14
TIMES = ("seconds", "samples_per_second")


class Noisy(Dataset):
    """Augments at random, from all three streams; counts what is read of it."""

    def __init__(self, n: int) -> None:
        self.x = torch.randn(n, 5, generator=torch.Generator().manual_seed(n))
        self.reads = 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        noise = torch.randn(5) + random.random() + float(np.random.rand())
        return self.x[index] + 0.1 * noise, self.x[index].sum().reshape(1)


class Stream(IterableDataset):
    """The same without a length, read in order."""

    def __init__(self, n: int) -> None:
        self.data = Noisy(n)

    def __iter__(self) -> Any:
        return (self.data[index] for index in range(len(self.data)))


def loader_of(case: dict[str, Any]) -> DataLoader:
    kind, n = case["data"], case["n"]
    common: dict[str, Any] = {"batch_size": case["batch_size"]}
    if kind == "tensors":
        x = Noisy(n).x
        return DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), shuffle=True, **common)
    if kind == "stream":
        return DataLoader(Stream(n), **common)
    if kind == "generator":  # of the user's own, which resuming from epoch to epoch
        return DataLoader(Noisy(n), shuffle=True, generator=torch.Generator().manual_seed(9), **common)
    workers = {"workers": 2, "persistent": 2}.get(kind, 0)
    return DataLoader(Noisy(n), shuffle=True, num_workers=workers, persistent_workers=kind == "persistent", **common)


def task_of(case: dict[str, Any], order: list[int]) -> Task:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(0.3), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 1)
    )
    if case["norm"] is False:
        net[1] = nn.Identity()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    schedules = {
        "none": None,
        "step": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=1000),
        "epoch": lambda: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        "plateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    }
    made = schedules[case["schedule"]]

    def train_step(model: Any, x: Any, y: Any) -> Any:
        order.append(zlib.crc32(x.numpy().tobytes()))
        loss = (model(x) - y).square().mean()
        if case["imperative"]:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {"loss": loss.detach() if case["imperative"] else loss, "error": loss.detach().sqrt()}

    def valid_step(model: Any, x: Any, y: Any) -> Any:
        torch.randn(3)  # a stop within it must take the streams back
        if case.get("stop_in_valid"):
            raise StopRequested("saved")
        return {"loss": (model(x) - y).square().mean()}

    valid = DataLoader(Noisy(7), batch_size=3)
    return Task(
        net,
        train_step,
        loader_of(case),
        valid_step,
        valid,
        optimizer if case["known"] else None,
        made() if made is not None else None,
        "step" if case["schedule"] == "step" else "epoch",
    )


def train(world: World, case: dict[str, Any], folder: Path | None, stop_at: int = 0) -> dict[str, Any]:
    """Trains, from the last checkpoint in the folder where there is one; ends after so many steps, saved or not."""
    order: list[int] = []
    engine = Engine(
        task_of(case, order),
        world,
        epochs=case["epochs"],
        epoch_steps=case["epoch_steps"],
        options=RunOptions(batch=case["mode"], accumulation=case["accumulation"]),
    )
    skipped = 0
    if folder is not None:
        found = find_good(folder) if world.is_main else None
        if world.gather_json(found is not None)[0]:
            loaded = (Parts() if found is None else read(found.saved.path)).shared(world).loaded()
            engine.history.rows = list(loaded.run["rows"])
            restore(engine, loaded.weights, loaded.run, loaded.ranks)
            skipped = engine.start.skip
        policy = CheckpointConfig(every_steps=case["every_steps"], every_epochs=case["every_epochs"])
        keeper = Checkpointer(engine, folder, policy, lambda: {"format": 1, "ranks": world.size})
        keeper.attach()

        def stop(place: Any) -> None:
            if stop_at and place.updates >= stop_at:
                raise StopRequested("saved") if case["saved"] else RuntimeError("killed")

        engine.callbacks.add(on(Order.LAST, on_save_point=stop))
    try:
        engine.fit()
    except (StopRequested, RuntimeError) as error:
        if str(error) not in ("saved", "killed"):
            raise
    finally:
        if folder is not None:
            keeper.on_train_end()
        engine.train_loader._indexed and setattr(engine.train_loader._indexed._loader, "_iterator", None)
    dataset = engine.task.dl_train.dataset
    return {"engine": engine, "order": order, "skipped": skipped, "reads": getattr(dataset, "reads", 0)}


def resume_example(world: World, case: dict[str, Any]) -> dict[str, Any]:
    """One rank: the uninterrupted run, then one with two ends in it; what differs."""
    whole = train(world, case, None)
    shared = world.gather_json(tempfile.mkdtemp() if world.is_main else "")[0]
    folder = Path(shared) / "checkpoints"
    parts: list[int] = []
    try:
        if case["in_valid"]:  # after the first epoch's train pass
            train(world, {**case, "stop_in_valid": True}, folder)
        for stop_at in (*case["stops"], 0):
            last = train(world, case, folder, stop_at)
            parts.append(len(last["order"]))
    finally:
        world.gather_json("done")
        if world.is_main:
            shutil.rmtree(shared)
    one, two = whole["engine"], last["engine"]
    states = [
        flatten({"net": e.task.module.state_dict(), "by": e.learner.optimizers()[0].state_dict()}, "")
        for e in (one, two)
    ]
    differs = [name for name in states[0][1] if not torch.equal(states[0][1][name], states[1][1][name])]
    rows = [[{k: v for k, v in row.items() if k not in TIMES} for row in e.history.rows] for e in (one, two)]
    return {
        "differs": differs,
        "rows": rows[0] == rows[1],
        "order": whole["order"][len(whole["order"]) - len(last["order"]) :] == last["order"],
        "structure": states[0][0] == states[1][0],
        "steps": len(whole["order"]),
        "last": len(last["order"]),
        "skipped": last["skipped"],
        "reads": last["reads"],
        "told": [row["epoch"] for row in rows[1]],
    }


def cases(ranks: int) -> list[dict[str, Any]]:
    """Drawn by a fixed seed, so that the ranks of every run see the same."""
    draw, lengths = random.Random(ranks), random.Random(ranks)
    found = []
    for _ in range(EXAMPLES):
        imperative = draw.random() < 0.5
        found.append(
            {
                "data": draw.choice(["tensors", "noisy", "noisy", "stream", "generator", "workers", "persistent"]),
                "n": draw.randint(9, 40),
                "batch_size": draw.choice([4, 5]),
                "mode": draw.choice(["per_rank", "global"]),
                "accumulation": draw.choice([1, 1, 2, 3]),
                "imperative": imperative,
                "known": True,
                "norm": draw.random() < 0.5,
                "schedule": draw.choice(["none", "step", "epoch", "plateau"]),
                "epochs": 3,
                "every_steps": draw.choice([None, 1, 2, 3]),
                "every_epochs": draw.choice([0, 1, 2]),
                "saved": draw.random() < 0.7,
                "stops": sorted(draw.sample(range(1, 12), 2)),
                "in_valid": draw.random() < 0.3,
                "epoch_steps": lengths.choice([None, 2, 3, 5, 11]),
            }
        )
    found[0] |= {"data": "persistent", "in_valid": True}  # workers begin in another epoch than they had
    for case in found:
        if case["norm"] and ranks > 1:  # a rank's part may be a single sample
            case["mode"], case["n"] = "per_rank", case["n"] // 20 * 20 or 20
            case["batch_size"] = 5 if case["n"] % 5 == 0 else 4
        elif case["norm"] and case["n"] % case["batch_size"] == 1:  # the last batch would be
            case["n"] += 1
        if case["imperative"] and case["accumulation"] == 1 and case["schedule"] == "none":
            case["known"] = False  # the step alone knows it
    return found


@pytest.mark.timeout(3600 if FULL else 400)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_resumed_equals_uninterrupted_bitwise(ranks: int) -> None:
    with RankPool(resume_example, ranks) as pool:
        for case in cases(ranks):
            results = pool(case=case)
            for result in results:
                assert result["differs"] == [], case
                assert result["rows"], case
                assert result["order"], case
                assert result["structure"], case
                assert result["told"] == [1, 2, 3], case
