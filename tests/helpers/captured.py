"""Engines whose train steps are captured on a tape (`helpers.tape`), and what comes of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, TensorDataset

import dtrain
from dtrain.distributed.world import bring_up
from dtrain.engine import graph_checks
from dtrain.engine.callback import Callbacks, EngineCallback
from dtrain.engine.loop import Engine
from dtrain.engine.options import RunOptions
from dtrain.engine.train_step import Task
from dtrain.model.ema import WeightAverage
from helpers.tape import Tapes


def with_tapes(monkeypatch: pytest.MonkeyPatch) -> Tapes:
    """Has tapes take the place of CUDA graphs, and the CPU count as a device whose optimizers can be captured."""
    made = Tapes()
    monkeypatch.setattr(graph_checks, "graphs_of", lambda _: made)
    for name in ("adam", "rmsprop"):
        module = importlib.import_module(f"torch.optim.{name}")
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda **_: ["cpu"])
    return made


class Net(nn.Module):
    def __init__(self, dropout: float = 0.3, *, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        middle = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.layers = nn.Sequential(nn.Linear(6, 8), middle, nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))
        self.register_buffer("seen", torch.zeros(()))
        self.number = 0.5
        self.hidden = torch.zeros(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def data(rows: int = 76) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(torch.randn(rows, 6, generator=generator), torch.randint(3, (rows,), generator=generator))


def step(model: Any, x: Any, y: Any) -> Any:
    model.seen.add_(1)
    logits = model(x)
    return nn.functional.cross_entropy(logits, y), (logits.argmax(1) == y).float().mean()


def token_step(model: Any, x: Any, y: Any) -> Any:
    kept = (y > 0).float()
    loss = (nn.functional.cross_entropy(model(x), y, reduction="none") * kept).sum()
    return {"loss": dtrain.Mean(loss, kept.sum()), "kept": kept.mean()}


def observed_step(model: Any, x: Any, y: Any) -> Any:
    logits = model(x)
    return {"loss": nn.functional.cross_entropy(logits, y), "accuracy": (logits, y)}


def by_step(optimizer: Optimizer) -> Any:
    return schedules.LambdaLR(optimizer, lambda k: 1 / (1 + k))


def by_epoch(optimizer: Optimizer) -> Any:
    return schedules.StepLR(optimizer, 1, 0.5)


class Watcher(EngineCallback):
    """Keeps what a user's callback is given."""

    def __init__(self) -> None:
        self.losses: list[Any] = []

    def on_batch_end(self, batch: Any, values: Any) -> None:
        self.losses.append(values["loss"].detach())


def engine_of(
    train_step: Any = step,
    optimizer: Callable[[Any], Optimizer] = lambda p: AdamW(p, 1e-2),
    schedule: Any = None,
    *callbacks: EngineCallback,
    net: Net | None = None,
    loader: Any = None,
    validates: bool = True,
    interval: Any = "step",
    metrics: Any = None,
    epochs: int = 2,
    val_every_steps: int | None = None,
    **options: Any,
) -> Engine:
    net = Net() if net is None else net
    net.optimizer = optimizer(net.parameters())  # type: ignore[assignment]
    scheduler = None if schedule is None else schedule(net.optimizer)
    loader = DataLoader(data(), 8, shuffle=True) if loader is None else loader
    valid = (train_step, DataLoader(data(), 16)) if validates else (None, None)
    task = Task(net, train_step, loader, *valid, scheduler=scheduler, interval=interval)
    task.metrics = metrics or {}
    options.setdefault("cuda_graph", True)
    return Engine(
        task,
        bring_up(cpu=True),
        epochs=epochs,
        options=RunOptions(**options),
        callbacks=Callbacks(*callbacks),
        val_every_steps=val_every_steps,
    )


def result(engine: Engine) -> Any:
    rows = engine.fit().rows
    net, average = engine.task.module, engine.average
    numbers = [{k: row[k] for k in row if k not in ("seconds", "samples_per_second")} for row in rows]
    within = [{k: row[k] for k in row if k != "seconds"} for row in engine.validations.rows]
    tensors = [*net.state_dict().values(), *tensors_of(net.optimizer.state_dict()["state"])]  # type: ignore[union-attr]
    tensors += average.trained().values() if isinstance(average, WeightAverage) else []
    groups = [{k: g[k] for k in g if k != "params"} for g in net.optimizer.param_groups]  # type: ignore[union-attr]
    return numbers, within, groups, engine.place.updates, [tensor.clone() for tensor in tensors]


def tensors_of(part: Any) -> Iterator[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, dict):
        for one in part.values():
            yield from tensors_of(one)


def equal(one: Any, other: Any) -> bool:
    return one[:4] == other[:4] and all(torch.equal(a, b) for a, b in zip(one[4], other[4], strict=True))
