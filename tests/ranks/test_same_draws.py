"""Random numbers within steps are those of one process, on any number of ranks."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.callbacks import on
from helpers.random_functions import ALIKE, BATCH, FUNCTIONS, LENGTH, SAMPLES, WIDTH
from helpers.ranks import run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset


def draw(world: Any, batch: str = "global", same_draws: bool | None = None) -> list[Any]:
    """Returns what each function gave in each step: rows with their indices, those of fillers left out."""
    from dtrain.engine.loop import Engine
    from dtrain.engine.options import RunOptions
    from dtrain.engine.train_step import Task

    net = nn.Linear(1, 12).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    found: list[Any] = []

    def train_step(model: Any, x: Tensor, index: Tensor) -> Tensor:
        told: dict[str, Any] = {"index": index.tolist(), "first": torch.rand(()).item(), "rows": {}, "left": {}}
        for number, (name, function) in enumerate(FUNCTIONS.items()):
            torch.manual_seed(number)  # so that one that goes wrong is found by its name
            told["rows"][name] = function(x).detach().tolist()
            told["left"][name] = torch.rand(()).item()  # where the stream has come to
        told["order"] = sorted(torch.randperm(len(x)).tolist()) == list(range(len(x)))
        told["alike"] = {name: function(x) for name, function in ALIKE.items()}
        found.append(told)
        return model(x[:, :1, :1]).mean()

    x = torch.randn(SAMPLES, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loader = DataLoader(TensorDataset(x, torch.arange(SAMPLES)), BATCH, shuffle=True)
    task = Task(net, train_step, loader, optimizer=optimizer)
    Engine(task, world, epochs=1, options=RunOptions(batch=batch, same_draws=same_draws)).fit()  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_random_function_gives_what_it_gives_one_process(ranks: int) -> None:
    together = [found["draws"] for found in everything_on(ranks)]
    alone = everything_on(1)[0]["draws"]
    assert len(alone) == 3
    wrong = set()
    for step, one in enumerate(alone):
        parts = [rank[step] for rank in together]
        assert all(part["order"] for part in parts)
        assert [part["first"] for part in parts] == [one["first"]] * ranks
        assert [part["alike"] for part in parts] == [one["alike"]] * ranks
        for name in FUNCTIONS:
            assert len(one["rows"][name]) == len(one["index"]), name
            known = dict(zip(one["index"], one["rows"][name], strict=True))
            same = all(
                np.allclose([known[index] for index in part["index"]], part["rows"][name], rtol=1e-9, atol=1e-12)
                for part in parts
            )
            if not same or any(part["left"][name] != one["left"][name] for part in parts):
                wrong.add((name, "rows" if not same else "stream", len(one["index"])))
    assert wrong == set()
    assert len({one["first"] for one in alone}) == 3, "each step draws anew"


# --- training -------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A part whose forward is computed again in the backward."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again = again
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 8), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return x + (checkpoint(self.inner, x, use_reentrant=False) if self.again else self.inner(x))


class Net(nn.Module):
    """A recurrent net with dropout everywhere."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.first = nn.LSTM(WIDTH, 8, 2, dropout=0.3, batch_first=True)
        self.block = Block(again)
        self.last = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x)[0]).mean(dim=1))


def task_of(case: dict[str, Any], size: int) -> Any:
    from dtrain.engine.train_step import Task

    torch.manual_seed(3)
    net = Net(case.get("again", False)).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    imperative, numpy = case.get("imperative", False), case.get("numpy", False)

    def loss_of(model: Any, x: Tensor, y: Tensor) -> Tensor:
        keep = float(np.random.beta(0.4, 0.4)) if numpy else 1.0
        noisy = x + 0.1 * torch.randn_like(x) * (random.random() if numpy else 1.0)
        return keep * nn.functional.mse_loss(model(noisy), y) + 0.1 * torch.rand(())

    def train_step(model: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        loss = loss_of(model, x, y)
        if imperative:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {"loss": loss.detach() if imperative else loss}

    def valid_step(model: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": loss_of(model, x, y)}

    x = torch.randn(29, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = TensorDataset(x, x.sum(dim=(1, 2))[:, None])
    per_rank = case.get("batch") == "per_rank"
    loaders = [DataLoader(data, 6 // size if per_rank else 6, shuffle=True) for _ in range(2)]
    return Task(net, train_step, loaders[0], valid_step, loaders[1], optimizer)


CASES: dict[str, dict[str, Any]] = {
    "declarative": {},
    "imperative": {"imperative": True},
    "accumulation": {"accumulation": 2},
    "accumulation, imperative": {"accumulation": 2, "imperative": True},
    "computed again in the backward": {"again": True},
    "computed again in an imperative step": {"again": True, "imperative": True},
    "python and numpy": {"numpy": True, "val_every_steps": 2},
    "batches of each rank": {"batch": "per_rank", "same_draws": True},
}


def told_of(engine: Any) -> dict[str, Any]:
    rows = [[row["loss"], row["val_loss"]] for row in engine.history.rows]
    return {"rows": rows, "weights": [p.detach().flatten().tolist() for p in engine.task.module.parameters()]}


def train_cases(world: Any) -> dict[str, Any]:
    from dtrain.engine.loop import Engine
    from dtrain.engine.options import RunOptions

    found = {}
    for name, case in CASES.items():
        given = {key: case[key] for key in ("accumulation", "same_draws", "batch") if key in case}
        options, within = RunOptions(**{"batch": "global", **given}), case.get("val_every_steps")
        engine = Engine(task_of(case, world.size), world, epochs=2, options=options, val_every_steps=within)
        engine.fit()
        found[name] = told_of(engine)
    return found


def loop_of_ones_own(world: Any) -> list[float]:
    """Script style, and KerasModel."""
    import dtrain
    from dtrain.api.prepared import PROCESS

    PROCESS.world = world
    task = task_of({}, world.size)
    net, optimizer, train, valid = dtrain.prepare(
        task.module, task.optimizer, task.dl_train, task.dl_valid, batch="global", seed=7
    )
    found = []
    for _ in range(2):
        net.train()
        meter = dtrain.Meter()
        for x, y in train:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x), y)
            loss.backward()
            optimizer.step()
            meter.add(loss=loss.detach())
        found.append(meter.means()["loss"])
        net.eval()
        meter = dtrain.Meter()
        for x, y in valid:
            meter.add(loss=nn.functional.mse_loss(net(x + torch.randn_like(x)), y).detach())
        found.append(meter.means()["loss"])
    torch.manual_seed(4)
    net = Net().double()
    keras = dtrain.KerasModel(net, nn.functional.mse_loss, optimizer=torch.optim.SGD(net.parameters(), lr=0.01))
    history = keras.fit(2, task.dl_train, task.dl_valid, batch="global", verbose=False, world=world)
    return [*found, *history["loss"], *history["val_loss"]]


def own_streams(world: Any) -> dict[str, Any]:
    """What each rank draws where nothing is led, and in its loader's main process."""
    from dtrain.engine.loop import Engine
    from dtrain.engine.options import RunOptions
    from dtrain.engine.train_step import Task

    found: dict[str, Any] = {}

    class Noisy(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> Any:
            found["loaded"].append([torch.rand(()).item(), random.random(), float(np.random.rand())])
            return torch.ones(1)

    def train_step(model: Any, x: Tensor) -> Tensor:
        found["drawn"].append([torch.rand(()).item(), random.random(), float(np.random.rand())])
        return model(x).mean()

    for name, how in {
        "per rank": {},
        "off": {"batch": "global", "same_draws": False},
        "on": {"batch": "global"},
    }.items():
        found["loaded"], found["drawn"] = [], []
        net = nn.Linear(1, 1)
        task = Task(net, train_step, DataLoader(Noisy(), 4), optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
        Engine(task, world, epochs=1, options=RunOptions(**how)).fit()
        found[name] = {"loaded": found["loaded"], "drawn": found["drawn"]}
    return found


def everything(world: Any) -> dict[str, Any]:
    return {
        "draws": draw(world),
        "cases": train_cases(world),
        "own": loop_of_ones_own(world),
        "streams": own_streams(world),
    }


@functools.cache
def everything_on(ranks: int) -> list[dict[str, Any]]:
    """All of this file in one start of so many ranks."""
    return run_ranks(everything, ranks)


@pytest.mark.parametrize("ranks", [2, 3])
def test_nets_with_dropout_train_as_in_one_process(ranks: int) -> None:
    one = everything_on(1)[0]
    for found in everything_on(ranks):
        for name in CASES:
            for what in ("rows", "weights"):
                for here, there in zip(found["cases"][name][what], one["cases"][name][what], strict=True):
                    assert here == pytest.approx(there, rel=1e-9, abs=1e-9), (name, what)
        assert found["own"] == pytest.approx(one["own"], rel=1e-9)


def test_each_rank_keeps_streams_of_its_own() -> None:
    one, two = (found["streams"] for found in everything_on(2))
    for name in ("per rank", "off", "on"):
        pairs = [
            pair
            for a, b in zip(one[name]["loaded"], two[name]["loaded"], strict=True)
            for pair in zip(a, b, strict=True)
        ]
        assert len(pairs) >= 18
        assert all(a != b for a, b in pairs), f"{name}: samples of two ranks are augmented alike"
        assert (one[name]["drawn"] == two[name]["drawn"]) == (name == "on")
    drawn = [number for step in one["on"]["drawn"] for number in step]
    assert len(set(drawn)) == len(drawn)


# --- resuming -------------------------------------------------------------------------------------------------


def part_of_a_run(world: Any, folder: str, until: int) -> Any:
    """Trains from the last checkpoint in the folder, where there is one, and stops after so many optimizer steps."""
    from dtrain.checkpoint.locate import Parts, find_good, read
    from dtrain.checkpoint.saver import Checkpointer
    from dtrain.checkpoint.state import restore
    from dtrain.config.schema import CheckpointConfig
    from dtrain.engine.callback import Order
    from dtrain.engine.loop import Engine
    from dtrain.engine.options import RunOptions
    from dtrain.errors import StopRequested

    engine = Engine(task_of({"numpy": True}, world.size), world, epochs=3, options=RunOptions(batch="global"))
    found = find_good(Path(folder)) if world.is_main else None
    if world.gather_json(found is not None)[0]:
        loaded = (Parts() if found is None else read(found.saved.path)).shared(world).loaded()
        engine.history.rows = list(loaded.run["rows"])
        restore(engine, loaded.weights, loaded.run, loaded.ranks)
    keeper = Checkpointer(engine, Path(folder), CheckpointConfig(), lambda: {"format": 1, "ranks": world.size})
    keeper.attach()

    def stop(place: Any) -> None:
        if until and place.updates == until:
            raise StopRequested("saved")

    engine.callbacks.add(on(Order.LAST, on_save_point=stop))
    try:
        engine.fit()
    except StopRequested:
        pass
    finally:
        keeper.on_train_end()
    return told_of(engine)


def test_a_run_goes_on_with_the_same_numbers_on_another_number_of_ranks(tmp_path: Path) -> None:
    whole = run_ranks(part_of_a_run, 1, folder=str(tmp_path / "whole"), until=0)[0]
    folder = str(tmp_path / "parts")
    run_ranks(part_of_a_run, 2, folder=folder, until=7)  # of 5 in an epoch
    run_ranks(part_of_a_run, 1, folder=folder, until=12)
    for found in run_ranks(part_of_a_run, 3, folder=folder, until=0):
        for what in ("rows", "weights"):
            for here, there in zip(found[what], whole[what], strict=True):
                assert here == pytest.approx(there, rel=1e-9, abs=1e-9)


def test_evaluation_draws_what_training_drew_after_the_epoch() -> None:
    from dtrain.distributed.world import bring_up
    from dtrain.engine.loop import Engine
    from dtrain.engine.options import RunOptions
    from dtrain.engine.predict import evaluate_task
    from dtrain.engine.train_step import Task

    def step(model: Any, x: Tensor) -> Tensor:
        return model(x + torch.randn_like(x)).square().mean()

    torch.manual_seed(0)
    net, loader = nn.Linear(WIDTH, 1), DataLoader(TensorDataset(torch.randn(SAMPLES, WIDTH)), BATCH)
    task = Task(net, step, loader, step, loader, torch.optim.SGD(net.parameters(), 0.1))
    row = Engine(task, bring_up(cpu=True), epochs=2).fit().rows[-1]
    means = evaluate_task(task, bring_up(cpu=True), RunOptions(), epoch=2).means
    assert means["loss"] == row["val_loss"]


def test_a_torch_that_lacks_what_it_is_built_on_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from dtrain.engine import random_rows as rowwise
    from dtrain.errors import UsageError

    def lacking() -> None:
        raise AttributeError("module 'torch._C' has no attribute 'it'")

    monkeypatch.setattr(rowwise, "_install", lacking)
    with pytest.raises(UsageError, match=r"^same_draws: torch .* has no attribute 'it'\). Set train.same_draws=false"):
        rowwise.check_supported()


def test_what_is_drawn_for_batches_that_are_not_stacked_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    from types import SimpleNamespace

    from dtrain.data.partition import RankBatch
    from dtrain.engine.random_draws import StepDraws

    world: Any = SimpleNamespace(device=torch.device("cpu"), size=2, is_main=True)
    stacked, loose = (torch.ones(2, 5), {"y": torch.ones(2), "t": ["a", "b"]}), [torch.ones(3, 5), torch.ones(3, 6)]
    told, draws = [], StepDraws(world, 1)
    for batch, drawn in ((stacked, 2), (loose, 0), ((torch.ones(5, 2),), 2), (loose, 2), (loose, 2)):
        draws.begin("train", 1)
        draws.enter(RankBatch(batch, 2, 4, 1.0, rows=2))
        torch.rand(drawn, 3) if drawn else torch.rand(1)
        draws.leave()
        told.append(len(caplog.records))
    assert told == [0, 0, 0, 1, 1]
    assert caplog.records[0].getMessage().startswith("same_draws: the train step draws random numbers")


class Carries(nn.Module):
    """A recurrent net whose hidden state goes on from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.hidden = nn.GRU(1, 2, batch_first=True), None

    def forward(self, x: Tensor) -> Tensor:
        values, hidden = self.cell(x[:, None], self.hidden)
        self.hidden = hidden.detach()
        return values[:, 0].mean(1)


def told_of_unequal_parts(world: Any) -> str:
    import dtrain
    from dtrain.errors import notes_of

    loader = DataLoader(TensorDataset(torch.ones(12, 1)), 6)
    net = Carries()
    net.optimizer = torch.optim.SGD(net.parameters(), 0.1)
    try:
        dtrain.train_model(
            net, 1, loader, train_step=lambda net, x: {"loss": net(x).mean()}, batch="global", cpu=True, verbose=False
        )
    except Exception as error:  # noqa: BLE001 - one of torch's, or that the other rank has gone
        return "; ".join(notes_of(error))
    raise AssertionError


def test_a_step_that_needs_equal_parts_is_told_of_the_first_batchs() -> None:
    """12 samples in batches of 6 would be 3 and 3; the first are 4 and 2."""
    assert any(
        "the ranks' parts of the first batch are unequal" in told for told in run_ranks(told_of_unequal_parts, 2)
    )
