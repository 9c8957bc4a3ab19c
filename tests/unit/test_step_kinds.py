"""What the first train steps show, which optimizer is stepped, and what is told where that cannot be."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from helpers.step_programs import BATCH, CALLS, SAMPLES, by_hand, data, flat, fresh_net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain.engine import Engine
from dtrain.errors import CheckpointError, StepError
from dtrain.learning import Task
from dtrain.resuming.roles import role_of, told_apart
from dtrain.training import train_model
from dtrain.world import World, bring_up


@pytest.fixture(scope="module")
def world() -> World:
    return bring_up(cpu=True)


def train(world: World, net: Any, step: Any, epochs: int = 1, **more: Any) -> str:
    """Returns what a step was told."""
    loader = DataLoader(TensorDataset(*data()), BATCH)
    try:
        train_model(net, epochs, loader, train_step=step, verbose=False, world=world, **more)
    except StepError as error:
        return str(error)
    return ""


def loss_of(model: Any, x: Any, y: Any) -> Any:
    return ((model(x) - y) ** 2).mean()


def test_first_batches_that_are_left_out_do_not_decide_the_kind(world: World) -> None:
    for imperative in (True, False):
        calls: list[int] = []

        def step(model: Any, x: Any, y: Any, calls: list[int] = calls, imperative: bool = imperative) -> Any:
            calls.append(1)
            if len(calls) <= 3:
                return 0.0
            loss = loss_of(model, x, y)
            if not imperative:
                return loss
            model.optimizer.zero_grad()
            loss.backward()
            model.optimizer.step()
            return loss.detach()

        net, expected = fresh_net(), fresh_net()
        assert train(world, net, step) == ""
        x, y = data()
        for start in range(3 * BATCH, SAMPLES, BATCH):
            expected.optimizer.zero_grad()
            loss_of(expected, x[start : start + BATCH], y[start : start + BATCH]).backward()
            expected.optimizer.step()
        assert flat(net) == flat(expected)


def test_a_step_that_never_learns_is_told_soon(world: World) -> None:
    calls: list[int] = []

    def dead(model: Any, x: Any, y: Any) -> Any:
        calls.append(1)
        return {"lose": loss_of(model, x, y).item()}

    told = train(world, fresh_net(), dead)
    assert "never learns: for its first 5 batches" in told
    assert "it returned 'lose', and no value named 'loss'" in told
    assert len(calls) == 5
    few = TensorDataset(*(part[:BATCH] for part in data()))
    with pytest.raises(StepError, match=r"never learns: for its first batch it called .*returned 'lose', and no"):
        train_model(fresh_net(), 1, DataLoader(few, BATCH), train_step=dead, verbose=False, world=world)


def test_a_slip_in_the_name_of_the_loss_is_told_at_once(world: World) -> None:
    calls: list[int] = []

    def slip(model: Any, x: Any, y: Any) -> Any:
        calls.append(1)
        loss = loss_of(model, x, y)
        return {"loss" if len(calls) == 1 and late else "los": loss, "accuracy": 1.0}

    for late in (False, True):
        calls.clear()
        told = train(world, fresh_net(), slip)
        assert "returned 'los', 'accuracy', and no value named 'loss'" in told
        assert "Is 'los' a typo?" in told
        assert len(calls) == 1 + late


def test_an_optimizer_that_needs_a_closure_is_refused_for_a_loss(world: World) -> None:
    net = fresh_net()
    net.optimizer = torch.optim.LBFGS(net.parameters())
    before = flat(net)
    assert "def closure()" in train(world, net, loss_of)
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

    assert train(world, net, step, accumulation=accumulation) == ""
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
    told = train(world, net, adam, scheduler=scheduler, scheduler_interval="step")
    assert (
        "replaced (by Adam), and the scheduler (StepLR) still sets the learning rates of the previous one (SGD)" in told
    )
    outside = torch.nn.Linear(1, 1)
    assert "none of the net's parameters" in train(
        world, fresh_net(), becomes(lambda _: torch.optim.Adam(outside.parameters()))
    )
    assert "model.optimizer was set to str" in train(world, fresh_net(), becomes(lambda _: "adam"))
    assert "def closure()" in train(world, fresh_net(), becomes(lambda m: torch.optim.LBFGS(m.parameters())))


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


def test_a_limit_that_is_not_reached_is_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    def step(model: Any, x: Any, y: Any) -> Any:
        loss = loss_of(model, x, y)
        (loss / 2).backward()
        model.seen = not getattr(model, "seen", False)
        if not model.seen:
            model.optimizer.step()
            model.optimizer.zero_grad()
        return loss.detach()

    engine = Engine(Task(fresh_net(), step, DataLoader(TensorDataset(*data()), BATCH)), world, 1, max_steps=CALLS)
    with caplog.at_level(logging.WARNING, "dtrain"):
        engine.fit()
    assert engine.place.updates == CALLS // 2
    assert f"with {CALLS // 2} of train.max_steps={CALLS} optimizer steps" in caplog.text


def test_plain_runs_save_no_gradients_and_watch_none(world: World) -> None:
    def step(model: Any, x: Any, y: Any) -> Any:
        model.optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        model.optimizer.step()
        return loss.detach()

    net = fresh_net()
    engine = Engine(Task(net, step, DataLoader(TensorDataset(*data()), BATCH)), world, 1)
    engine.fit()
    waiting = engine.learner.steps.waiting
    assert not waiting.watching
    assert waiting.found(engine.learner.optimizers()) == {}
    assert all(not p._post_accumulate_grad_hooks for p in net.parameters())
    assert flat(net) == by_hand(fresh_net(), [["zero", "backward", "step"]], BATCH)[-1]


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
        assert told_apart([net.optimizer, *two], was, engine.task) == [one]


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
