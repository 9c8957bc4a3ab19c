"""Streams of which each rank reads its own part: every number against NumPy, with unequal and empty parts."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import dtrain
from dtrain.api.prepared import PROCESS
from dtrain.data.batches import BatchFunctions
from dtrain.distributed.world import World
from dtrain.engine.loop import Engine
from dtrain.engine.options import RunOptions
from dtrain.engine.position import Limits
from dtrain.engine.synced_metrics import check_metrics
from dtrain.engine.train_step import Task
from dtrain.errors import UsageError

LR, EPOCHS, BATCH = 0.1, 2, 4
TRAIN = {1: [9], 2: [5, 14], 3: [7, 0, 17]}  # samples of each rank
VALID = {1: [5], 2: [0, 7], 3: [3, 10, 1]}


def samples(rank: int, n: int) -> np.ndarray:
    """Features and a label of one rank's part."""
    return np.random.default_rng(rank + 1).normal(size=(n, 4))


class Parts(IterableDataset):
    """A part a rank; counts what is read of it."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.rank, self.size, self.reads = sizes, -1, 0, 0

    def set_rank(self, rank: int, world_size: int) -> None:
        self.rank, self.size = rank, world_size

    def __iter__(self) -> Any:
        assert self.size == len(self.sizes)
        for row in torch.tensor(samples(self.rank, self.sizes[self.rank])):
            self.reads += 1
            yield row[:3], row[3:]


def loss_of(model: Any, x: Any, y: Any) -> Any:
    return (model(x) - y).square().mean()


def net() -> nn.Linear:
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    return model


def by_hand(size: int, accumulation: int, limit: int | None, most: int | None) -> dict[str, Any]:
    """The history and weights of one process on the union of the ranks' batches."""
    whole = [samples(rank, n) for rank, n in enumerate(TRAIN[size])]
    batches = [[part[at : at + BATCH] for at in range(0, len(part), BATCH)] for part in whole]
    if limit is not None:
        batches = [own[: len(range(rank, limit, size))] for rank, own in enumerate(batches)]
    together = [np.concatenate([b for b in some if b is not None]) for some in zip_longest(*batches)]
    valid = np.concatenate([samples(rank, n) for rank, n in enumerate(VALID[size])])
    w, losses, valid_losses, steps = np.ones(3), [], [], 0
    for _ in range(EPOCHS):
        total = count = 0.0
        for start in range(0, len(together), accumulation):
            if steps == most:
                break
            group = np.concatenate(together[start : start + accumulation])
            error = group[:, :3] @ w - group[:, 3]
            total, count = total + (error**2).sum(), count + len(group)
            w = w - LR * 2 * (error[:, None] * group[:, :3]).mean(0)
            steps += 1
        if count:
            losses.append(total / count)
            valid_losses.append(((valid[:, :3] @ w - valid[:, 3]) ** 2).mean())
    return {"loss": losses, "val_loss": valid_losses, "w": w.tolist(), "steps": steps}


def trained(world: World, imperative: bool, accumulation: int, limit: int | None, most: int | None) -> dict[str, Any]:
    model, train, valid = net(), Parts(TRAIN[world.size]), Parts(VALID[world.size])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def train_step(model: Any, x: Any, y: Any) -> Any:
        loss = loss_of(model, x, y)
        if imperative:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {"loss": loss.detach() if imperative else loss}

    def valid_step(model: Any, x: Any, y: Any) -> Any:
        return {"loss": loss_of(model, x, y), "rows": (x.sum(1),)}

    metrics = {"rows": lambda sums: float(len(sums)) + float(sums.sum())}
    task = Task(model, train_step, DataLoader(train, BATCH), valid_step, DataLoader(valid, BATCH), optimizer)
    task.metrics = check_metrics(metrics, "metrics")
    limits = Limits(train=limit)
    options = RunOptions(accumulation=accumulation)
    engine = Engine(task, world, epochs=EPOCHS, options=options, limits=limits, max_steps=most)
    rows = engine.fit().rows
    return {
        "loss": [row["loss"] for row in rows],
        "val_loss": [row["val_loss"] for row in rows],
        "val_rows": rows[0]["val_rows"],
        "w": model.weight[0].tolist(),
        "steps": engine.place.updates,
        "reads": [train.reads, valid.reads],
        "epochs": len(rows),
    }


CASES: list[dict[str, Any]] = [
    {"imperative": imperative, "accumulation": accumulation, "limit": limit, "most": most}
    for imperative, accumulation, limit, most in [
        (False, 1, None, None),
        (True, 1, None, None),
        (False, 2, None, None),
        (True, 3, 4, None),
        (False, 1, 3, None),
        (False, 1, None, 3),
    ]
]


def all_cases(world: World) -> list[Any]:
    return [trained(world, **case) for case in CASES]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_history_and_weights_are_those_of_one_process_on_the_union_of_the_batches(size: int) -> None:
    by_rank = run_ranks(all_cases, size)
    for number, case in enumerate(CASES):
        expected = by_hand(size, case["accumulation"], case["limit"], case["most"])
        found = [rank[number] for rank in by_rank]
        for rank, one in enumerate(found):
            for name, value in expected.items():
                np.testing.assert_allclose(one[name], value, rtol=1e-9, err_msg=f"{case}, rank {rank}: {name}")
            whole = np.concatenate([samples(r, n) for r, n in enumerate(VALID[size])])
            assert one["val_rows"] == pytest.approx(len(whole) + whole[:, :3].sum())
            if case["limit"] is None and case["most"] is None:
                assert one["reads"] == [EPOCHS * TRAIN[size][rank], EPOCHS * VALID[size][rank]]


class Same(Parts):
    """Says that it shards itself, and does not."""

    def __iter__(self) -> Any:
        return iter([(row[:3], row[3:]) for row in torch.tensor(samples(0, 8))])


def refused(world: World) -> dict[str, str]:
    """What is said of loaders that nobody shards, or somebody else did; each in turn, on all ranks."""

    def told(train: Any, valid: Any = None, **more: Any) -> str:
        model = net()
        step = None if valid is None else loss_of
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        task = Task(model, loss_of, train, step, valid, optimizer, **more)
        with pytest.raises(UsageError) as error:
            Engine(task, world, epochs=1).fit()
        assert error.value.on_all_ranks
        return str(error.value)

    sizes = TRAIN[2]
    parts, same = DataLoader(Parts(sizes), BATCH), DataLoader(Same(sizes), BATCH)
    rows = torch.tensor(samples(world.rank, 9))
    own = DataLoader(TensorDataset(rows[:, :3], rows[:, 3:]), BATCH)
    mixed = DataLoader(Parts(sizes), BATCH)
    mixed.sharded_by_rank = world.rank == 0
    unknown = [Odd(torch.tensor(samples(0, 4)))] if world.rank else []
    return {
        "train": told(same),
        "valid": told(parts, same),
        "map-style": told(own, batches=BatchFunctions(by_rank=True)),
        "one rank alone": told(mixed),
        "unsendable": told(iter_of(unknown), batches=BatchFunctions(len, by_rank=True)),
    }


class Odd:
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)


def iter_of(batches: list[Any]) -> Any:
    class Loader:
        def __iter__(self) -> Any:
            return iter(batches)

    return Loader()


def scripted(world: World) -> dict[str, Any]:
    """The same training in a loop of one's own."""
    PROCESS.world = world
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loaders = DataLoader(Parts(TRAIN[world.size]), BATCH), DataLoader(Parts(VALID[world.size]), BATCH)
    model, train, valid, optimizer = dtrain.prepare(model, *loaders, optimizer)
    losses: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(EPOCHS):
        for learns, loader in ((True, train), (False, valid)):
            model.train(learns)
            meter = dtrain.Meter()
            for x, y in loader:
                loss = loss_of(model, x, y)
                if learns:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                meter.add(loss=loss.detach())
            losses[learns].append(meter.means()["loss"])
    return {"loss": losses[True], "val_loss": losses[False], "w": model.weight[0].tolist()}


def refused_and_scripted(world: World) -> list[Any]:
    return [refused(world), scripted(world)]


def test_what_nobody_shards_is_refused_and_a_loop_of_ones_own_is_as_exact() -> None:
    found = run_ranks(refused_and_scripted, 2)
    expected = by_hand(2, 1, None, None)
    del expected["steps"]
    for told, script in found:
        assert "ranks 0 and 1 read the same first batch of the train loader" in told["train"]
        assert "ranks 0 and 1 read the same first batch of the valid loader" in told["valid"]
        assert "paths[rank::world_size]" in told["train"]
        assert "sample 0 of the train dataset is not the same on ranks 0 and 1" in told["map-style"]
        assert "dataset.sharded_by_rank = True" in told["map-style"]
        assert "whether the train loader shards itself by rank is not the same on all ranks" in told["one rank alone"]
        assert "there is a Odd in it" in told["unsendable"]
        for name, value in expected.items():
            np.testing.assert_allclose(script[name], value, rtol=1e-9, err_msg=name)
