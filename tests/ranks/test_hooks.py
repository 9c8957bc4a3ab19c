"""What is told after each optimizer step, and a stop that it asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.callbacks import on
from helpers.ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain.data.partition import BatchMode
from dtrain.distributed.world import World, bring_up
from dtrain.engine.loop import Engine
from dtrain.engine.options import RunOptions
from dtrain.engine.train_step import Task
from dtrain.errors import StopRequested


def engine_of(world: World, accumulation: int, batch: BatchMode = "per_rank") -> Engine:
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(model: Any, x: Any, y: Any) -> Any:
        return (model(x) - y).square().mean()

    loader = DataLoader(TensorDataset(torch.ones(10, 2), torch.ones(10, 1)), batch_size=2)
    task = Task(net, step, loader, step, loader, optimizer)
    return Engine(task, world, epochs=2, options=RunOptions(accumulation=accumulation, batch=batch))


def follow(world: World, stop_after: int = 0) -> list[Any]:
    engine = engine_of(world, accumulation=2)
    told: list[Any] = []

    def note(place: Any) -> None:
        told.append([place.epoch, place.split, place.step, place.updates])
        if place.updates == stop_after:
            raise StopRequested("enough")

    engine.callbacks.add(
        on(on_save_point=note, on_exception=lambda error: told.append(["ended", type(error).__name__]))
    )
    try:
        engine.fit()
    except StopRequested as stop:
        told.append([type(stop).__name__, stop.exit_code, stop.on_all_ranks])
    return told


def test_told_after_each_optimizer_step_and_each_epoch() -> None:
    told = follow(bring_up(cpu=True))
    epochs = [[[e, "train", 2], [e, "train", 4], [e, "train", 5], [e, "checkpoint", 0]] for e in (1, 2)]
    assert [row[:3] for row in told] == epochs[0] + epochs[1]
    assert [row[3] for row in told] == [1, 2, 3, 3, 4, 5, 6, 6]


def test_at_the_same_places_on_all_ranks() -> None:
    told = run_ranks(follow, 2)
    assert told[0] == told[1]
    assert [row[3] for row in told[0]] == [1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("after", [2, 4])
def test_a_stop_is_heard_of_before_it_leaves(after: int) -> None:
    told = follow(bring_up(cpu=True), stop_after=after)
    assert told[-2:] == [["ended", "StopRequested"], ["StopRequested", 75, True]]
    assert told[-3][3] == after
