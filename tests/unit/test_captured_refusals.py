"""What no graph of a train step can have is refused, with its line; the same tape as in test_captured_step.py."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.captured import (
    Net,
    by_step,
    data,
    engine_of,
    step,
    with_tapes,
)
from helpers.tape import Tapes
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader

from dtrain.distributed.world import bring_up
from dtrain.engine import captured_step, graph_checks
from dtrain.engine.callback import EngineCallback
from dtrain.engine.loop import Engine
from dtrain.engine.options import RunOptions
from dtrain.engine.step_trace import StepTrace
from dtrain.engine.train_step import Task
from dtrain.errors import DtrainError, StepError, UsageError

CPU = torch.device("cpu")
HERE = Path(__file__).name


@pytest.fixture(autouse=True)
def tapes(monkeypatch: pytest.MonkeyPatch) -> Tapes:
    return with_tapes(monkeypatch)


# --- what is refused ------------------------------------------------------------------------------------------


def failure(**how: Any) -> str:
    with pytest.raises(DtrainError) as caught:
        engine_of(**how).fit()
    return str(caught.value)


def loss_of(model: Any, x: Any, y: Any) -> Any:
    return nn.functional.cross_entropy(model(x), y)


def reads_item(model: Any, x: Any, y: Any) -> Any:
    loss = loss_of(model, x, y)
    loss.item()  # HERE
    return loss


def reads_bool(model: Any, x: Any, y: Any) -> Any:
    if model(x).sum() > 0:  # HERE
        pass
    return loss_of(model, x, y)


def reads_in_backward(model: Any, x: Any, y: Any) -> Any:
    out = model(x)
    out.register_hook(lambda grad: grad * float(grad.norm()))  # HERE
    return nn.functional.cross_entropy(out, y)


def changes_the_batch(model: Any, x: Any, y: Any) -> Any:
    x[:, 0].add_(1)  # HERE
    return loss_of(model, x, y)


def masks(model: Any, x: Any, y: Any) -> Any:
    kept = y > 0
    return nn.functional.cross_entropy(model(x)[kept], y[kept])  # HERE


def counts(model: Any, x: Any, y: Any) -> Any:
    model.number *= 0.9
    return loss_of(model, x, y) * model.number  # HERE


def branches(model: Any, x: Any, y: Any) -> Any:
    model.number = -model.number
    loss = loss_of(model, x, y)
    return loss + 1 if model.number > 0 else loss * 2  # HERE


def draws_in_python(model: Any, x: Any, y: Any) -> Any:
    random.random()
    return loss_of(model, x, y)


def carries(model: Any, x: Any, y: Any) -> Any:
    loss = loss_of(model, x, y) + model.hidden.sum() * 0  # HERE
    model.hidden = loss.detach()[None]
    return loss


def replaces_a_buffer(model: Any, x: Any, y: Any) -> Any:
    model.seen = model.seen + 1  # HERE
    return loss_of(model, x, y) + model.seen * 0


def own_generator(model: Any, x: Any, y: Any) -> Any:
    noise = torch.rand(len(x), 6, generator=torch.Generator().manual_seed(3))  # HERE
    return loss_of(model, x + noise, y)


def moves_generators(model: Any, x: Any, y: Any) -> Any:
    torch.utils.checkpoint.checkpoint(model.layers, x, use_reentrant=False)  # HERE
    return loss_of(model, x, y)


def returns_a_number(model: Any, x: Any, y: Any) -> Any:
    return {"loss": loss_of(model, x, y), "rate": 0.1}


def imperative(model: Any, x: Any, y: Any) -> Any:
    model.optimizer.zero_grad()
    loss = loss_of(model, x, y)
    loss.backward()
    model.optimizer.step()
    return loss.detach()


REFUSED: dict[Any, str] = {
    reads_item: "reads a value of the device on the CPU (_local_scalar_dense",
    reads_bool: "reads a value of the device on the CPU",
    reads_in_backward: "reads a value of the device on the CPU",
    changes_the_batch: "changes a tensor of the batch in place (aten::add_), and a graph has a copy of it",
    masks: "indexes with a mask (aten::index), which the CPU has to wait for",
    counts: "computes mul with the Python number 0.4",
    branches: "in one step and",
    draws_in_python: "draws from Python's random, on the CPU",
    carries: "reads in sum a tensor that is another one at each step",
    replaces_a_buffer: "reads in add a tensor that is another one at each step",
    own_generator: "draws from a torch.Generator of its own",
    moves_generators: "reads or sets the state of a random generator, as activation checkpointing does",
    returns_a_number: "returns 'rate' as a Python number",
    imperative: "calls backward() and optimizer.step() itself. Return the loss",
}


@pytest.mark.parametrize("train_step", REFUSED, ids=lambda one: one.__name__)
def test_what_no_graph_can_have_is_refused_with_its_line(train_step: Any, tapes: Tapes) -> None:
    message = failure(train_step=train_step)
    assert REFUSED[train_step] in message
    assert message.startswith("train.cuda_graph: ")
    assert message.endswith("or set train.cuda_graph=false.")
    assert "capture" not in tapes.log
    code = train_step.__code__
    marked = [n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.endswith("# HERE")]
    for line in marked:
        if code.co_firstlineno <= line <= code.co_firstlineno + 5:
            assert f"{HERE}:{line}: the train step" in message


OPTIMIZERS: dict[str, Any] = {
    "Adagrad is not known to be capturable. Use one of torch.optim's Adam, AdamW, RMSprop, SGD,": torch.optim.Adagrad,
    "LBFGS is not known to be capturable": torch.optim.LBFGS,
    "Own is not known to be capturable": type("Own", (AdamW,), {}),
    "AdamW has lr = 0.1": lambda p: AdamW(p, torch.tensor(0.1)),
    "AdamW has differentiable=True": lambda p: AdamW(p, differentiable=True),
}


@pytest.mark.parametrize("told", OPTIMIZERS)
def test_optimizers_that_no_graph_can_have(told: str) -> None:
    with pytest.raises(UsageError, match=r"train\.cuda_graph") as caught:
        engine_of(optimizer=OPTIMIZERS[told])
    assert told in str(caught.value)


def test_hooks_of_the_optimizer_would_not_be_called() -> None:
    engine = engine_of()
    handle = engine.task.module.optimizer.register_step_post_hook(lambda *_: None)  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="registered as a hook of optimizer steps"):
        engine.fit()
    handle.remove()
    net = Net()
    original = AdamW(net.parameters())
    original.step = lambda: None  # type: ignore[method-assign,assignment]
    with pytest.raises(UsageError, match=r"AdamW\.step was replaced"):
        engine_of(net=net, optimizer=lambda _: original)


def test_an_option_that_changes_at_each_step() -> None:
    cycle = lambda o: schedules.OneCycleLR(o, 0.1, total_steps=40)  # noqa: E731
    told = failure(schedule=cycle)
    assert "train.cuda_graph: betas of group 0 changed 4 times within one epoch" in told
    assert "cycle_momentum=False" in told
    engine_of(schedule=lambda o: schedules.OneCycleLR(o, 0.1, total_steps=40, cycle_momentum=False)).fit()
    told = failure(optimizer=lambda p: SGD(p, 0.1), schedule=by_step)
    assert "lr of group 0 changed 4 times" in told
    assert "fused=True" in told


@pytest.mark.parametrize("at", [30, 70])
def test_a_number_that_a_callback_changes_is_found(at: int) -> None:
    """In the midst of a long pass, and before another pass."""

    class Changes(EngineCallback):
        def on_step_end(self, _: Any) -> None:
            if engine.place.updates == at:
                engine.task.module.number = 0.25

    def scaled(model: Any, x: Any, y: Any) -> Any:
        return loss_of(model, x, y) * model.number

    engine = engine_of(scaled, AdamW, None, Changes(), loader=DataLoader(data(800), 8), epochs=1)
    with pytest.raises(StepError, match=r"computes mul with the Python number 0\.5 in one step and 0\.25"):
        engine.fit()


def test_another_optimizer_is_refused() -> None:
    class Swaps(EngineCallback):
        def on_step_end(self, _: Any) -> None:
            engine.task.module.optimizer = SGD(engine.task.module.parameters(), 0.1)  # type: ignore[assignment]

    engine = engine_of(step, AdamW, None, Swaps())
    with pytest.raises(UsageError, match=r"model\.optimizer was replaced"):
        engine.fit()


@pytest.mark.parametrize(
    ("batches", "told"),
    [
        ([(torch.ones(2, 6), torch.ones(2).long(), n) for n in range(20)], "17 batches had as many structures"),
        ([(torch.ones(n + 1, 6), torch.ones(n + 1).long(), 0) for n in range(20)], "17 batches had as many structures"),
        ([(torch.ones(2, 6), torch.ones(2).long(), random.Random(1))], "a batch has a Random, of which"),
        ([(torch.ones(2, 6), torch.ones(2).long(), torch.eye(2).to_sparse())], "sparse, nested or not on cpu"),
    ],
    ids=["numbers", "shapes", "objects", "sparse"],
)
def test_batches_that_no_graph_can_have(batches: Any, told: str) -> None:
    assert told in failure(train_step=lambda model, x, y, _: loss_of(model, x, y), loader=batches, validates=False)


def test_nested_batches_and_one_tensor_twice(tapes: Tapes, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data().tensors
    batches = [({"x": part, "again": [part]}, {"y": y[k : k + 8]}, "text") for k, part in enumerate(x[:64].split(8))]

    def nested(model: Any, one: Any, other: Any, text: str) -> Any:
        assert text == "text"
        assert one["again"][0] is one["x"]
        return loss_of(model, one["again"][0], other["y"])

    results = []
    for most in (8, 0):
        monkeypatch.setattr(captured_step, "_MOST_GRAPHS", most)
        copies = [({"x": (own := a["x"].clone()), "again": [own]}, b, t) for a, b, t in batches]
        results.append(engine_of(nested, loader=copies, validates=False, epochs=1))
        results[-1].fit()
    one, other = (list(engine.task.module.parameters()) for engine in results)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert tapes.log.count("replay") == 4


@pytest.mark.parametrize(
    ("has", "told"),
    [
        ({"size": 2}, "is for one rank, and there are 2"),
        ({"scaler": object()}, "cannot have fp16"),
        ({"clock": object()}, "train.compile exclude each other"),
        ({"skips": True}, "cannot have train.nan=skip"),
        ({"net": nn.ModuleDict({"rnn": nn.LSTM(2, 2, 2, dropout=0.5)})}, "the dropout within rnn (LSTM)"),
    ],
)
def test_before_training(has: dict[str, Any], told: str) -> None:
    learner: Any = SimpleNamespace(
        scaler=has.get("scaler"),
        replica=SimpleNamespace(clock=has.get("clock")),
        finite=SimpleNamespace(skips=has.get("skips", False)),
    )
    world: Any = SimpleNamespace(size=has.get("size", 1), device=CPU)
    net = has.get("net", nn.LSTM(2, 2))
    with pytest.raises(UsageError) as caught:
        graph_checks.graphs_for(RunOptions(cuda_graph=True), world, learner, net)
    assert told in str(caught.value)
    assert caught.value.on_all_ranks
    assert graph_checks.graphs_for(RunOptions(), world, learner, net) is None


def test_on_the_cpu_and_without_an_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="needs to know the optimizer"):
        Engine(Task(Net(), step, DataLoader(data(), 8)), bring_up(cpu=True), 1, RunOptions(cuda_graph=True))
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"needs a CUDA GPU, and this rank computes on cpu\. Set train\.cuda_graph=fa"):
        engine_of()


# --- where tensors are ----------------------------------------------------------------------------------------


def test_tensors_of_the_cpu_in_a_step_of_another_device() -> None:
    """The meta device stands for the GPU."""
    device = torch.device("meta")
    x, on_cpu = torch.ones(3, device=device), torch.ones(3)

    def refused(function: Callable[[], Any]) -> str:
        with pytest.raises(StepError) as caught, StepTrace(device, [x]):
            function()
        return str(caught.value)

    assert "uses a tensor of the CPU (aten::mul), whose values of now a graph would keep" in refused(
        lambda: x * torch.tensor(2.0)
    )
    assert "uses a tensor of the CPU" in refused(lambda: on_cpu.to(device))
    with StepTrace(device, [x]) as trace:
        (x * 2 + torch.full((3,), 0.5, device=device)).sum()
    assert [one.function.name() for one in trace.operations] == [
        "aten::mul.Tensor",
        "aten::full",
        "aten::add.Tensor",
        "aten::sum",
    ]
