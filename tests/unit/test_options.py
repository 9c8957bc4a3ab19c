"""The options that all three styles have: the same names, defaults and checks in each."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dtrain
from dtrain.config.schema import TrainConfig
from dtrain.engine.options import RunOptions
from dtrain.errors import UsageError

OPTIONS = {field.name: field.default for field in fields(RunOptions)}
# What is the call's own, besides: who computes, what is shown, how a batch is read.
OF_THE_CALL = {
    "callbacks",
    "batch_size",
    "split_batch",
    "verbose",
    "cpu",
    "world",
    "num_processes",
    "run",
    "config",
    "epoch_steps",
}


def keywords(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}


def test_both_python_styles_and_the_config_have_the_same_options_and_defaults() -> None:
    function, keras = keywords(dtrain.train_model), keywords(dtrain.KerasModel.fit)
    config = {name: field.default for name, field in TrainConfig.model_fields.items() if name in OPTIONS}
    assert {name: function[name] for name in OPTIONS} == OPTIONS
    assert {name: keras[name] for name in OPTIONS} == OPTIONS
    assert config == OPTIONS
    assert set(keras) == OPTIONS.keys() | OF_THE_CALL | {"plot", "quiet"}  # Keras' words for verbose
    task = {"train_step", "valid_step", "optimizer", "metrics", "valid_together"}
    scheduler = {"scheduler", "scheduler_interval", "scheduler_monitor"}
    assert set(function) == OPTIONS.keys() | OF_THE_CALL | task | scheduler


def test_their_types_are_those_of_the_config() -> None:
    annotations = {name: str(field.type) for name, field in RunOptions.__dataclass_fields__.items()}
    for function in (dtrain.train_model, dtrain.KerasModel.fit):
        signature = inspect.signature(function).parameters
        assert {name: str(signature[name].annotation) for name in OPTIONS} == annotations


WRONG = [
    ({"seed": -1}, "seed = -1: should be a whole number of at least 0"),
    ({"seed": 1.5}, "seed = 1.5"),
    ({"batch": "world"}, "batch = 'world': should be 'per_rank' or 'global'"),
    ({"accumulation": 0}, "accumulation = 0: should be a whole number of at least 1"),
    ({"average": "mean"}, "average = 'mean'"),
    ({"precision": "fp8"}, "precision = 'fp8'"),
    ({"compile": "fast"}, "compile = 'fast'"),
    ({"clip_norm": 0}, "clip_norm = 0"),
    ({"clip_value": -1.0}, "clip_value = -1.0"),
    ({"ema_decay": 1.0}, "ema_decay = 1.0"),
    ({"same_draws": "yes"}, "same_draws = 'yes': should be True, False or None"),
    ({"sync_batchnorm": "yes"}, "sync_batchnorm = 'yes': should be True or False"),
    ({"fetch_batches": 2}, "fetch_batches = 2: should be True or False"),
]


@pytest.mark.parametrize(("given", "told"), WRONG)
def test_a_wrong_value_is_named_before_anything_starts(given: dict[str, Any], told: str) -> None:
    loader = DataLoader(TensorDataset(torch.ones(4, 2), torch.ones(4, 1)), batch_size=2)
    net = nn.Linear(2, 1)

    def step(model: Any, x: Any, y: Any) -> Any:
        raise AssertionError("nothing may start")

    with pytest.raises(UsageError, match=told.replace("(", r"\(")):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        dtrain.train_model(net, 1, loader, train_step=step, optimizer=optimizer, verbose=False, cpu=True, **given)
    with pytest.raises(UsageError, match=told):
        dtrain.KerasModel(net, loss_fn=step).fit(1, loader, verbose=False, cpu=True, **given)


def averaged_by_hand(decay: float, epochs: int, best_of: list[float]) -> list[dict[str, torch.Tensor]]:
    """The averages of the weights after each epoch, by plain torch."""
    net, x, y = problem()
    optimizer = torch.optim.SGD(net.parameters(), 0.3)
    average: dict[str, torch.Tensor] = {}
    after = []
    for _ in range(epochs):
        for start in range(0, len(x), 4):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x[start : start + 4]), y[start : start + 4]).backward()
            optimizer.step()
            for name, value in net.state_dict().items():
                average[name] = value.clone() if name not in average else decay * average[name] + (1 - decay) * value
        after.append({name: value.clone() for name, value in average.items()})
        with torch.no_grad():
            predicted = nn.functional.linear(x, average["weight"], average["bias"])
            best_of.append(float(nn.functional.mse_loss(predicted, y)))
    return after


def problem() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    net = nn.Linear(2, 1).double()
    x = torch.randn(12, 2, dtype=torch.float64)
    return net, x, x.sum(dim=1, keepdim=True) + 0.5


@pytest.mark.parametrize("kept", [False, True])
def test_keras_has_the_average_in_the_end_and_of_the_best_epoch(kept: bool, tmp_path: Any) -> None:
    losses: list[float] = []
    after = averaged_by_hand(0.6, 3, losses)
    worst = max(range(3), key=losses.__getitem__)
    net, x, y = problem()
    model = dtrain.KerasModel(net, nn.functional.mse_loss, optimizer=torch.optim.SGD(net.parameters(), 0.3))
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    more: dict[str, Any] = {"ckpt_path": tmp_path / "best.safetensors", "mode": "max"} if kept else {}
    rows = model.fit(3, loader, loader, ema_decay=0.6, verbose=False, cpu=True, **more)
    assert rows["val_loss"].tolist() == pytest.approx(losses, rel=1e-9)
    expected = after[worst if kept else -1]
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
    if kept:
        other, _, _ = problem()
        dtrain.KerasModel(other, nn.functional.mse_loss).load_ckpt(tmp_path / "best.safetensors")
        torch.testing.assert_close(other.weight, net.weight, rtol=0, atol=0)
