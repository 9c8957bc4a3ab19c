"""Data on the GPU and copies beside the steps: the same numbers, no wait, and what they gain."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dtrain.data import device_data
from dtrain.data.device_data import Card
from dtrain.distributed.world import bring_up
from dtrain.engine.callback import Callbacks, EngineCallback
from dtrain.engine.loop import Engine
from dtrain.engine.metrics import MeanTable
from dtrain.engine.options import RunOptions
from dtrain.engine.train_step import Task
from dtrain.recipes.digits import DigitsNet

ROWS, BATCH = 4096, 128


pytestmark = pytest.mark.usefixtures("deterministic")


@pytest.fixture(autouse=True)
def card(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(device_data, "card_of", lambda there: Card(there, lambda: 1 << 33))


def net_of(kind: str) -> nn.Module:
    torch.manual_seed(1)
    net = (
        nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))
        if kind == "mlp"
        else DigitsNet(dropout=0.1)
    )
    net.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)  # type: ignore[assignment]
    return net


def data_of(kind: str) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    shape = (ROWS, 64) if kind == "mlp" else (ROWS, 1, 32, 32)
    return TensorDataset(torch.randn(shape, generator=generator), torch.randint(10, (ROWS,), generator=generator))


def step(model: nn.Module, x: Any, y: Any) -> Any:
    loss = nn.functional.cross_entropy(model(x), y)
    return loss, loss.detach()


def train(net: nn.Module, loader: Any, device: torch.device, *more: EngineCallback, epochs: int = 2, **how: Any) -> Any:
    options = RunOptions(**how)
    task = Task(net, step, loader, step, loader)
    engine = Engine(
        task, bring_up(cpu=device.type == "cpu"), epochs=epochs, options=options, callbacks=Callbacks(*more)
    )
    rows = engine.fit().rows
    numbers = [{name: row[name] for name in ("loss", "val_loss")} for row in rows]
    return engine, rows, (numbers, [parameter.detach().cpu() for parameter in net.parameters()])


def equal(one: Any, other: Any) -> bool:
    return one[0] == other[0] and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_data_on_the_gpu_give_the_same_run_to_the_last_bit(
    kind: str, device: torch.device, note: Callable[..., None]
) -> None:
    results = []
    for wanted in ("auto", False):
        loader = DataLoader(data_of(kind), BATCH, shuffle=True, pin_memory=device.type == "cuda")
        engine, rows, result = train(
            net_of(kind), loader, device, data_on_device=wanted, prefetch_to_device=wanted == "auto"
        )
        assert engine.train_loader.on_device.startswith("train (" if wanted == "auto" else "")
        results.append(result)
        if device.type == "cuda":
            assert rows[0]["gpu_memory_mib"] > 1
    assert equal(*results)
    note(f"{kind}: data on the GPU, history and weights", "bitwise equal")


class Nested(Dataset[Any]):
    """Large samples, nested, of which the sum says whose they are."""

    def __init__(self, rows: int, width: int) -> None:
        self.rows, self.width = rows, width

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Any:
        return {"x": (torch.full((self.width,), float(index)), index), "name": str(index)}


@pytest.mark.parametrize("workers", [0, 2])
def test_no_copy_is_overtaken(workers: int, device: torch.device, note: Callable[..., None]) -> None:
    """Each batch is whole when its step reads it, also after much work that it had to wait for."""
    width, rows = (1 << 18, 256) if device.type == "cuda" else (1 << 10, 64)
    net = nn.Linear(1, 1)
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.0)  # type: ignore[assignment]
    work = torch.ones(2048 if device.type == "cuda" else 8, device=device).expand(
        2048 if device.type == "cuda" else 8, -1
    )
    wrong = torch.zeros((), device=device)

    def check(model: nn.Module, batch: Any) -> Any:
        nonlocal wrong
        x, index = batch["x"]
        product = work.contiguous()
        for _ in range(20):
            product = product @ work.contiguous() / 2048
        wrong = wrong + (x != index[:, None]).sum() + product[0, 0] * 0
        x.add_(1)  # what the allocator gives to a later copy too early would be seen there
        return model(index[:, None].float()).mean() * 0, wrong.detach()

    loader = DataLoader(Nested(rows, width), 16, shuffle=True, num_workers=workers)
    task = Task(net, check, loader)
    engine = Engine(task, bring_up(cpu=device.type == "cpu"), epochs=3)
    engine.fit()
    assert int(wrong) == 0
    note(f"copies beside the steps, {workers} workers: numbers that were overtaken", int(wrong))


class Images(Dataset[Any]):
    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Any:
        return torch.full((3, 224, 224), index / self.rows), index % 10


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3 if n == 0 else 64, 64, 3, padding=1, stride=2 if n < 2 else 1) for n in range(6)]
        self.layers = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Any) -> Any:
        return self.head(self.layers(x).mean((2, 3)))


def test_copies_overlap_with_the_steps(gpu: torch.device, note: Callable[..., None]) -> None:
    """By the profiler: the time of copies to the GPU in which a kernel ran."""
    from torch.profiler import ProfilerActivity, profile

    net = Convolutions()
    net.optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)  # type: ignore[assignment]
    loader = DataLoader(Images(1024), 64, num_workers=4)
    task = Task(net, step, loader)
    engine = Engine(task, bring_up(), epochs=2)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        engine.fit()
        torch.cuda.synchronize()
    spans = [
        (e.time_range.start, e.time_range.end, e.name) for e in profiled.events() if str(e.device_type).endswith("CUDA")
    ]
    copies = [span for span in spans if "HtoD" in span[2] and span[1] - span[0] > 100]
    kernels = sorted(span for span in spans if "Memcpy" not in span[2] and "Memset" not in span[2])
    hidden = sum(_covered(start, end, kernels) for start, end, _ in copies)
    share = hidden / max(sum(end - start for start, end, _ in copies), 1e-9)
    note(f"{len(copies)} large copies to the GPU: share of their time in which a kernel ran", f"{share:.2f}")
    assert len(copies) >= 16
    assert share > 0.3


def _covered(start: float, end: float, kernels: list[Any]) -> float:
    total, reached = 0.0, start
    for begin, stop, _ in kernels:
        if stop > reached and begin < end:
            total += max(0.0, min(stop, end) - max(begin, reached))
            reached = max(reached, min(stop, end))
    return total


class Strict(EngineCallback):
    def on_pass_start(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")


@pytest.mark.parametrize("wanted", ["auto", False])
def test_no_step_waits_for_the_gpu(
    wanted: Any, gpu: torch.device, monkeypatch: pytest.MonkeyPatch, note: Callable[..., None]
) -> None:
    reduce = MeanTable.reduce

    def at_the_end(*arguments: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        return reduce(*arguments)

    monkeypatch.setattr(MeanTable, "reduce", at_the_end)
    torch.use_deterministic_algorithms(False)
    loader = DataLoader(data_of("cnn"), BATCH, shuffle=True)  # of 512 KiB a batch: copied beside the steps
    try:
        train(net_of("cnn"), loader, gpu, Strict(), data_on_device=wanted)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    note(f"waits for the GPU within a pass, data_on_device={wanted}", 0)


def by_hand(net: nn.Module, loader: Any, device: torch.device) -> float:
    """Seconds of an epoch of the loop that an expert writes."""
    net.to(device).train()
    optimizer: Any = net.optimizer
    began = time.perf_counter()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in loader:
        x, y = (part.to(device, non_blocking=True) for part in batch)
        loss = nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(y)
    total.item()
    return time.perf_counter() - began


@pytest.mark.parametrize(("kind", "batch"), [("mlp", 32), ("cnn", 128)])
def test_what_an_epoch_takes_of_a_hand_written_loops_time(
    kind: str, batch: int, device: torch.device, note: Callable[..., None]
) -> None:
    torch.use_deterministic_algorithms(False)
    epochs, pins = (6, True) if device.type == "cuda" else (2, False)
    seconds = {}
    for name, how in (
        ("data on the GPU", {}),
        ("copies beside", {"data_on_device": False}),
        ("plain", {"data_on_device": False, "prefetch_to_device": False}),
    ):
        loader = DataLoader(data_of(kind), batch, shuffle=True, pin_memory=pins)
        rows = train_only(net_of(kind), loader, device, epochs, **how)
        seconds[name] = median(row["seconds"] for row in rows[1:])
    loader = DataLoader(data_of(kind), batch, shuffle=True, pin_memory=pins)
    net = net_of(kind)
    hand = median([by_hand(net, loader, device) for _ in range(epochs)][1:])
    for name, own in seconds.items():
        note(
            f"{kind}, batch {batch}: epoch / hand-written loop, {name}",
            f"{own / hand:.3f}  ({own / (ROWS / batch) * 1e3:.3f} ms a step)",
        )


def train_only(net: nn.Module, loader: Any, device: torch.device, epochs: int, **how: Any) -> Any:
    task = Task(net, step, loader)
    return Engine(task, bring_up(cpu=device.type == "cpu"), epochs=epochs, options=RunOptions(**how)).fit().rows


def test_a_rank_s_device_is_that_of_its_tensors(gpu: torch.device) -> None:
    """Accelerate's own has no number, so that no tensor's device would equal it."""
    world = bring_up()
    assert world.device == torch.ones(1).to(world.accelerator.device).device == torch.device("cuda", gpu.index)
