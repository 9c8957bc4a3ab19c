"""Which optimizer is stepped, counted and kept, and what is told of one that cannot be."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from helpers.step_programs import BATCH, CALLS, SAMPLES, data, flat, fresh_net, loss_of, told_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain.api.function import train_model
from dtrain.checkpoint.optimizer_roles import distinguish, role_of
from dtrain.distributed.world import World, bring_up
from dtrain.engine.loop import Engine
from dtrain.engine.train_step import Task
from dtrain.errors import CheckpointError


@pytest.fixture(scope="module")
def world() -> World:
    return bring_up(cpu=True)


def test_a_wrapper_that_is_no_optimizer_is_named(world: World) -> None:
    class Wrapper:
        def __init__(self, inner: Any) -> None:
            self.inner, self.param_groups = inner, inner.param_groups

        def zero_grad(self) -> None:
            self.inner.zero_grad()

        def step(self) -> None:
            self.inner.step()

    def steps(model: Any, x: Any, y: Any) -> Any:
        loss = loss_of(model, x, y)
        model.optimizer.zero_grad()
        loss.backward()
        model.optimizer.step()
        return loss.detach()

    for step, told in ((loss_of, "model.optimizer (Wrapper) is not a torch.optim.Optimizer"), (steps, "")):
        net = fresh_net()
        net.optimizer = Wrapper(net.optimizer)
        assert told in told_of(world, net, step)
        assert bool(told) == bool(told_of(world, net, step))


def test_an_optimizer_that_needs_a_closure_is_refused_for_a_loss(world: World) -> None:
    net = fresh_net()
    net.optimizer = torch.optim.LBFGS(net.parameters())
    before = flat(net)
    assert "def closure()" in told_of(world, net, loss_of)
    assert flat(net) == before

    def by_closure(model: Any, x: Any, y: Any) -> Any:  # as the message says
        def closure() -> Any:
            model.optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            return loss

        loss = model.optimizer.step(closure)
        return loss.detach()

    engine = Engine(Task(net, by_closure, DataLoader(TensorDataset(*data()), BATCH)), world, 1)
    engine.fit()
    assert engine.place.updates == CALLS, "one step, however often its closure is called"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_optimizer_of_the_model_is_followed(world: World, accumulation: int) -> None:
    def other(net: Any) -> Any:
        return torch.optim.Adam(net.parameters(), lr=0.01)

    net, expected = fresh_net(), fresh_net()
    calls: list[int] = []

    def step(model: Any, x: Any, y: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 * accumulation + 1:
            model.optimizer = other(model)
        return loss_of(model, x, y)

    assert told_of(world, net, step, accumulation=accumulation) == ""
    x, y = data()
    size = BATCH * accumulation
    for number, start in enumerate(range(0, SAMPLES, size)):
        if number == 2:
            expected.optimizer = other(expected)
        expected.optimizer.zero_grad()
        loss_of(expected, x[start : start + size], y[start : start + size]).backward()
        expected.optimizer.step()
    np.testing.assert_allclose(flat(net), flat(expected), rtol=1e-9)


def test_what_the_models_optimizer_cannot_become(world: World) -> None:
    def becomes(what: Any) -> Any:
        def step(model: Any, x: Any, y: Any) -> Any:
            model.optimizer = what(model)
            return loss_of(model, x, y)

        return step

    net = fresh_net()
    scheduler = torch.optim.lr_scheduler.StepLR(net.optimizer, 1)
    adam = becomes(lambda model: torch.optim.Adam(model.parameters()))
    told = told_of(world, net, adam, scheduler=scheduler, scheduler_interval="step")
    assert (
        "replaced (by Adam), and the scheduler (StepLR) still sets the learning rates of the previous one (SGD)" in told
    )
    outside = torch.nn.Linear(1, 1)
    assert "none of the model's parameters" in told_of(
        world, fresh_net(), becomes(lambda _: torch.optim.Adam(outside.parameters()))
    )
    assert "model.optimizer was set to str" in told_of(world, fresh_net(), becomes(lambda _: "adam"))
    assert "def closure()" in told_of(world, fresh_net(), becomes(lambda m: torch.optim.LBFGS(m.parameters())))


def test_an_optimizer_of_no_parameter_of_the_net_never_counts(world: World) -> None:
    other = torch.nn.Parameter(torch.ones(1))
    foreign = torch.optim.SGD([other], lr=0.1)

    def step(model: Any, x: Any, y: Any) -> Any:
        other.grad = torch.ones(1)
        foreign.step()
        if float(y[0]) < 0.5:
            return 0.0
        model.optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        model.optimizer.step()
        return loss.detach()

    engine = Engine(Task(fresh_net(), step, DataLoader(TensorDataset(*data()), BATCH)), world, 1)
    engine.fit()
    _, y = data()
    assert engine.place.updates == sum(float(part[0]) >= 0.5 for part in y.split(BATCH))


@pytest.mark.parametrize("known", [True, False])
def test_optimizers_made_anew_for_each_batch_are_let_go(world: World, known: bool) -> None:
    """With their states, which are as large as the net; their steps count."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def step(m: Any, x: Any, y: Any) -> Any:
        optimizer = torch.optim.Adam(m.parameters(), lr=0.01)
        alive.add(optimizer)
        loss = loss_of(m, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    net = fresh_net()
    if not known:
        del net.optimizer
    engine = Engine(Task(net, step, DataLoader(TensorDataset(*data()), BATCH)), world, 2)
    engine.fit()
    gc.collect()
    assert len(alive) == 0
    assert engine.place.updates == 2 * CALLS
    assert engine.learner.optimizers() == ([net.optimizer] if known else [])


def test_optimizers_that_a_resumed_run_could_not_tell_apart(world: World) -> None:
    net = fresh_net()
    engine = Engine(Task(net, loss_of, DataLoader(TensorDataset(*data()), BATCH)), world, 1)
    two = [torch.optim.SGD(net.parameters(), lr=rate) for rate in (0.1, 0.2)]
    assert role_of(net.optimizer, engine) == {"first": True, "at": []}
    with pytest.raises(CheckpointError, match=r"several SGD optimizers of the same parameters.*model\.second = "):
        role_of(two[0], engine)
    net.second, net.more = two[0], {"third": two[1]}  # as the message says
    saved = [role_of(one, engine) | {"own": False} for one in two]
    assert [one["at"] for one in saved] == [["second"], ["more['third']"]]
    for one, was in zip(two, saved, strict=True):
        assert distinguish([net.optimizer, *two], was, engine.task) == [one]


def test_several_optimizers_may_be_kept_in_a_mapping_on_the_net(world: World) -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def made() -> Any:
        torch.manual_seed(3)
        net: Any = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
        net.optimizer = {n: torch.optim.SGD(net[i].parameters(), lr=0.1) for i, n in enumerate(("one", "two"))}
        return net

    def step(model: Any, x: Any) -> Any:
        for optimizer in model.optimizer.values():
            model.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
        return loss.detach()

    net, other = made(), made()
    train_model(net, 2, DataLoader(TensorDataset(x), 4), train_step=step, verbose=False, world=world)
    for part in (*x.split(4), *x.split(4)):
        step(other, part)
    assert torch.equal(net[1].weight, other[1].weight)
    assert isinstance(net.optimizer, dict)
