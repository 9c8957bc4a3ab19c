"""What the engine does around the user's step, counted rather than timed: calls, kept objects, collectives."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain.distributed.world import World, bring_up
from dtrain.engine.loop import Engine
from dtrain.engine.passes import batches_on_device
from dtrain.engine.position import TrainPosition
from dtrain.engine.train_step import Task
from dtrain.model import optimizer_modes

# Calls of Python and C functions a step, those within the user's step and the optimizer not counted. Measured: 68
# (imperative), 116 (declarative, torch's own backward() included), 67 (validation), 102 (fetching, the DataLoader's own
# included); ten of them take about a microsecond. Bounds a little above find what is added.
BOUNDS = {"imperative": 80, "declarative": 130, "valid": 80, "loader": 125}


@pytest.fixture(scope="module")
def world() -> World:
    return bring_up(cpu=True)


class Counter:
    """Counts calls while it is on; a user's step turns it off for itself."""

    def __init__(self) -> None:
        self.calls = 0

    def note(self, _frame: Any, event: str, _arg: Any) -> None:
        self.calls += event in ("call", "c_call")

    def on(self) -> None:
        sys.setprofile(self.note)

    def off(self) -> None:
        sys.setprofile(None)


def engine_of(world: World, counter: Counter, kind: str) -> Engine:
    net = nn.Linear(2, 1)
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def uncounted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            profiled = sys.getprofile() is not None
            counter.off()
            try:
                return function(*args, **kwargs)
            finally:
                if profiled:
                    counter.on()

        return call

    @uncounted
    def train_step(model: Any, x: Any, y: Any) -> Any:
        loss = (model(x) - y).square().mean()
        if kind == "imperative":
            model.optimizer.zero_grad()
            loss.backward()
            model.optimizer.step()
            loss = loss.detach()
        return loss, loss.detach()

    @uncounted
    def valid_step(model: Any, x: Any, y: Any) -> Any:
        loss = (model(x) - y).square().mean()
        return loss, loss

    loader = DataLoader(TensorDataset(torch.ones(400, 2), torch.ones(400, 1)), batch_size=4)
    engine = Engine(Task(net, train_step, loader, valid_step, loader), world, epochs=10)
    engine.train_pass(1)
    net.optimizer.step = uncounted(net.optimizer.step)
    net.optimizer.zero_grad = uncounted(net.optimizer.zero_grad)
    return engine


def calls_a_step(engine: Engine, counter: Counter, kind: str, batches: list[Any]) -> float:
    """The calls of 60 steps less those of 10, so that what a pass costs once falls out."""
    totals = []
    for steps in (10, 60):
        loader = batches[:steps]
        engine.task.dl_train = engine.task.dl_valid = loader
        fresh = Engine(engine.task, engine.world, epochs=1)
        fresh.learner, counter.calls = engine.learner, 0
        counter.on()
        try:
            if kind == "valid":
                fresh.valid.run(2, TrainPosition(0), fresh.callbacks)
            else:
                fresh.train_pass(2)
        finally:
            counter.off()
        totals.append(counter.calls)
    return (totals[1] - totals[0]) / 50


@pytest.mark.parametrize("kind", ["imperative", "declarative", "valid"])
def test_the_engine_adds_few_calls_to_a_step(world: World, kind: str) -> None:
    counter = Counter()
    engine = engine_of(world, counter, kind)
    batches = [[torch.ones(4, 2), torch.ones(4, 1)] for _ in range(60)]
    found = calls_a_step(engine, counter, kind, batches)
    assert 5 < found <= BOUNDS[kind], f"{found} calls a step"


def test_fetching_whole_batches_takes_few_calls(world: World) -> None:
    counter = Counter()
    engine = engine_of(world, counter, "imperative")
    place = TrainPosition(0)
    place.enter("train", 2)
    counter.on()
    count = sum(1 for _ in batches_on_device(engine.train_loader, world, place))
    counter.off()
    assert count == 100
    assert counter.calls / count <= BOUNDS["loader"], f"{counter.calls / count} calls a step"


def test_steps_keep_nothing(world: World) -> None:
    counter = Counter()
    engine = engine_of(world, counter, "declarative")
    engine.train_pass(2)
    kept = []
    for epoch in range(3, 8):
        gc.collect()
        before = sys.getallocatedblocks()
        engine.train_pass(epoch)
        gc.collect()
        kept.append(sys.getallocatedblocks() - before)
    # Whatever else lives in this process may keep something in one epoch or another; what a step keeps is in each.
    assert min(kept) < 20, f"the 100 steps of an epoch left objects behind: {kept}"


def test_no_run_looks_through_all_objects_for_optimizers_that_switch(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes 0.1 s in each process; Accelerate's classes have `train()` and `eval()` around any optimizer."""
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils.megatron_lm import MegatronLMOptimizerWrapper

    wrappers = [AcceleratedOptimizer, MegatronLMOptimizerWrapper]
    assert {*wrappers} <= {*optimizer_modes._kinds(torch.optim.Optimizer)}
    # Other tests' optimizers may be alive.
    monkeypatch.setattr(optimizer_modes, "_kinds", lambda _: [torch.optim.SGD, *wrappers])
    monkeypatch.setattr(gc, "get_objects", lambda: pytest.fail("looked through all objects"))
    engine_of(world, Counter(), "declarative").fit()
