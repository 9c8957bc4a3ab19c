"""Imperative steps under accumulation: equal to the step on the joined batch, or refused before a wrong one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers.step_programs import (
    BATCH,
    CALLS,
    DOES,
    ORDINARY,
    TO_WEIGHTS,
    UNUSUAL,
    by_dtrain,
    by_hand,
    data,
    flat,
    fresh_net,
    take,
)
from helpers.sweep import FULL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain.api.function import train_model
from dtrain.distributed.world import World, bring_up
from dtrain.errors import StepError

PLAIN = ["zero", "backward", "step"]


@pytest.fixture(scope="module")
def world() -> World:
    return bring_up(cpu=True)


def right_or_refused(world: World, programs: Sequence[Sequence[str]], accumulation: int) -> str:
    """Returns what was told; the weights are then those before the wrong step, else those of plain torch."""
    expected = by_hand(net_for(programs), programs, BATCH * accumulation)
    found, told = by_dtrain(world, net_for(programs), programs, accumulation)
    if told:
        near = [bool(np.allclose(found, weights, rtol=1e-9, atol=1e-12)) for weights in expected]
        assert any(near) or _by_hand_alone(programs), (programs, told)
    elif not told:
        np.testing.assert_allclose(found, expected[-1], rtol=1e-9, atol=1e-12, err_msg=str(programs))
    return told


def _by_hand_alone(programs: Sequence[Sequence[str]]) -> bool:
    """Whether a program changes weights by itself, which nobody can hold back."""
    return any(TO_WEIGHTS & set(program) for program in programs)


def net_for(programs: Sequence[Sequence[str]]) -> Any:
    return fresh_net(scheduled=any("schedule" in program for program in programs))


@pytest.mark.parametrize(
    "program",
    [
        PLAIN,
        ["net zero", "backward", "step"],
        ["zero to zeros", "backward", "step"],
        ["backward", "step", "zero"],
        ["backward", "step", "zero to zeros"],
        ["backward", "step"],  # gradients that are never cleared
        ["zero", "backward", "backward of another", "step"],
        ["zero", "net zero", "backward", "step", "zero"],
    ],
)
@pytest.mark.parametrize("accumulation", [2, 4])
def test_what_adds_up_is_the_step_on_the_joined_batch(world: World, program: list[str], accumulation: int) -> None:
    assert right_or_refused(world, [program], accumulation) == ""


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (["zero", "backward", "climb", "zero", "backward", "step"], "clears the gradients between"),  # SAM
        (["zero", "backward", "climb by data", "zero", "backward", "step"], "clears the gradients between"),
        (["zero", "backward", "step", "zero", "backward of another", "step"], "twice"),
        (["zero", "backward", "climb", "backward", "step"], "changes the weights by itself ("),
        (["zero", "backward", "climb by data", "step"], "changes the weights by itself ("),
        (["zero", "backward", "step", "clamp"], "changes the weights by itself"),
        (["closure"], "closure"),
        (["clear", "backward", "step"], "clears the gradient of"),
        (["zero", "backward", "clear", "backward", "step"], "clears the gradient of"),
        (["zero", "backward", "clip", "step"], "changes the gradients after backward()"),
        (["zero", "backward", "clip by data", "step"], "changes the gradients after backward()"),
        (["zero", "backward", "normalise", "step"], "changes the gradients after backward()"),
        (["zero", "backward", "assign", "step"], "changes the gradients after backward()"),
        (["zero", "by grad", "step"], "torch.autograd.grad"),
        (["zero", "backward", "step", "schedule"], "a scheduler of its own (StepLR)"),
        (["zero", "backward", "schedule", "step"], "a scheduler of its own (StepLR)"),
        (["backward"], "as if it accumulated itself"),
        (["step", "zero", "backward"], "without a backward() before it"),
    ],
)
def test_what_does_not_add_up_is_refused_before_a_weight_changed(world: World, program: list[str], told: str) -> None:
    found, words = by_dtrain(world, net_for([program]), [program], 2)
    assert told in words
    assert "Set train.accumulation=1" in words or "set train.accumulation=1" in words
    if not _by_hand_alone([program]):
        assert found == by_hand(fresh_net(), [PLAIN], 6)[0]
    for later in (1, 2):  # the same from a later group on
        found, words = by_dtrain(world, net_for([program]), [*[PLAIN] * later, program], 2)
        assert told in words or "gradient" in words
        if not _by_hand_alone([program]):
            np.testing.assert_allclose(found, by_hand(fresh_net(), [PLAIN], 6)[later], rtol=1e-9)


def test_a_batch_that_is_left_out_is_refused(world: World) -> None:
    found, words = by_dtrain(world, fresh_net(), [["nothing"]], 2)
    assert "does not train: for its first batch" in words
    assert "dtrain.Mean(0 * total, 0)" in words
    found, words = by_dtrain(world, fresh_net(), [PLAIN, ["nothing"]], 2)
    assert "left a batch out" in words
    np.testing.assert_allclose(found, by_hand(fresh_net(), [PLAIN], 6)[1], rtol=1e-9)


def refused(world: World, net: Any, step: Any, epochs: int = 1) -> str:
    """Returns what a step was told; its net is as it was, or has taken the first epoch alone where there are two."""
    loader = DataLoader(TensorDataset(*data()), BATCH)
    first = flat(net)
    try:
        train_model(net, epochs, loader, train_step=step, accumulation=2, verbose=False, world=world)
    except StepError as error:
        if epochs == 1:
            assert flat(net) == first
        return str(error)
    return ""


def usual(model: Any, x: Any, y: Any) -> Any:
    return take(model, x, y, PLAIN)


def test_another_optimizer_is_refused_before_it_steps(world: World) -> None:
    net = fresh_net()
    net.second = torch.optim.Adam(net[2].parameters(), lr=0.1)
    epochs: list[int] = []

    def both(model: Any, x: Any, y: Any) -> Any:
        loss = take(model, x, y, PLAIN)
        model.second.step()
        return loss

    def from_the_second_epoch(model: Any, x: Any, y: Any) -> Any:
        epochs.append(1)
        if len(epochs) <= CALLS:
            return take(model, x, y, PLAIN)
        model.second.zero_grad()
        loss = take(model, x, y, ["backward"])
        model.second.step()
        return loss

    assert "steps an optimizer (Adam)" in refused(world, net, both)
    net = fresh_net()
    net.second = torch.optim.Adam(net[2].parameters(), lr=0.1)
    assert "steps an optimizer (Adam)" in refused(world, net, from_the_second_epoch, epochs=2)
    np.testing.assert_allclose(flat(net), by_hand(fresh_net(), [PLAIN], 6)[-1], rtol=1e-9)


def test_what_counts_its_calls_is_refused(world: World) -> None:
    net = fresh_net()
    net.seen = 0
    rates = iter(range(100))

    def counts(model: Any, x: Any, y: Any) -> Any:
        model.seen += 1
        return take(model, x, y, PLAIN)

    def sets_rates(model: Any, x: Any, y: Any) -> Any:
        model.optimizer.param_groups[0]["lr"] = 0.1 / (1 + next(rates))
        return take(model, x, y, PLAIN)

    assert "adds to model.seen (0, then 1)" in refused(world, net, counts)
    assert "changes the optimizer's options itself (lr)" in refused(world, fresh_net(), sets_rates)


def test_what_a_returned_loss_counts_is_said_or_refused(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Declarative steps, which are called once for each micro-batch as well."""
    average, rates = fresh_net(), iter(range(100))

    def loss_of(model: Any, x: Any, y: Any) -> Any:
        return ((model(x) - y) ** 2).mean()

    def counts(model: Any, x: Any, y: Any) -> Any:
        model.seen += 1
        return loss_of(model, x, y) * (1 if model.seen % 4 else 2)

    def averages(model: Any, x: Any, y: Any) -> Any:
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(parameter, 0.5)
        return loss_of(model, x, y)

    def sets_rates(model: Any, x: Any, y: Any) -> Any:
        model.optimizer.param_groups[0]["lr"] = 0.1 / (1 + next(rates))
        return loss_of(model, x, y)

    net = fresh_net()
    net.seen = 0
    assert refused(world, net, counts) == ""  # as in a loop written by hand; it is said
    (record,) = [record for record in caplog.records if "adds to model.seen" in record.message]
    assert "this counts micro-batches" in record.message
    assert "changes average, an average of the weights" in refused(world, fresh_net(), averages)
    assert "changes the optimizer's options itself (lr)" in refused(world, fresh_net(), sets_rates)
    assert refused(world, fresh_net(), loss_of) == ""


COUNTED = {"steps": 0}


def test_what_counts_in_other_places_is_refused(world: World) -> None:
    net = fresh_net()
    net.register_buffer("calls", torch.zeros((), dtype=torch.int64))
    average = copy.deepcopy(net)
    shadow = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}

    class Trainer:
        number = samples = 0

        def __init__(self) -> None:
            self.number = 0

        def step(self, model: Any, x: Any, y: Any) -> Any:
            self.number += 1
            return take(model, x, y, PLAIN)

        def counts_samples(self, model: Any, x: Any, y: Any) -> Any:
            self.samples += len(x)
            return take(model, x, y, PLAIN)

    def in_a_buffer(model: Any, x: Any, y: Any) -> Any:
        model.calls += 1
        return take(model, x, y, PLAIN)

    def in_a_mapping(model: Any, x: Any, y: Any) -> Any:
        COUNTED["steps"] += 1
        return take(model, x, y, PLAIN)

    def averages(model: Any, x: Any, y: Any) -> Any:
        loss = take(model, x, y, PLAIN)
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(parameter, 0.5)
        return loss

    def averages_anew(model: Any, x: Any, y: Any) -> Any:
        loss = take(model, x, y, PLAIN)
        for name, parameter in model.named_parameters():
            shadow[name] = 0.5 * shadow[name] + 0.5 * parameter.detach()
        return loss

    assert "adds to self.number (0, then 1)" in refused(world, fresh_net(), Trainer().step)
    assert refused(world, fresh_net(), Trainer().counts_samples) == ""
    assert "adds to model.calls (0, then 1)" in refused(world, net, in_a_buffer)
    assert "adds to COUNTED['steps'] (0, then 1)" in refused(world, fresh_net(), in_a_mapping)
    assert "changes average, an average of the weights" in refused(world, fresh_net(), averages)
    assert "changes shadow, an average of the weights" in refused(world, fresh_net(), averages_anew)


def test_hooks_that_change_a_part_are_refused_and_others_are_not(world: World) -> None:
    seen: list[float] = []
    net = fresh_net()
    net[0].weight.register_hook(lambda grad: seen.append(float(grad.norm())))
    assert refused(world, net, usual) == ""
    assert len(seen) == CALLS
    assert flat(net) == pytest.approx(by_hand(fresh_net(), [PLAIN], 6)[-1], rel=1e-9)
    net = fresh_net()
    net[0].weight.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    assert "a hook that changes the gradient" in refused(world, net, usual)
    assert len(net[0].weight._backward_hooks) == 1, "the user's own hook, as it was"
    net = fresh_net()
    net[0].weight.register_post_accumulate_grad_hook(lambda p: nn.utils.clip_grad_value_(p, 0.01))
    assert "a hook of its own" in refused(world, net, usual)


def test_changes_that_raise_no_version_are_refused(world: World) -> None:
    def by_numpy(model: Any, x: Any, y: Any) -> Any:
        model.optimizer.zero_grad()
        loss = take(model, x, y, ["backward"])
        model[0].weight.grad.numpy()[:] *= 0.5
        model.optimizer.step()
        return loss

    def there_and_back(model: Any, x: Any, y: Any) -> Any:
        """After the groups that are compared in any case."""
        calls.append(1)
        model.optimizer.zero_grad()
        loss = take(model, x, y, ["backward"])
        if len(calls) > 2 * CALLS:
            far = 0.5 * model[0].weight.grad
            model[0].weight.data.add_(far)
            other = ((model(x) - y) ** 2).mean()
            if len(calls) % 2:
                model[0].weight.data.sub_(far)
            other.backward()
            if not len(calls) % 2:
                model[0].weight.data.sub_(far)
        model.optimizer.step()
        return loss

    def by_setting(model: Any, x: Any, y: Any) -> Any:
        loss = take(model, x, y, PLAIN)
        model[0].weight.data = model[0].weight.data * 0.9
        return loss

    calls: list[int] = []

    def later(model: Any, x: Any, y: Any) -> Any:
        calls.append(1)
        clipped = ["zero", "backward", "clip by data", "step"]
        return take(model, x, y, clipped if len(calls) > 4 * CALLS else PLAIN)

    for begun in (0, 1):
        calls = [0] * begun
        assert "changes the weights by itself (0.weight)" in refused(world, fresh_net(), there_and_back, epochs=4)
        assert len(calls) == 2 * CALLS + 1
    calls = []
    assert "changes the gradients after backward()" in refused(world, fresh_net(), by_numpy)
    assert "changes the weights by itself" in _changed(world, by_setting)
    net = fresh_net()
    assert "changes the gradients after backward()" in refused(world, net, later, epochs=5)
    expected = fresh_net()
    for _ in range(4):
        by_hand(expected, [PLAIN], 6)
    np.testing.assert_allclose(flat(net), flat(expected), rtol=1e-9)


def _changed(world: World, step: Any) -> str:
    with pytest.raises(StepError) as caught:
        loader = DataLoader(TensorDataset(*data()), BATCH)
        train_model(fresh_net(), 1, loader, train_step=step, accumulation=2, verbose=False, world=world)
    return str(caught.value)


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"capturable": False}])
def test_any_optimizer_that_steps_alone_is_right(world: World, options: dict[str, Any]) -> None:
    nets = [fresh_net() for _ in range(2)]
    for net in nets:
        net.optimizer = torch.optim.Adam(net.parameters(), lr=0.05, weight_decay=0.1, **options)
    assert refused(world, nets[0], usual) == ""
    np.testing.assert_allclose(flat(nets[0]), by_hand(nets[1], [PLAIN], 6)[-1], rtol=1e-9)


def test_data_is_torchs_own_afterwards(world: World) -> None:
    assert by_dtrain(world, fresh_net(), [PLAIN], 2)[1] == ""
    assert "data" not in torch.Tensor.__dict__
    assert torch.ones(2, requires_grad=True).data.requires_grad is False


def programs() -> Any:
    ordinary = st.lists(st.sampled_from(ORDINARY), min_size=2, max_size=6)
    unusual = st.lists(st.sampled_from([*ORDINARY, *UNUSUAL]), min_size=1, max_size=6)
    return st.lists(st.one_of(st.just(PLAIN), ordinary, unusual), min_size=1, max_size=3)


@settings(
    max_examples=600 if FULL else 60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(programs=programs(), accumulation=st.sampled_from([2, 3]))
def test_any_order_is_right_or_refused(world: World, programs: list[list[str]], accumulation: int) -> None:
    right_or_refused(world, programs, accumulation)


def test_the_programs_are_all_tried() -> None:
    assert set(ORDINARY) | set(UNUSUAL) == set(DOES)
