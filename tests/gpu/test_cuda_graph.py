"""Train steps as CUDA graphs: the same numbers as step by step, refusals with their line, and what they gain."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from test_data_and_copies import ROWS, by_hand, data_of, net_of
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from dtrain.distributed.world import bring_up
from dtrain.engine import captured_step, graph_checks
from dtrain.engine.callback import Callbacks, EngineCallback
from dtrain.engine.loop import Engine
from dtrain.engine.options import RunOptions
from dtrain.engine.position import StartPosition
from dtrain.engine.train_step import Task
from dtrain.errors import DtrainError

pytestmark = pytest.mark.usefixtures("deterministic")


@pytest.fixture(autouse=True)
def as_on_a_gpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where this is tried, a tape in place of the graph."""
    if device.type == "cpu":
        monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
        from helpers.tape import Tapes

        monkeypatch.setattr(graph_checks, "graphs_of", lambda _: Tapes())
        adam = importlib.import_module("torch.optim.adam")
        monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda **_: ["cpu"])


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))


def loss_of(model: nn.Module, x: Any, y: Any) -> Any:
    return nn.functional.cross_entropy(model(x), y)


def step(model: nn.Module, x: Any, y: Any) -> Any:
    logits = model(x)
    return nn.functional.cross_entropy(logits, y), (logits.argmax(1) == y).float().mean()


def engine_of(device: torch.device, train_step: Any = step, **how: Any) -> Engine:
    module = how.pop("net", None) or net()
    module.optimizer = how.pop("optimizer", lambda p: AdamW(p, 1e-2))(module.parameters())
    schedule = how.pop("schedule", None)
    x, y = data_of("mlp").tensors
    loader = how.pop("loader", None) or DataLoader(TensorDataset(x[:1000], y[:1000]), 32, shuffle=True)
    scheduler = None if schedule is None else schedule(module.optimizer)
    valid = DataLoader(TensorDataset(x[:200], y[:200]), 50)
    task = Task(module, train_step, loader, train_step, valid, scheduler=scheduler, interval="step")
    run = {"epochs": how.pop("epochs", 3), "callbacks": Callbacks(*how.pop("callbacks", ()))}
    return Engine(task, bring_up(cpu=device.type == "cpu"), options=RunOptions(**{"cuda_graph": True} | how), **run)


def result(engine: Engine) -> Any:
    rows = engine.fit().rows
    aside = ("seconds", "samples_per_second", "gpu_memory_mib")
    numbers = [{k: row[k] for k in row if k not in aside} for row in rows]
    return numbers, [tensor.cpu().clone() for tensor in engine.task.module.state_dict().values()]


def equal(one: Any, other: Any) -> bool:
    return one[0] == other[0] and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def by_step(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k / 10))


RUNS: dict[str, Any] = {
    "schedule, clipping, EMA": {"schedule": by_step, "clip_norm": 0.5, "ema_decay": 0.9},
    "accumulation": {"accumulation": 3, "schedule": by_step, "clip_norm": 0.5},
    "bf16": {"precision": "bf16"},
    "fused AdamW": {"optimizer": lambda p: AdamW(p, 1e-2, fused=True), "schedule": by_step},
    "SGD with momentum": {"optimizer": lambda p: SGD(p, 1e-2, momentum=0.9)},
    "random numbers that go on": {"same_draws": False},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_captured_run_is_the_run_step_by_step(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, note: Callable[..., None]
) -> None:
    engine = engine_of(device, **RUNS[name])
    captured = result(engine)
    assert engine.captured is not None
    assert engine.captured.replayed > 20
    plain = result(engine_of(device, **RUNS[name], cuda_graph=False))
    monkeypatch.setattr(captured_step, "_MOST_GRAPHS", 0)
    assert equal(captured, result(engine_of(device, **RUNS[name])))
    apart = abs(captured[0][-1]["loss"] / plain[0][-1]["loss"] - 1)
    # bf16 and reductions of other kernels: the last digits of a few steps grow.
    assert apart < 5e-2
    note(f"CUDA graph, {name}: dropout, ragged batch, history and weights", "bitwise equal to steps without capture")
    note(f"CUDA graph, {name}: loss apart from train.cuda_graph=false", f"{apart:.1e}")


def test_an_epoch_that_goes_on_in_its_midst_is_the_whole_one(device: torch.device, note: Callable[..., None]) -> None:
    whole, halved = engine_of(device, epochs=1), engine_of(device, epochs=1)
    expected = result(whole)
    state: dict[str, Any] = {}

    class Stop(EngineCallback):
        def on_save_point(self, position: Any) -> None:
            if position.step == 11 and halved.table is not None:
                module: Any = halved.task.module
                state.update(net=module.state_dict(), optimizer=module.optimizer.state_dict())
                state.update(table=halved.table.state())
                raise KeyboardInterrupt

    halved.callbacks.add(Stop())
    with pytest.raises(KeyboardInterrupt):
        halved.fit()
    resumed = engine_of(device, epochs=1)
    module: Any = resumed.task.module
    module.load_state_dict(state["net"])
    module.optimizer.load_state_dict(state["optimizer"])
    resumed.start = StartPosition(skip=11, table=state["table"], randomness=lambda: None)
    resumed.place.updates = 11
    assert equal(result(resumed), expected)
    note("CUDA graph, an epoch that goes on in its midst", "bitwise equal")


def reads_item(model: Any, x: Any, y: Any) -> Any:
    loss = loss_of(model, x, y)
    loss.item()  # HERE
    return loss


def prints(model: Any, x: Any, y: Any) -> Any:
    loss = loss_of(model, x, y)
    print(loss)  # HERE
    return loss


def copies_from_the_cpu(model: Any, x: Any, y: Any) -> Any:
    return loss_of(model, x, y) * torch.tensor([0.5], device=x.device).sum()  # HERE


def waits(model: Any, x: Any, y: Any) -> Any:
    return loss_of(model, x, y) * torch.linalg.inv(torch.eye(2, device=x.device)).sum()  # HERE


def masks(model: Any, x: Any, y: Any) -> Any:
    return loss_of(model, x[y > 0], y[y > 0])  # HERE


@pytest.mark.parametrize(
    "train_step", [reads_item, masks, prints, copies_from_the_cpu, waits], ids=lambda s: s.__name__
)
def test_what_no_graph_can_have_is_refused_with_its_line(
    train_step: Any, device: torch.device, note: Callable[..., None]
) -> None:
    if device.type == "cpu" and train_step not in (reads_item, masks):
        pytest.skip("shows on a GPU alone")
    with pytest.raises(DtrainError) as caught:
        engine_of(device, train_step).fit()
    lines = Path(__file__).read_text().splitlines()
    start = train_step.__code__.co_firstlineno
    line = next(n for n in range(start, start + 6) if lines[n - 1].endswith("# HERE"))
    assert f"{Path(__file__).name}:{line}: the train step" in str(caught.value)
    note(f"CUDA graph, refused with its line: {train_step.__name__}", "yes")


@pytest.mark.parametrize(("kind", "batch", "goal"), [("mlp", 32, 0.12), ("cnn", 128, 0.30)])
def test_what_an_epoch_takes_of_a_hand_written_loops_time(
    kind: str, batch: int, goal: float, device: torch.device, note: Callable[..., None]
) -> None:
    torch.use_deterministic_algorithms(False)
    epochs, pins = (8, True) if device.type == "cuda" else (2, False)

    def plain_step(model: nn.Module, x: Any, y: Any) -> Any:
        loss = nn.functional.cross_entropy(model(x), y)
        return loss, loss.detach()

    loader = DataLoader(data_of(kind), batch, shuffle=True, pin_memory=pins)
    task = Task(net_of(kind), plain_step, loader)
    options = RunOptions(cuda_graph=True)
    rows = Engine(task, bring_up(cpu=device.type == "cpu"), epochs=epochs, options=options).fit().rows
    own = median(row["seconds"] for row in rows[1:])
    by = net_of(kind)
    hand = median([by_hand(by, loader, device) for _ in range(epochs)][1:])
    note(
        f"{kind}, batch {batch}: epoch / hand-written loop, train.cuda_graph (goal {goal})",
        f"{own / hand:.3f}  ({own / (ROWS / batch) * 1e3:.3f} ms a step)",
    )
