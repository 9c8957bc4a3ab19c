"""A train step as a graph: the same run as step by step, and what no graph can have is refused with its line.

A tape of torch's operations stands for the CUDA graph (`helpers.tape`): it is recorded without being done, and played
again on the same memory, so that all else is as on a GPU. On a GPU: tests/gpu/test_cuda_graph.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from helpers.captured import (
    Net,
    Watcher,
    by_epoch,
    by_step,
    data,
    engine_of,
    equal,
    observed_step,
    result,
    step,
    token_step,
    with_tapes,
)
from helpers.tape import Tapes
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.utils.data import DataLoader

from dtrain.engine import captured_step
from dtrain.engine.callback import EngineCallback
from dtrain.engine.position import StartPosition

CPU = torch.device("cpu")
HERE = Path(__file__).name


@pytest.fixture(autouse=True)
def tapes(monkeypatch: pytest.MonkeyPatch) -> Tapes:
    return with_tapes(monkeypatch)


RUNS: dict[str, Any] = {
    "dropout, a schedule by step, clipping, an average": {
        "schedule": by_step,
        "clip_norm": 0.5,
        "ema_decay": 0.9,
    },
    "foreach, a schedule, clipping by value": {
        "optimizer": lambda p: Adam(p, 1e-2, foreach=True, amsgrad=True),
        "schedule": by_step,
        "clip_value": 0.01,
    },
    "fused": {"optimizer": lambda p: AdamW(p, 1e-2, fused=True), "schedule": by_step},
    "fused SGD, a schedule by step": {
        "optimizer": lambda p: SGD(p, 1e-2, momentum=0.9, fused=True),
        "schedule": by_step,
    },
    "SGD, a schedule by epoch": {
        "optimizer": lambda p: SGD(p, 1e-2, momentum=0.9),
        "schedule": by_epoch,
        "interval": "epoch",
    },
    "RMSprop": {"optimizer": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.1)},
    "accumulation with a rest": {
        "accumulation": 3,
        "schedule": by_step,
        "clip_norm": 0.5,
        "ema_decay": 0.9,
        "loader": lambda: DataLoader(data(148), 8),
    },
    "bf16 and BatchNorm": {"net": lambda: Net(norm=True), "precision": "bf16"},
    "equal weights (SWA)": {"swa_from": 0.4},
    "a loss with counts": {"train_step": token_step},
    "a torchmetrics object": {
        "train_step": observed_step,
        "metrics": lambda: {"accuracy": torchmetrics.Accuracy("multiclass", num_classes=3)},
    },
    "validation within the epochs": {"val_every_steps": 7, "ema_decay": 0.9},
    "random numbers that go on": {"same_draws": False},
}


PLAIN = [*[*RUNS][:2], "accumulation with a rest", "a loss with counts"]


def arguments(name: str) -> dict[str, Any]:
    made = {"net": Net, "metrics": dict} | RUNS[name]
    return made | {key: made[key]() for key in ("net", "metrics", "loader") if key in made}


@pytest.mark.parametrize("name", RUNS)
def test_a_captured_run_is_the_run_step_by_step(name: str, tapes: Tapes, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(**arguments(name))
    captured = result(engine)
    # 10 batches an epoch, the last one ragged: the first is compared, and before the first capture two more.
    few = {"SGD, a schedule by epoch": 2, "accumulation with a rest": 3}
    assert tapes.log.count("capture") == few.get(name, 1)
    assert tapes.log.count("replay") >= 8
    plain = result(engine_of(**arguments(name), cuda_graph=False)) if name in PLAIN else None
    monkeypatch.setattr(captured_step, "_MOST_GRAPHS", 0)  # the same, without any capture
    eager = result(engine_of(**arguments(name)))
    assert equal(captured, eager)
    if plain is None:
        return
    # `capturable` has torch compute with float32 where it does so with Python's numbers.
    torch.testing.assert_close(captured[4], plain[4], rtol=2e-4, atol=1e-6)
    for own, other in zip(captured[0], plain[0], strict=True):
        assert own == pytest.approx(other, rel=1e-4)
        assert own["lr"] == other["lr"]
    assert captured[2:4] == plain[2:4]


def test_an_epoch_that_goes_on_in_its_midst_is_the_whole_one(tapes: Tapes) -> None:
    whole, halved = engine_of(epochs=1), engine_of(epochs=1)
    expected = result(whole)
    state: dict[str, Any] = {}

    class Stop(EngineCallback):
        def on_save_point(self, position: Any) -> None:
            if position.step == 7:
                net = halved.task.module
                state.update(net=net.state_dict(), optimizer=net.optimizer.state_dict(), table=halved.table.state())  # type: ignore[union-attr]
                raise KeyboardInterrupt

    halved.callbacks.add(Stop())
    with pytest.raises(KeyboardInterrupt):
        halved.fit()
    assert tapes.log.count("replay") == 5 + 4
    net = Net()
    resumed = engine_of(net=net, epochs=1)
    net.load_state_dict(state["net"])
    net.optimizer.load_state_dict(state["optimizer"])  # type: ignore[union-attr]
    resumed.start = StartPosition(skip=7, table=state["table"], randomness=lambda: None)
    resumed.place.updates = 7
    assert equal(result(resumed), expected)


def test_what_a_callback_keeps_is_not_written_over(tapes: Tapes) -> None:
    watcher = Watcher()
    engine_of(step, lambda p: AdamW(p, 1e-2), None, watcher).fit()
    captured = [float(loss) for loss in watcher.losses]
    watcher = Watcher()
    engine_of(step, lambda p: AdamW(p, 1e-2), None, watcher, cuda_graph=False).fit()
    assert captured == pytest.approx([float(loss) for loss in watcher.losses], rel=1e-4)
    assert len(set(captured)) == len(captured)
    assert tapes.log.count("replay") > 10


def test_the_optimizer_is_the_users_between_steps_and_afterwards() -> None:
    rates = []

    class Sees(EngineCallback):
        def on_step_end(self, _: Any) -> None:
            group = engine.task.module.optimizer.param_groups[0]  # type: ignore[union-attr]
            rates.append((group["lr"], group["capturable"]))

    engine = engine_of(step, lambda p: AdamW(p, 0.125), by_step, Sees(), epochs=1)
    engine.fit()
    assert rates == [(0.125 / (k + 2), False) for k in range(10)]


def test_what_a_callback_changes_between_steps_is_captured_anew(tapes: Tapes, monkeypatch: pytest.MonkeyPatch) -> None:
    class Changes(EngineCallback):
        def on_epoch_start(self, epoch: int) -> None:
            net = engine.task.module
            net.layers[0].requires_grad_(epoch != 2)  # type: ignore[index,union-attr]
            net.optimizer.param_groups[0]["weight_decay"] = 0.01 * epoch  # type: ignore[union-attr]

        def on_step_end(self, position: Any) -> None:
            engine.task.module.layers[3].train(position.step < 6)  # type: ignore[index,union-attr]

    results = []
    for most in (8, 0):
        monkeypatch.setattr(captured_step, "_MOST_GRAPHS", most)
        engine = engine_of(step, lambda p: AdamW(p, 1e-2), None, Changes(), loader=DataLoader(data(112), 8))
        results.append(result(engine))
    assert equal(*results)
    assert tapes.log.count("capture") >= 4


def test_a_graph_that_adds_to_another_ones_gradients(tapes: Tapes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two micro-batches the first is long or short in turn: the second one's graph knows the gradients of one."""
    generator = torch.Generator().manual_seed(2)
    lengths = [length for k in range(12) for length in ((2, 2), (3, 2))[k % 2]]
    batches = [(torch.randn(4, n, 6, generator=generator), torch.ones(4).long()) for n in lengths]

    def pooled(model: Any, x: Any, y: Any) -> Any:
        return nn.functional.cross_entropy(model(x).mean(1), y)

    weights = []
    for most in (8, 0):
        monkeypatch.setattr(captured_step, "_MOST_GRAPHS", most)
        engine = engine_of(pooled, loader=batches, validates=False, epochs=1, accumulation=2)
        engine.fit()
        weights.append([p.detach().clone() for p in engine.task.module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert tapes.log.count("capture") == 3
    assert tapes.log.count("replay") > 6
