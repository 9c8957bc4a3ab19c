"""Datasets are told of each epoch where their samples are made: in this process, in workers, in those that live on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import run_ranks
from helpers.sweep import some
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Sampler, Subset, get_worker_info

from dtrain.data.loader import ShardedLoader
from dtrain.data.partition import ShardSpec
from dtrain.distributed.world import bring_up
from dtrain.engine.loop import Engine
from dtrain.engine.options import RunOptions
from dtrain.engine.position import StartPosition
from dtrain.engine.train_step import Task

N, B, EPOCHS = 9, 2, 3
CASES = [
    {"kind": kind, "workers": workers, "persistent": persistent}
    for kind, workers, persistent in (
        ("map", 0, False),
        ("map", 2, True),
        ("map", 1, False),
        ("nested", 2, True),
        ("stream", 0, False),
        ("stream", 1, False),
        ("stream", 2, True),
        ("single", 0, False),
        ("single", 1, True),
    )
]


def value(epoch: int, index: int) -> int:
    return 1000 * epoch + index


class Told(Dataset):
    """A sample says which epoch it was made in, as its dataset was told, counted from 0."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(value(self.epoch, index))])


class Stream(IterableDataset):
    """The same, dealt to workers."""

    def __init__(self) -> None:
        self.data = Told()

    def __iter__(self) -> Any:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return (self.data[index] for index in range(first, N, step))


class Order(Sampler):
    """Backwards in odd epochs, as it was told; within another sampler."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Any:
        return iter(range(N)[:: -1 if self.epoch % 2 else 1])


class Around(Sampler):
    def __init__(self, inner: Sampler) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Any:
        return iter(self.inner)


def loader_of(kind: str, workers: int, persistent: bool) -> DataLoader:
    more: dict[str, Any] = {"num_workers": workers, "persistent_workers": persistent}
    if kind == "nested":
        data = Told()
        return DataLoader(ConcatDataset([Subset(data, range(4)), Subset(data, range(4, N))]), B, **more)
    if kind == "stream":
        return DataLoader(Stream(), B, **more)
    if kind == "single":  # samples that no batch is made of: each is one
        return DataLoader(Told(), batch_size=None, sampler=Around(Order()), collate_fn=lambda row: row[None], **more)
    return DataLoader(Told(), B, shuffle=True, **more)


def told(world, cases: list[dict[str, Any]]) -> list[Any]:
    """One rank: the samples of each epoch, of a run from its beginning and of one that begins with the second."""
    found = []
    for case in cases:
        for first in (1, 2):
            seen: dict[int, list[int]] = {}
            engines: list[Engine] = []

            def step(model, x, seen=seen, engines=engines):
                if model.training:
                    seen.setdefault(engines[0].place.epoch, []).extend(int(number) for number in x.flatten().tolist())
                return {"loss": (model(x) * 0).mean(), "number": x.mean()}

            net = nn.Linear(1, 1)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
            few = {"workers": case["workers"] if case["kind"] == "map" else 0, "persistent": case["persistent"]}
            few["persistent"] &= few["workers"] > 0
            loaders = [loader_of(**case), loader_of(**{**case, **few})]
            task = Task(net, step, loaders[0], step, loaders[1], optimizer)
            engine = Engine(task, world, epochs=EPOCHS, start=StartPosition(first), options=RunOptions(batch="global"))
            engines.append(engine)
            rows = engine.fit().rows
            found.append([seen, [[row["number"], row["val_number"]] for row in rows]])
            let_go(engine)
    return found


def let_go(engine: Engine) -> None:
    """Ends the workers that live on."""
    for view in (engine.train_loader, engine.valid.loader):
        for loader in (view.loader, view._stream.loader, getattr(view._indexed, "_loader", None)):
            if getattr(loader, "_iterator", None) is not None:
                loader._iterator._shutdown_workers()
                loader._iterator = None


def check(answers: list[list[Any]], cases: list[dict[str, Any]]) -> None:
    for number in range(len(cases) * 2):
        case, first = cases[number // 2], 1 + number % 2
        rows = answers[0][number][1]
        right = [sum(value(epoch - 1, index) for index in range(N)) / N for epoch in range(first, EPOCHS + 1)]
        assert [row[0] for row in rows] == pytest.approx(right), (case, first)
        assert [row[1] for row in rows] == pytest.approx(right), (case, first)
        for epoch in range(first, EPOCHS + 1):
            samples = [sample for answer in answers for sample in answer[number][0].get(str(epoch), [])]
            assert set(samples) == {value(epoch - 1, index) for index in range(N)}, (case, first, epoch)


def test_samples_are_those_of_their_epoch_in_any_workers() -> None:
    answers = told(bring_up(cpu=True), CASES)
    check([[[{str(k): v for k, v in seen.items()}, rows] for seen, rows in answers]], CASES)
    singles = [seen for (seen, _), case in zip(answers[::2], CASES, strict=True) if case["kind"] == "single"]
    assert all(seen[2] == [value(1, index) for index in reversed(range(N))] for seen in singles), "samplers are told"


@pytest.mark.parametrize("ranks", some([2], [3]))
def test_and_on_ranks(ranks: int) -> None:
    cases = [case for case in CASES if case["persistent"] and case["kind"] != "single"]
    check(run_ranks(told, ranks, cases=cases), cases)


class Growing(Told):
    """Longer in each epoch, as it was told."""

    n = 4

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.n = 4 + 2 * epoch
        self.calls = [*getattr(self, "calls", []), epoch]

    def __len__(self) -> int:
        return self.n


def test_a_schedule_lasts_for_epochs_that_grow() -> None:
    from dtrain.config.schema import TrainConfig
    from dtrain.engine.schedules import follow_schedule

    net = nn.Linear(1, 1)
    rates: list[float] = []
    data = Growing()

    def step(model, x):
        rates.append(model.optimizer.param_groups[0]["lr"])
        return (model(x) * 0).mean()

    task = Task(net, step, DataLoader(data, 2), optimizer=torch.optim.SGD(net.parameters(), lr=1.0))
    engine = Engine(task, bring_up(cpu=True), epochs=3)
    before = torch.get_rng_state()
    follow_schedule(engine, TrainConfig(schedule="linear"))
    assert vars(data) == {} and torch.equal(torch.get_rng_state(), before), "asking ahead leaves the dataset as it was"
    engine.fit()
    total = 2 + 3 + 4
    assert rates == pytest.approx([1 - step / total for step in range(total)])
    assert data.calls == [0, 1, 2]


def test_a_schedule_that_ends_too_early_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    from dtrain.config.schema import TrainConfig
    from dtrain.engine.schedules import follow_schedule

    class Wrong(list):
        def __len__(self) -> int:
            return 2

    net = nn.Linear(1, 1)
    loader = Wrong(torch.ones(2, 1) for _ in range(4))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    engine = Engine(
        Task(net, lambda model, x: model(x).mean(), iter_of(loader), optimizer=optimizer), bring_up(cpu=True), epochs=2
    )
    follow_schedule(engine, TrainConfig(schedule="cosine"))
    engine.fit()
    told = [record.message for record in caplog.records if "ended after 4 optimizer steps" in record.message]
    assert len(told) == 1


def iter_of(batches: list[Any]) -> Any:
    class Loader:
        def __len__(self) -> int:
            return len(batches)

        def __iter__(self) -> Any:
            return list.__iter__(batches)

    return Loader()


class InPlace(Told):
    """Changes in place with each epoch, by a stream of its own."""

    def __init__(self) -> None:
        self.items = [0, 1]
        self.order = torch.arange(4)
        self.rng = np.random.default_rng(0)
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)
        self.items.append(int(self.rng.integers(100)))
        self.order += 1

    def __len__(self) -> int:
        return len(self.items)


def test_datasets_that_change_in_place_are_as_they_were_once_they_are_asked_ahead() -> None:
    dataset, other = InPlace(), InPlace()
    sharded = ShardedLoader(DataLoader(dataset, 2), ShardSpec(0, 1, "global", True), 1, "train")
    assert sharded.steps_of_epochs(3) == [2, 2, 3]
    assert (dataset.items, dataset.order.tolist(), dataset.told) == ([0, 1], [0, 1, 2, 3], [])
    for one in (dataset, other):
        one.set_epoch(0)
    assert dataset.items == other.items


class Counting(Told):
    """Counts how often it was told."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch += 1


def test_workers_that_live_on_are_told_each_epoch_once() -> None:
    loader = DataLoader(Counting(), 3, num_workers=1, persistent_workers=True)
    sharded = ShardedLoader(loader, ShardSpec(0, 1, "global", True), 1, "train")
    for epoch in (1, 2, 3):
        values = [int(number) for rank_batch in sharded.iter_batches(epoch) for number in rank_batch.batch.flatten()]
        assert values == [value(epoch - 1, index) for index in range(N)]
