"""A bench on one rank: what is counted, what is tried, and that nothing is left of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain.config import load_settings
from dtrain.distributed.seeding import random_state
from dtrain.distributed.world import World, bring_up
from dtrain.engine.loop import Engine
from dtrain.engine.train_step import Task
from dtrain.tools.bench import measure
from dtrain.tools.bench.advice import BenchResult, TrialResult
from dtrain.tools.bench.candidates import Candidate, Facts, candidates
from dtrain.tools.bench.engines import varied
from dtrain.tools.bench.measure import Asked, Tell, bench
from dtrain.tools.bench.reads import CountReads
from dtrain.tools.bench.work import CountFlops, MeasureLaunches, Queue, matrix_rate

RECIPE = """
import time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

NETS = []


def build_model(per_sample: float = 0.0, most: int = 0, conv: bool = True):
    first = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3)] if conv else []
    net = nn.Sequential(*first, nn.Flatten(), nn.Linear(16, 1))
    net.per_sample, net.most = per_sample, most
    NETS.append(net)
    return net


def build_dataloaders(samples: int = 64, batch_size: int = 8, num_workers: int = 0, parts: int = 1):
    torch.manual_seed(0)
    more = [torch.ones(samples, 1) for _ in range(parts)]
    data = TensorDataset(torch.randn(samples, 1, 4, 4), *more)
    return DataLoader(data, batch_size=batch_size, shuffle=True, num_workers=num_workers), None


def build_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def build_scheduler(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=60), "step"


def train_step(model, x, *parts):
    if model.most and len(x) > model.most:
        raise ValueError("too many samples")
    time.sleep(model.per_sample * len(x))
    return (model(x) - parts[0]).square().mean()
"""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine several would wait for each other
    yield bring_up(cpu=True)
    torch.set_num_threads(threads)


@pytest.fixture
def run(world: World, tmp_path: Path) -> Callable[..., Any]:
    recipe = tmp_path / f"benched_{tmp_path.name}.py"
    recipe.write_text(RECIPE)

    def call(*words: str, tell: Tell = Tell(), **asked: Any) -> BenchResult:  # noqa: B008
        how = Asked(**{"steps": 10, "began": 0.0, **asked})
        return bench(load_settings(str(recipe), list(words), {}), world, how, tmp_path / "out.json", tell)

    return call


def by_name(found: BenchResult) -> dict[str, TrialResult]:
    return {one.name: one for one in found.results}


# --- what is counted ------------------------------------------------------------------------------------


def reads_of(step: Any, world: World, device: str = "cpu") -> dict[str, float]:
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    net.optimizer = torch.optim.AdamW(net.parameters(), foreach=False)  # type: ignore[assignment]
    loader = DataLoader(TensorDataset(torch.ones(12, 2), torch.ones(12, 1)), batch_size=4)
    engine = Engine(Task(net, step, loader), world, epochs=1)
    reads = CountReads(torch.device(device))
    with engine.callbacks.having(reads):
        engine.train_pass(1)
        engine.train_pass(2)
    engine.learner.close()
    assert reads.steps == 6
    return reads.per_step()


def declarative(model: nn.Module, x: Any, y: Any) -> Any:
    return (model(x) - y).square().mean()


def imperative(model: Any, x: Any, y: Any) -> Any:
    model.optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    model.optimizer.step()
    return loss.detach()


def reading(model: Any, x: Any, y: Any) -> Any:
    loss = imperative(model, x, y)
    if loss > 1e9:  # a first read
        raise AssertionError
    return loss.item()  # a second one


def lines_of(function: Any, *texts: str) -> list[int]:
    lines = Path(__file__).read_text().splitlines()
    first = function.__code__.co_firstlineno
    return [next(n for n, line in enumerate(lines[first:], first + 1) if text in line) for text in texts]


@pytest.mark.parametrize("step", [declarative, imperative])
def test_an_optimizers_own_reads_are_not_the_users(step: Any, world: World) -> None:
    assert reads_of(step, world) == {}


def test_each_read_of_a_step_is_named_with_its_line(world: World) -> None:
    first, second = lines_of(reading, "a first read", "a second one")
    assert reads_of(reading, world) == {f"{shown(first)} (bool)": 1.0, f"{shown(second)} (item)": 1.0}


def shown(line: int) -> str:
    path = Path(__file__)
    return f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}:{line}"


def test_reads_of_tensors_elsewhere_do_not_count(world: World) -> None:
    assert reads_of(reading, world, device="cuda") == {}


def test_the_operations_of_forward_and_backward_are_counted(world: World) -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    net.optimizer = torch.optim.AdamW(net.parameters())  # type: ignore[assignment]
    loader = DataLoader(TensorDataset(torch.ones(20, 8), torch.ones(20, 4)), batch_size=5)
    engine = Engine(Task(net, declarative, loader), world, epochs=1)
    flops = CountFlops()
    with engine.callbacks.having(flops):
        engine.train_pass(1)
    engine.learner.close()
    # Forward; backward of the weights; of the second layer's input.
    assert flops.flops == 2 * 5 * (8 * 16 + 16 * 4) * 2 + 2 * 5 * 16 * 4
    assert not flops.images
    assert matrix_rate(torch.device("cpu"), torch.float32, lambda: None) > 1e7


class FakeQueue:
    """A device that takes 2 s for a step, and a host that takes 5 s to send one."""

    def __init__(self) -> None:
        self.time, self.free = 0.0, 0.0
        self.held: list[float] = []
        self.queue = Queue(self._wait, self._hold, lambda: self.free, lambda a, b: b - a, lambda: self.time)

    def _wait(self) -> None:
        self.time = max(self.time, self.free)

    def _hold(self, seconds: float) -> None:
        self.held.append(seconds)
        self.free = max(self.free, self.time) + seconds

    def send(self) -> None:
        for _ in range(5):
            self.time += 1.0
            self.free = max(self.free, self.time) + 0.4


def test_launches_are_timed_against_a_device_that_never_waits() -> None:
    device = FakeQueue()
    launches = MeasureLaunches(device.queue)
    for _ in range(6):
        launches.on_batch_start(None)  # type: ignore[arg-type]
        device.send()
        launches.on_batch_end(None, {})  # type: ignore[arg-type]
    assert launches.host == 5.0
    assert launches.device == pytest.approx(2.0), "with gaps it would be 4.4"
    assert device.held == [20.0] * 3
    nothing = MeasureLaunches(device.queue)
    assert (nothing.host, nothing.device) == (None, None)


# --- what is tried --------------------------------------------------------------------------------------


def state_of(net: nn.Module) -> Any:
    optimizer: Any = net.optimizer
    tensors = [*net.state_dict().values(), *(v for s in optimizer.state_dict()["state"].values() for v in s.values())]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return [(t.clone(), t.stride()) for t in tensors], groups, id(optimizer), random_state(torch.device("cpu"))


def assert_same(one: Any, other: Any) -> None:
    assert len(one[0]) == len(other[0]) > 10
    assert all(torch.equal(a, b) and s == t for (a, s), (b, t) in zip(one[0], other[0], strict=True))
    assert one[1:3] == other[1:3]
    streams = [(s["python"][1].tolist(), s["numpy"][1].tolist(), s["torch"].tolist()) for s in (one[3], other[3])]
    assert streams[0] == streams[1]


def test_workers_that_cost_more_than_they_fetch_are_found(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[str] = []

    def first(facts: Facts) -> list[Candidate]:
        found = candidates(facts)
        listed.extend(one.name for one in found)
        return found[:1]

    monkeypatch.setattr(measure, "candidates", first)
    announced: list[Any] = []
    tell = Tell(trying=lambda names, seconds: announced.append((names, seconds)))
    found = run("num_workers=1", "parts=30", "samples=80", "conv=false", tell=tell, steps=5)
    tried = by_name(found)
    assert announced[0][0] == [*tried] == ["num_workers=0"]
    assert {"num_workers=0", "fused=True", "batch_size=16"} <= {*listed}
    workers = tried["num_workers=0"]
    assert (workers.verdict, workers.change) == ("faster", "data.num_workers=0"), workers
    assert workers.gain > 1.5, workers
    assert not any(one.why for one in tried.values()), tried
    assert found.reads == {}, "AdamW's own"
    assert found.flops
    assert found.peak
    assert json.loads((tmp_path / "out.json").read_text())["result"]["trials"] == found.trials


def test_nothing_is_advised_where_nothing_helps_and_nothing_is_left_of_the_trials(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    before: list[Any] = []

    def net() -> Any:
        return sys.modules[next(name for name in sys.modules if f"benched_{tmp_path.name}" in name)].NETS[-1]

    files = {*tmp_path.iterdir()}
    found = run("per_sample=0.008", "most=8", tell=Tell(lambda _: before.append(state_of(net()))), steps=5)
    assert_same(before[0], state_of(net()))
    assert {*tmp_path.iterdir()} - files <= {tmp_path / "out.json", tmp_path / "__pycache__"}
    verdicts = {name: one.verdict for name, one in by_name(found).items()}
    assert "faster" not in verdicts.values(), found.trials
    assert verdicts["batch_size=16"] == "skipped"
    assert by_name(found)["batch_size=16"].why == "ValueError: too many samples"
    assert {"fused=True", "channels_last=true"} <= verdicts.keys()


def test_one_sample_is_enough(run: Callable[..., Any]) -> None:
    found = run("samples=1", steps=3)
    assert found.steps >= 3
    assert 0 < found.step_seconds < 10
    assert found.samples_per_second == pytest.approx(1 / found.step_seconds)
    assert "batch_size=16" not in by_name(found), "there is no larger batch"
    assert by_name(found)["fused=True"].verdict != "skipped"


def test_the_trials_end_with_their_time(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run(trials=False).trials == []
    (tmp_path / "out.json").unlink()  # or it would go on with that
    found = run(began=10**12)  # no time has passed, and none is left
    assert {one.why or "no time" for one in found.results} == {"no time"}
    assert all(one.verdict == "skipped" and not one.base for one in found.results)


def test_a_graph_is_tried_and_never_what_is_compared_with(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RECIPE)
    settings = load_settings(str(tmp_path / "mine.py"), ["train.cuda_graph=true"], {})
    task = Task(nn.Linear(1, 1), lambda *_: None, [])
    graph = Candidate("cuda_graph=true", "train.cuda_graph=true", train={"cuda_graph": True})
    for candidate, captured in ((None, False), (graph, True), (Candidate("x", "x", train={"compile": True}), False)):
        assert varied(task, settings, candidate)[1].config.train.cuda_graph is captured
