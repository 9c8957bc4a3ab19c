"""What the first train steps show, and what is told where that cannot be."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from helpers.step_programs import BATCH, CALLS, SAMPLES, by_hand, data, flat, fresh_net, loss_of, told_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain.api.function import train_model
from dtrain.distributed.world import World, bring_up
from dtrain.engine.loop import Engine
from dtrain.engine.train_step import Task
from dtrain.errors import StepError


@pytest.fixture(scope="module")
def world() -> World:
    return bring_up(cpu=True)


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
        assert told_of(world, net, step) == ""
        x, y = data()
        for start in range(3 * BATCH, SAMPLES, BATCH):
            expected.optimizer.zero_grad()
            loss_of(expected, x[start : start + BATCH], y[start : start + BATCH]).backward()
            expected.optimizer.step()
        assert flat(net) == flat(expected)


def test_a_step_that_changes_its_kind_is_told_and_loses_no_batch(world: World) -> None:
    def stepping(m: Any, loss: Any) -> Any:
        m.optimizer.zero_grad()
        loss.backward()
        m.optimizer.step()
        return loss  # with what is left of its graph

    def declared_later(m: Any, x: Any, y: Any, calls: list[int]) -> Any:
        loss = loss_of(m, x, y)
        return stepping(m, loss) if len(calls) < 5 else loss

    def imperative_later(m: Any, x: Any, y: Any, calls: list[int]) -> Any:
        loss = loss_of(m, x, y)
        return loss if len(calls) < 5 else stepping(m, loss)

    def another_steps(m: Any, x: Any, y: Any, calls: list[int]) -> Any:
        m.second.zero_grad()
        loss_of(m, x, -y).backward()
        m.second.step()
        return loss_of(m, x, y)

    for step, told, at in (
        (declared_later, "on which backward() was not called", 5),
        (imperative_later, "called model.optimizer.step() itself for this batch", 5),
        (another_steps, "on which backward() was not called", 1),
    ):
        calls: list[int] = []
        net = fresh_net()
        net.second = torch.optim.SGD(net[0].parameters(), lr=0.1)

        def counted(m: Any, x: Any, y: Any, step: Any = step, calls: Any = calls) -> Any:
            calls.append(1)
            return step(m, x, y, calls)

        assert told in told_of(world, net, counted), step.__name__
        assert len(calls) == at


def test_losses_without_a_step_that_were_learnt_from_are_not_told(world: World) -> None:
    """A step that accumulates by itself, and returns its loss as it is; one of weights; one that leaves NaN out."""

    def accumulates(m: Any, x: Any, y: Any) -> Any:
        m.count += 1
        loss = loss_of(m, x, y) / 2
        loss.backward()
        if m.count % 2 == 0:
            m.optimizer.step()
            m.optimizer.zero_grad()
        return loss

    def of_weights(m: Any, x: Any, y: Any) -> Any:
        m.count += 1
        loss = sum(p.sum() for p in m.parameters())
        loss.backward()
        if m.count % 2 == 0:
            m.optimizer.step()
        return loss

    def leaves_out(m: Any, x: Any, y: Any) -> Any:
        m.count += 1
        loss = loss_of(m, x, y) * (float("nan") if m.count == 4 else 1.0)
        if loss.isnan():
            return loss
        m.optimizer.zero_grad()
        loss.backward()
        m.optimizer.step()
        return loss

    for step in (accumulates, of_weights, leaves_out):
        net = fresh_net()
        net.count = 0
        assert told_of(world, net, step) == ""


def test_weights_that_are_moved_by_hand_have_their_remedy(world: World) -> None:
    def by_hand_alone(model: Any, x: Any, y: Any) -> Any:
        model.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.05 * parameter.grad)
        return loss.detach()

    assert "moves the weights itself does so through an optimizer" in told_of(world, fresh_net(), by_hand_alone)


@pytest.mark.parametrize("imperative", [True, False])
def test_a_sum_over_the_samples_is_refused_where_losses_are_averaged(world: World, imperative: bool) -> None:
    mse = nn.functional.mse_loss
    sums = {
        "sum": lambda m, x, y: (m(x) - y).square().sum(),
        "reduction": lambda m, x, y: mse(m(x), y, reduction="sum"),
        "one of two": lambda m, x, y: mse(m(x), y) + (m(x) - y).abs().sum(),
        "times a constant": lambda m, x, y: 0.01 * (m(x) - y).square().sum(),
        "over all": lambda m, x, y: -(-(m(x) - y).square()).sum((0, 1)),
    }
    means = {
        "mean": lambda m, x, y: mse(m(x), y),
        "sum of parts": lambda m, x, y: torch.stack([mse(m(x), y)] * len(x)).sum(),
        "divided": lambda m, x, y: (m(x) - y).square().sum() / len(x),
        "of weights": lambda m, x, y: mse(m(x), y) + m[0].weight.square().sum(),
        "inner": lambda m, x, y: (m(x) - y).square().sum(1).mean(),
    }

    def told(loss_of: Any, **more: Any) -> str:
        def step(m: Any, x: Any, y: Any) -> Any:
            loss = loss_of(m, x, y)
            if not imperative:
                return loss
            m.optimizer.zero_grad()
            loss.backward()
            m.optimizer.step()
            return loss

        return told_of(world, fresh_net(), step, **more)

    for name, loss in sums.items():
        assert "the loss is a sum over the batch's samples" in told(loss, accumulation=2), name
        assert told(loss) == "", name
    for name, loss in means.items():
        assert told(loss, accumulation=2) == "", name


def test_a_step_that_never_learns_is_told_soon(world: World) -> None:
    calls: list[int] = []

    def dead(model: Any, x: Any, y: Any) -> Any:
        calls.append(1)
        return {"lose": loss_of(model, x, y).item()}

    told = told_of(world, fresh_net(), dead)
    assert "does not train: for its first 5 batches" in told
    assert "it returned 'lose', and no value named 'loss'" in told
    assert len(calls) == 5
    few = TensorDataset(*(part[:BATCH] for part in data()))
    with pytest.raises(StepError, match=r"does not train: for its first batch it called .*returned 'lose', and no"):
        train_model(fresh_net(), 1, DataLoader(few, BATCH), train_step=dead, verbose=False, world=world)


def test_a_slip_in_the_name_of_the_loss_is_told_at_once(world: World) -> None:
    calls: list[int] = []

    def slip(model: Any, x: Any, y: Any) -> Any:
        calls.append(1)
        loss = loss_of(model, x, y)
        return {"loss" if len(calls) == 1 and late else "los": loss, "accuracy": 1.0}

    for late in (False, True):
        calls.clear()
        told = told_of(world, fresh_net(), slip)
        assert "returned 'los', 'accuracy', and no value named 'loss'" in told
        assert "Is 'los' a typo?" in told
        assert len(calls) == 1 + late


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
