"""What optimizers keep of a net's parameters comes with the net to its device; torch's own rules are the measure.

torch's device "meta" stands in for a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import dtrain
from dtrain.api.prepared import PROCESS
from dtrain.distributed.world import World, bring_up
from dtrain.engine.options import RunOptions
from dtrain.engine.train_step import Learner, Task
from dtrain.model import optimizer_modes

KINDS: dict[str, Callable[[Any], Optimizer]] = {
    "made at once": torch.optim.Adagrad,
    "stepped": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "count on the CPU": torch.optim.AdamW,
    "fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "capturable": torch.optim.AdamW,
    "factored": torch.optim.Adafactor,
    "lists": torch.optim.LBFGS,
}


def made(kind: str, net: nn.Module) -> Optimizer:
    """An optimizer with a state, on the CPU."""
    optimizer = KINDS[kind](net.parameters())
    if kind != "made at once":
        for _ in range(2):
            loss = net(torch.ones(3, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(lambda loss=loss: loss)
    optimizer.param_groups[0]["capturable"] = kind == "capturable"  # which torch cannot step with on the CPU
    if kind in ("stepped", "factored"):
        state = optimizer.state[net[0].weight]
        state |= {name: value.double() for name, value in state.items() if name != "step"}
    return optimizer


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A world that computes on another device, to which parameters move as to a GPU: in place."""
    world = replace(bring_up(cpu=True), device=torch.device("meta"))
    monkeypatch.setattr(PROCESS, "world", world)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield world
    torch.__future__.set_swap_module_params_on_conversion(before)


def fresh() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1))


def places(state: Any) -> Any:
    """A state with each tensor's device in its place."""
    if isinstance(state, dict):
        return {key: places(value) for key, value in state.items()}
    if isinstance(state, list):
        return [places(value) for value in state]
    return state.device.type if isinstance(state, torch.Tensor) else state


def types(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: types(value) for key, value in state.items()}
    return getattr(state, "dtype", None)


def prepared(net: nn.Module, optimizer: Optimizer, world: World) -> None:
    dtrain.prepare(net, optimizer, DataLoader(TensorDataset(torch.ones(4, 4)), 2))


def prepared_without(net: nn.Module, optimizer: Optimizer, world: World) -> None:
    dtrain.prepare(net, DataLoader(TensorDataset(torch.ones(4, 4)), 2))


def learning(net: nn.Module, optimizer: Optimizer, world: World) -> None:
    Learner(Task(net, print, [], optimizer=optimizer), world, RunOptions()).close()


def learning_with_several(net: nn.Module, optimizer: Optimizer, world: World) -> None:
    net.optimizer = [optimizer]  # type: ignore[assignment]
    Learner(Task(net, print, []), world, RunOptions()).close()


MOVES = (prepared, prepared_without, learning, learning_with_several)


@pytest.mark.parametrize(
    ("kind", "move"), [(kind, learning) for kind in KINDS] + [("made at once", move) for move in MOVES]
)
def test_a_state_comes_to_the_net(elsewhere: World, kind: str, move: Callable[..., None]) -> None:
    net = fresh()
    optimizer = made(kind, net)
    assert "meta" not in str(places(optimizer.state_dict()["state"]))
    was, groups = types(optimizer.state_dict()["state"]), optimizer.param_groups
    move(net, optimizer, elsewhere)
    assert {p.device.type for group in optimizer.param_groups for p in group["params"]} == {"meta"}
    theirs = copy.copy(optimizer)
    theirs.load_state_dict(optimizer.state_dict())
    assert places(optimizer.state_dict()["state"]) == places(theirs.state_dict()["state"])
    assert "meta" in str(places(optimizer.state_dict()["state"]))
    assert types(optimizer.state_dict()["state"]) == was, "none is rounded"
    assert optimizer.param_groups is groups, "which a schedule may hold"


def test_another_nets_optimizer_stays_as_it_is(elsewhere: World) -> None:
    net, other = fresh(), fresh()
    optimizer = made("made at once", other)
    dtrain.prepare(net, DataLoader(TensorDataset(torch.ones(4, 4)), 2))
    assert net[0].weight.is_meta
    assert "meta" not in str(places(optimizer.state_dict()))


def test_all_objects_are_looked_through_only_where_an_optimizer_of_the_process_switches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Switching(torch.optim.SGD):
        def train(self) -> None: ...
        def eval(self) -> None: ...

    net = nn.Linear(1, 1)
    known, own = torch.optim.SGD(net.parameters()), Switching(net.parameters())
    for kinds, found in (([AcceleratedOptimizer, torch.optim.SGD], []), ([AcceleratedOptimizer, Switching], [own])):
        monkeypatch.setattr(optimizer_modes, "_kinds", lambda _, kinds=kinds: kinds)
        assert optimizer_modes.switching_of(net, known) == found
