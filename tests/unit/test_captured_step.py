"""A train step as a graph: the same run as step by step, and what no graph can have is refused with its line.

A tape of torch's operations stands for the CUDA graph (`helpers.tape`): it is recorded without being done, and played
again on the same memory, so that all else is as on a GPU. On a GPU: tests/gpu/test_cuda_graph.py.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchmetrics
from helpers.tape import Tapes
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, TensorDataset

import dtrain
from dtrain.distributed.world import bring_up
from dtrain.engine import captured_step, graph_checks
from dtrain.engine.callback import Callbacks, EngineCallback
from dtrain.engine.loop import Engine
from dtrain.engine.options import RunOptions
from dtrain.engine.position import StartPosition
from dtrain.engine.step_trace import StepTrace
from dtrain.engine.train_step import Task
from dtrain.errors import DtrainError, StepError, UsageError
from dtrain.model.ema import WeightAverage

CPU = torch.device("cpu")
HERE = Path(__file__).name


@pytest.fixture(autouse=True)
def tapes(monkeypatch: pytest.MonkeyPatch) -> Tapes:
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
