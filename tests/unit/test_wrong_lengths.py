"""Validation within epochs where a loader's length is not what it yields: at each due step, once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dtrain.distributed.world import World, bring_up
from dtrain.engine.loop import Engine
from dtrain.engine.options import RunOptions
from dtrain.engine.train_step import Task

BATCHES = 8


@pytest.fixture(scope="module")
def world() -> World:
    return bring_up(cpu=True)


class Stream:
    """Eight batches, whatever it says."""

    def __init__(self, said: int | None) -> None:
        self.said = said

    def __iter__(self) -> Any:
        return iter([torch.full((2, 1), float(n)) for n in range(BATCHES)])

    def __len__(self) -> int:
        if self.said is None:
            raise TypeError
        return self.said


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("said", [None, 1, 4, 5, BATCHES, 12])
def test_a_due_validation_is_run_once(world: World, said: int | None, every: int, accumulation: int) -> None:
    net = nn.Linear(1, 1)
    seen: list[int] = []  # the optimizer steps at which a validation ran

    def train_step(model: Any, x: Any) -> Any:
        return model(x).square().mean()

    def valid_step(model: Any, x: Any) -> Any:
        seen.append(engine.place.updates)
        return model(x).square().mean()

    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    task = Task(net, train_step, Stream(said), valid_step, [torch.ones(2, 1)], optimizer)
    engine = Engine(task, world, epochs=2, val_every_steps=every, options=RunOptions(accumulation=accumulation))
    engine.fit()
    a_pass = BATCHES // accumulation
    ends = {a_pass, 2 * a_pass}
    due = {step for step in range(1, 2 * a_pass + 1) if step % every == 0}
    assert seen == sorted(due | ends), "the epoch's own is the one that is due at its end"
    rows = [row["step"] for row in engine.validations.rows]
    assert sorted(set(rows)) == rows
    assert set(rows) | ends == due | ends
    assert all("val_loss" in row for row in engine.history.rows)
    assert (set(rows) & ends == set()) == (said == BATCHES or not due & ends), "which a wrong length does not foretell"
