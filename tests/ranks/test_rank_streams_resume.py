"""Ranks that read their own streams go on, to the last bit, where they were; with a state, without reading again."""

from __future__ import annotations

import random
import shutil
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.callbacks import on
from helpers.ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from dtrain.checkpoint.locate import find_good, read
from dtrain.checkpoint.saver import Checkpointer
from dtrain.checkpoint.state import restore
from dtrain.config.schema import CheckpointConfig
from dtrain.distributed.world import World
from dtrain.engine.callback import Order
from dtrain.engine.loop import Engine
from dtrain.engine.train_step import Task

SIZES = {1: [23], 2: [10, 23]}  # samples of each rank: the first is done in the third of six batches
BATCH = 4


class Stream(IterableDataset):
    """A rank's part in an order of the epoch's, with noise; counts what is read. It has no state."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.rank, self.epoch, self.reads = sizes, 0, -1, 0

    def set_rank(self, rank: int, world_size: int) -> None:
        self.rank = rank

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def rows(self, first: int) -> Any:
        data = np.random.default_rng(self.rank).normal(size=(self.sizes[self.rank], 4))
        for index in np.random.default_rng(self.epoch).permutation(len(data))[first:]:
            self.reads += 1
            yield torch.tensor(data[index]) + torch.randn(4) * 0.1 + random.random()

    def __iter__(self) -> Any:
        return self.rows(0)


class Stateful(Stream):
    """Knows where it is, as Hugging Face's iterables do."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__(sizes)
        self.at, self.start = 0, 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["at"]

    def __iter__(self) -> Any:
        start, self.start = self.start, 0
        for self.at, row in enumerate(self.rows(start), start + 1):  # noqa: B020 - as it is told
            yield row
        self.at = 0


class Other(Stream):
    """Means something else by its state: how many passes have begun, and begins at the first row with any."""

    passes = 0

    def state_dict(self) -> dict[str, int]:
        return {"passes": self.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.passes = state["passes"]

    def __iter__(self) -> Any:
        self.passes += 1
        return self.rows(0)


class OwnLoader:
    """A loader of the user's that yields batches and has the state, with the batch that comes next in it."""

    def __init__(self, dataset: Stateful) -> None:
        self.dataset = dataset
        self.at = self.start = 0
        self.sharded_by_rank = True

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["at"]

    def __iter__(self) -> Any:
        self.at, self.start = self.start, 0
        rows = self.dataset.rows(self.at * BATCH)
        while some := list(islice(rows, BATCH)):
            self.at += 1
            yield torch.stack(some)


KINDS = {
    "no state": lambda sizes: DataLoader(Stream(sizes), BATCH),
    "a state": lambda sizes: DataLoader(Stateful(sizes), BATCH),
    "another state": lambda sizes: DataLoader(Other(sizes), BATCH),
    "a loader's": lambda sizes: OwnLoader(Stateful(sizes)),
    "workers": lambda sizes: DataLoader(Stream(sizes), BATCH, num_workers=1),
}


def train(world: World, kind: str, folder: Path | None, stop_at: int = 0, accumulation: int = 1) -> dict[str, Any]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 1)).double()
    loader = KINDS[kind](SIZES[world.size])
    seen: list[float] = []

    def train_step(model: Any, row: Any) -> Any:
        seen.append(float(row.sum()))
        return (model(row[:, :3]) - row[:, 3:]).square().mean()

    task = Task(model, train_step, loader, optimizer=torch.optim.AdamW(model.parameters(), lr=0.05))
    engine = Engine(task, world, epochs=3)
    if folder is not None:
        found = find_good(folder) if world.is_main else None
        if world.gather_json(found is not None)[0]:
            loaded = read(find_good(folder).saved.path).loaded()
            engine.history.rows = list(loaded.run["rows"])
            restore(engine, loaded.weights, loaded.run, loaded.ranks)
        policy = CheckpointConfig(every_steps=1, asynchronous=False)
        Checkpointer(engine, folder, policy, lambda: {"format": 1, "ranks": world.size}).attach()

        def stop(place: Any) -> None:
            if place.updates == stop_at:
                raise RuntimeError("killed")

        engine.callbacks.add(on(Order.LAST, on_save_point=stop))
    try:
        engine.fit()
    except RuntimeError as error:
        if str(error) != "killed":
            raise
    weights = {name: value.tolist() for name, value in model.state_dict().items()}
    losses = [row["loss"] for row in engine.history.rows]
    return {"weights": weights, "losses": losses, "seen": seen, "reads": loader.dataset.reads}


def resumed(world: World) -> dict[str, Any]:
    found = {}
    for kind in KINDS:
        whole = train(world, kind, None)
        stops = (8, 10, 15) if kind == "a state" else (8,)  # of 18 steps: the second of an epoch, the fourth, the third
        for stop_at in stops:
            shared = world.gather_json(tempfile.mkdtemp() if world.is_main else "")[0]
            train(world, kind, Path(shared), stop_at)
            last = train(world, kind, Path(shared))
            world.gather_json("done")
            if world.is_main:
                shutil.rmtree(shared)
            found[f"{kind}, {stop_at}"] = {
                "differs": [key for key in ("weights", "losses") if whole[key] != last[key]],
                "order": whole["seen"][-len(last["seen"]) :] == last["seen"],
                "steps": len(last["seen"]),
                "reads": last["reads"],
            }
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_a_stream_goes_on_where_it_was_to_the_last_bit(size: int) -> None:
    for rank, found in enumerate(run_ranks(resumed, size)):
        n = SIZES[size][rank]
        for name, one in found.items():
            kind, stop_at = name.split(", ")
            assert one["differs"] == [], name
            assert rank == 0 < len(SIZES[size]) - 1 or one["order"], name  # a rank that is done takes what it is sent
            assert one["steps"] == 18 - int(stop_at), name
            if kind in ("a state", "a loader's"):  # what is left, and no batch twice
                steps_of_epoch, left = (int(stop_at) - 1) // 6 + 1, max(0, n - BATCH * (int(stop_at) % 6))
                assert one["reads"] == left + (3 - steps_of_epoch) * n, name
            elif kind != "workers":
                assert one["reads"] > n, name
