"""Copies of batches beside the steps: their order, what is handed over, and that nothing of the run is changed by them.

The streams are made up here, and a copy is a clone. On a GPU: tests/gpu.
"""

from __future__ import annotations

import contextlib
from collections import UserDict, namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dtrain.data.partition import RankBatch
from dtrain.distributed.world import bring_up
from dtrain.engine import passes
from dtrain.engine.callback import Callbacks, EngineCallback
from dtrain.engine.device_copy import BatchMover, mover_of, parts_of, pinned
from dtrain.engine.loop import Engine
from dtrain.engine.options import RunOptions
from dtrain.engine.position import StartPosition
from dtrain.engine.train_step import Task

CPU = torch.device("cpu")
Pair = namedtuple("Pair", "x y")


class FakeStreams:
    """Notes what is done, in order."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.inside = False
        self.marks = 0

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def pin(self, part: Any) -> Any:
        assert self.inside
        self.log.append("pin")
        return part.clone() if isinstance(part, torch.Tensor) else part

    def mark(self) -> int:
        assert self.inside
        self.marks += 1
        return self.marks

    def hand_over(self, mark: int, parts: Any) -> None:
        assert not self.inside
        self.log.append(("hand over", mark, [id(part) for part in parts]))

    def pace(self) -> None:
        self.log.append("pace")


def cloned(batch: Any) -> Any:
    """What stands for Accelerate's send_to_device."""
    if isinstance(batch, torch.Tensor):
        return batch.clone()
    if isinstance(batch, (dict, UserDict)):
        return type(batch)({key: cloned(part) for key, part in batch.items()})
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "to"):
        parts = [cloned(part) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def mover(streams: FakeStreams, least: int = 0) -> BatchMover:
    def send(batch: Any) -> Any:
        streams.log.append("copy beside" if streams.inside else "copy")
        return cloned(batch)

    return BatchMover(CPU, streams, send, least)


def test_a_copy_is_handed_over_with_all_of_its_memory() -> None:
    streams = FakeStreams()
    batch = {"a": [torch.ones(2), (torch.zeros(3), "text")], "b": Pair(torch.ones(1), None), "c": 4}
    moved = mover(streams)(batch)
    assert streams.log[0] == "pace"
    assert streams.log[1:5] == ["pin", "pin", "pin", "copy beside"]
    own = [moved["a"][0], moved["a"][1][0], moved["b"].x]
    assert streams.log[5] == ("hand over", 1, [id(tensor) for tensor in own])
    assert (type(moved["b"]), moved["a"][1][1], moved["c"]) == (Pair, "text", 4)
    assert all(tensor is not source for tensor, source in zip(own, parts_of(batch) or [], strict=True))


class Movable:
    def to(self, *_: Any, **__: Any) -> Movable:
        return self


class Graph(Movable):
    def pin_memory(self) -> Graph:
        return self

    def record_stream(self, _: Any) -> None: ...


def test_what_is_not_known_to_be_safe_goes_the_plain_way() -> None:
    for batch in (
        [torch.ones(3), Movable()],
        [torch.ones(3).to_sparse()],
    ):
        streams = FakeStreams()
        mover(streams)(batch)
        assert streams.log == ["copy"]
    streams = FakeStreams()
    mover(streams, least=13)([torch.ones(3)])  # 12 bytes
    mover(streams, least=12)([torch.ones(3)])
    assert [one for one in streams.log if str(one).startswith("copy")] == ["copy", "copy beside"]
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    assert [id(part) for part in parts_of([Graph(), packed]) or []][1:] == [id(packed.data), id(packed.batch_sizes)]


def test_pinning_keeps_types_and_gradients_and_the_users_own_objects() -> None:
    class Encoding(UserDict):  # type: ignore[type-arg]
        extra = 0

    leaf = torch.ones(2, requires_grad=True)
    source = Encoding({"x": torch.ones(2), "y": [leaf]})
    source.extra = 5
    twice = lambda tensor: tensor * 2  # noqa: E731
    made = pinned((source, Pair(torch.ones(1), 1), torch.nn.Parameter(torch.ones(1))), twice)
    assert (type(made), type(made[0]), made[0].extra, type(made[1])) == (tuple, Encoding, 5, Pair)
    assert made[0]["x"].tolist() == [2, 2]
    assert source["x"].tolist() == [1, 1]
    assert made[0]["y"][0] is leaf
    assert made[1].x.tolist() == [2]
    assert type(made[2]) is torch.nn.Parameter


def test_where_memory_cannot_be_pinned_it_is_said_once_and_the_copy_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    streams = FakeStreams()

    def refused(_: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory")

    streams.pin = refused  # type: ignore[method-assign]
    move = mover(streams)
    for _ in range(2):
        assert move([torch.ones(2)])[0].tolist() == [1, 1]
    assert caplog.text.count("cannot be copied to pinned memory") == 1


def shares(count: int, log: list[Any], fails: int | None = None) -> Iterator[RankBatch]:
    for number in range(count):
        if number == fails:
            raise ValueError(f"batch {number}")
        log.append(f"fetch {number}")
        yield RankBatch([torch.tensor([number])], 1, 1, 1.0)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_ahead_each_batch_comes_once_and_its_copy_begins_before_the_step_before_it(count: int) -> None:
    streams, log = FakeStreams(), []
    streams.log = log
    seen = []
    for share in mover(streams).ahead(shares(count, log)):
        seen.append(share.batch[0].item())
        log.append(f"step {seen[-1]}")
    assert seen == list(range(count))
    order = [one for one in log if str(one).startswith(("fetch", "step", "copy"))]
    for number in range(1, count):
        begun = order.index(f"fetch {number}")
        assert order[begun + 1] == "copy beside"
        assert begun < order.index(f"step {number - 1}")
    assert sum("hand over" in str(one) for one in log) == count


@pytest.mark.parametrize("fails", [0, 1, 3])
def test_ahead_an_error_of_the_loader_comes_where_its_batch_would(fails: int) -> None:
    log: list[Any] = []
    seen = []
    with pytest.raises(ValueError, match=f"batch {fails}"):
        for share in mover(FakeStreams()).ahead(shares(5, log, fails)):
            seen.append(share.batch[0].item())
    assert seen == list(range(fails))


class Numbers(Dataset[Any]):
    """Draws at random, where a worker or this process fetches."""

    def __len__(self) -> int:
        return 14

    def __getitem__(self, index: int) -> Any:
        x = torch.randn(3) * 0.1 + index
        return x, x.sum()[None]


class Stream(IterableDataset[Any]):
    """Knows where it is."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[Any]:
        while self.place < 14:
            self.place += 1
            x = torch.randn(3) + self.place
            yield x, x.sum()[None]
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class Noted(EngineCallback):
    """Keeps what a checkpoint would hold of the loader, where it would be saved."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_start(self, engine: Engine) -> None:
        self.engine = engine
        engine.train_loader.sources.kept = True

    def on_save_point(self, position: Any) -> None:
        loader = self.engine.train_loader
        states = {name: state["state"] for name, state in loader.sources.states().items() if "sampler" not in name}
        place = loader.place
        self.seen.append((str(position), place and place["read"], str(states), torch.get_rng_state().sum().item()))


def run(loader: Any, skip: int = 0, **more: Any) -> tuple[Any, Any]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1))
    net.optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)  # type: ignore[assignment]

    def step(model: Any, x: Any, y: Any) -> Any:
        return (model(x) - y).square().mean(), x.mean()

    noted = Noted()
    task = Task(net, step, loader, step, DataLoader(Numbers(), 4))
    options = RunOptions(**more)
    engine = Engine(task, bring_up(cpu=True), epochs=2, options=options, max_steps=5, callbacks=Callbacks(noted))
    engine.start = StartPosition(skip=skip, randomness=(lambda: None) if skip else None)
    rows = engine.fit().rows
    timeless = [{key: row[key] for key in row if key not in ("seconds", "samples_per_second")} for row in rows]
    return (timeless, [parameter.tolist() for parameter in net.parameters()]), noted.seen


LOADERS = {
    "workers": lambda: DataLoader(Numbers(), 4, shuffle=True, num_workers=2),
    "this process": lambda: DataLoader(Numbers(), 4, shuffle=True),
    "stream": lambda: DataLoader(Stream(), 4),
    "list": lambda: [(torch.ones(3, 3), torch.ones(3, 1))] * 4,
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_run_and_what_is_saved_of_it_are_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(LOADERS[kind]())
    streams = FakeStreams()
    monkeypatch.setattr(passes, "mover_of", lambda _, prefetch: mover(streams) if prefetch else None)
    assert run(LOADERS[kind]()) == plain
    handed = [one for one in streams.log if "hand over" in str(one)]
    copied = [one for one in streams.log if one == "copy beside"]
    ahead = kind == "workers"  # what was read ahead as max_steps was reached
    assert len(copied) - len(handed) == (1 if ahead else 0)
    resumed = run(LOADERS[kind](), skip=2)
    assert resumed[1][0][0].endswith("epoch 1, train step 3")
    streams.log.clear()
    assert run(LOADERS[kind](), skip=2, prefetch_to_device=False) == resumed
    assert streams.log == []


def test_nothing_is_read_ahead_where_somebody_could_tell() -> None:
    def engine_of(loader: Any, **more: Any) -> Engine:
        net = nn.Linear(3, 1)
        net.optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)  # type: ignore[assignment]
        return Engine(Task(net, lambda *_: None, loader), bring_up(cpu=True), epochs=1, **more)

    workers = {"num_workers": 1, "batch_size": 4}
    assert engine_of(DataLoader(Numbers(), shuffle=True, **workers)).train_loader.reads_ahead
    assert not engine_of(DataLoader(Numbers(), **workers), epoch_steps=2).train_loader.reads_ahead
    own = [
        DataLoader(Numbers(), 4),
        DataLoader(Stream(), **workers),
        DataLoader(Numbers(), sampler=[1, 2, 3], **workers),
        DataLoader(Numbers(), shuffle=True, generator=torch.Generator(), **workers),
    ]
    assert not any(engine_of(loader).train_loader.reads_ahead for loader in own)


def test_on_the_cpu_there_is_no_mover() -> None:
    assert mover_of(CPU) is None
