"""Random numbers within steps are those of one process, on any number of ranks."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

SAMPLES, BATCH = 15, 7  # 7 on 3 ranks are 3, 2 and 2; the last batch has one sample, and the other ranks fillers
LENGTH, WIDTH = 6, 4


def images(x: Tensor) -> Tensor:
    """(batch, LENGTH, WIDTH) to images with their channels last in memory."""
    return x.reshape(len(x), 3, 2, WIDTH).contiguous(memory_format=torch.channels_last)


def attended(x: Tensor, dtype: torch.dtype) -> Tensor:
    heads = x.to(dtype).reshape(len(x), LENGTH, 2, WIDTH // 2).transpose(1, 2)
    return nn.functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.3)


@functools.cache
def layer(name: str) -> nn.Module:
    torch.manual_seed(5)
    made = {
        "lstm": lambda: nn.LSTM(WIDTH, 3, 3, dropout=0.4, batch_first=True),
        "gru, time first": lambda: nn.GRU(WIDTH, 3, 2, dropout=0.4),
        "attention": lambda: nn.MultiheadAttention(WIDTH, 2, dropout=0.4, batch_first=True),
        "encoder, time first": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.3),
        "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.3, batch_first=True),
    }
    return made[name]().double()


def called(name: str, x: Tensor) -> Tensor:
    first = layer(name)(x, x, x) if name == "attention" else layer(name)(x)
    return first[0] if isinstance(first, tuple) else first


def turned(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same with time first inside."""
    return lambda x: function(x.transpose(0, 1)).transpose(0, 1)


def autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return nn.functional.dropout(x.float() @ torch.eye(WIDTH), 0.3).double()


# name -> (batch, LENGTH, WIDTH) to something with a row for each sample
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: nn.functional.dropout(x, 0.3),
    "dropout in place": lambda x: nn.functional.dropout(x.clone(), 0.3, inplace=True),
    "dropout of bfloat16": lambda x: nn.functional.dropout(x.bfloat16(), 0.3).double(),
    "dropout of a view": lambda x: nn.functional.dropout(x[:, ::2, 1:], 0.3),
    "dropout of what is turned": lambda x: nn.functional.dropout(x.transpose(1, 2), 0.3),
    "dropout, time first": turned(lambda x: nn.functional.dropout(x.contiguous(), 0.3)),
    "dropout, time first, a view": turned(lambda x: nn.functional.dropout(x, 0.3)),
    "dropout, channels last": lambda x: nn.functional.dropout(images(x), 0.3),
    "dropout of tokens": lambda x: nn.functional.dropout(x.reshape(-1, WIDTH), 0.3).reshape(x.shape),
    "dropout1d": lambda x: nn.functional.dropout1d(x, 0.3),
    "dropout2d": lambda x: nn.functional.dropout2d(images(x), 0.3),
    "dropout3d": lambda x: nn.functional.dropout3d(images(x)[..., None], 0.3),
    "alpha dropout": lambda x: nn.functional.alpha_dropout(x, 0.3, training=True),
    "feature alpha dropout": lambda x: nn.functional.feature_alpha_dropout(images(x), 0.3, training=True),
    "native dropout": lambda x: torch.native_dropout(x, 0.3, True)[0],
    "a path dropped": lambda x: x * x.new_empty(len(x), 1, 1).bernoulli_(0.5),
    "rand": lambda x: torch.rand(len(x), 3),
    "randn": lambda x: torch.randn(len(x), 40, dtype=torch.float64),
    "randn of a scalar each": lambda x: torch.randn(len(x)),
    "randint": lambda x: torch.randint(3, 1000, (len(x),)),
    "randint for tokens": lambda x: torch.randint(1000, (len(x), LENGTH)),
    "rand_like": torch.rand_like,
    "randn_like": lambda x: torch.randn_like(images(x)),
    "randn_like of a view": lambda x: torch.randn_like(x[:, 1:]),
    "in place in a view": lambda x: torch.zeros(len(x), 9)[:, 1:5].normal_(),
    "randint_like": lambda x: torch.randint_like(x, 100),
    "bernoulli": lambda x: torch.bernoulli(torch.sigmoid(x)),
    "bernoulli, one probability": lambda x: torch.bernoulli(x, 0.3),
    "bernoulli_ of probabilities": lambda x: torch.empty_like(x).bernoulli_(torch.full((WIDTH,), 0.4)),
    "normal, tensors": lambda x: torch.normal(x, x.abs()),
    "normal, mean": lambda x: torch.normal(x, 0.5),
    "normal, std": lambda x: torch.normal(0.5, x.abs()),
    "normal, shape": lambda x: torch.normal(0.5, 2.0, (len(x), 20)),
    "multinomial": lambda x: torch.multinomial(x[:, 0].softmax(1), 2),
    "multinomial with replacement": lambda x: torch.multinomial(x[:, 0].softmax(1), 3, replacement=True),
    "multinomial, one": lambda x: torch.multinomial(x[:, 0].softmax(1), 1, replacement=True),
    "multinomial of one distribution": lambda x: torch.multinomial(torch.arange(1.0, 9), 2 * len(x), True).view(-1, 2),
    "gumbel": nn.functional.gumbel_softmax,
    "categorical": lambda x: torch.distributions.Categorical(logits=x).sample(),
    "a distribution": lambda x: torch.distributions.Normal(x, 1.0).rsample(),
    "beta of equal parameters": lambda x: torch.distributions.Beta(0.4, 0.4).sample((len(x),)),
    "gamma of equal parameters": lambda x: torch.distributions.Gamma(0.4, 1.0).sample((len(x), 3)),
    "poisson of equal rates": lambda x: torch.poisson(torch.full((len(x), 3), 2.5)),
    "exponential": lambda x: torch.empty(len(x), 2).exponential_(),
    "cauchy": lambda x: torch.empty(len(x), 2).cauchy_(),
    "geometric": lambda x: torch.empty(len(x), 2).geometric_(0.3),
    "log normal": lambda x: torch.empty(len(x), 2).log_normal_(),
    "random": lambda x: torch.empty(len(x), 2).random_(),
    "uniform": lambda x: torch.empty(len(x), 2).uniform_(1, 3),
    "a generator of one's own": lambda x: torch.rand(len(x), 3, generator=torch.Generator().manual_seed(1)),
    "attention": lambda x: called("attention", x),
    "attention, scaled dot product": lambda x: attended(x, torch.float64),
    "attention of bfloat16": lambda x: attended(x, torch.bfloat16).double(),
    "encoder": lambda x: called("encoder", x),
    "encoder, time first": turned(lambda x: called("encoder, time first", x)),
    "lstm": lambda x: called("lstm", x),
    "gru, time first": turned(lambda x: called("gru, time first", x)),
    # as long as a rank's part of a batch
    "lstm of 3": lambda x: called("lstm", x[:, :3]),
    "lstm of 2": lambda x: called("lstm", x[:, :2]),
    "lstm of 4": lambda x: called("lstm", x[:, :4]),
    "attention of 3": lambda x: called("attention", x[:, :3]),
    "attention of 2": lambda x: called("attention", x[:, :2]),
    "encoder of 3, time first": turned(lambda x: called("encoder, time first", x[:3])),
    "encoder of 2, time first": turned(lambda x: called("encoder, time first", x[:2])),
    "autocast": autocast,
    "vmap": torch.vmap(lambda row: nn.functional.dropout(row, 0.4), randomness="different"),
}
ALIKE: dict[str, Callable[[Tensor], Any]] = {  # not shaped after the batch: the same on every rank
    "a scalar": lambda x: torch.rand(()).tolist(),
    "a number": lambda x: torch.rand(1).tolist(),
    "a whole number": lambda x: torch.randint(100, (1,)).tolist(),
    "a channel's": lambda x: torch.rand(1, 7).tolist(),
    "of eleven": lambda x: torch.randn(11).tolist(),
    "an order of a few": lambda x: torch.randperm(7).tolist(),
    "a weight's": lambda x: torch.randn(12, 1).tolist(),
    "beta": lambda x: torch.distributions.Beta(0.4, 0.4).sample().tolist(),
    "python": lambda x: random.random(),
    "numpy": lambda x: float(np.random.beta(0.4, 0.4)),
}


def draw(world: Any, batch: str = "global", same_draws: bool | None = None) -> list[Any]:
    """Returns what each function gave in each step: rows with their indices, those of fillers left out."""
    from dtrain.engine import Engine
    from dtrain.learning import Task

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
        return model(x[:, :1, :1]).sum()

    x = torch.randn(SAMPLES, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loader = DataLoader(TensorDataset(x, torch.arange(SAMPLES)), BATCH, shuffle=True)
    task = Task(net, train_step, loader, optimizer=optimizer)
    Engine(task, world, epochs=1, batch=batch, same_draws=same_draws).fit()  # type: ignore[arg-type]
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
    from dtrain.learning import Task

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
    from dtrain.engine import Engine

    found = {}
    for name, case in CASES.items():
        given = {key: case[key] for key in ("accumulation", "same_draws", "val_every_steps", "batch") if key in case}
        engine = Engine(task_of(case, world.size), world, epochs=2, **{"batch": "global", **given})
        engine.fit()
        found[name] = told_of(engine)
    return found


def loop_of_ones_own(world: Any) -> list[float]:
    """Script style, and KerasModel."""
    import dtrain
    from dtrain.prepared import PROCESS

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
    from dtrain.engine import Engine
    from dtrain.learning import Task

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
        Engine(task, world, epochs=1, **how).fit()
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
    from dtrain.config.schema import CheckpointConfig
    from dtrain.engine import Engine
    from dtrain.errors import StopRequested
    from dtrain.resuming.finding import Parts, find_good, read
    from dtrain.resuming.keeper import Keeper
    from dtrain.resuming.state import restore

    engine = Engine(task_of({"numpy": True}, world.size), world, epochs=3, batch="global")
    found = find_good(Path(folder)) if world.is_main else None
    if world.gather_json(found is not None)[0]:
        loaded = (Parts() if found is None else read(found.saved.path)).shared(world).loaded()
        engine.history.rows = list(loaded.run["rows"])
        restore(engine, loaded.weights, loaded.run, loaded.ranks)
    keeper = Keeper(engine, Path(folder), CheckpointConfig(), lambda: {"format": 1, "ranks": world.size})
    keeper.attach()

    def stop(place: Any) -> None:
        if until and place.updates == until:
            raise StopRequested("saved")

    engine.after_step.append(stop)
    try:
        engine.fit()
    except StopRequested:
        pass
    finally:
        keeper.close()
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
    from dtrain.engine import Engine
    from dtrain.inference import evaluate_task
    from dtrain.learning import Task
    from dtrain.world import bring_up

    def step(model: Any, x: Tensor) -> Tensor:
        return model(x + torch.randn_like(x)).square().mean()

    torch.manual_seed(0)
    net, loader = nn.Linear(WIDTH, 1), DataLoader(TensorDataset(torch.randn(SAMPLES, WIDTH)), BATCH)
    task = Task(net, step, loader, step, loader, torch.optim.SGD(net.parameters(), 0.1))
    row = Engine(task, bring_up(cpu=True), epochs=2).fit().rows[-1]
    means = evaluate_task(task, bring_up(cpu=True), epoch=2, same_draws=None).means
    assert means["loss"] == row["val_loss"]


def test_a_torch_that_lacks_what_it_is_built_on_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from dtrain import rowwise
    from dtrain.errors import UsageError

    def lacking() -> None:
        raise AttributeError("module 'torch._C' has no attribute 'it'")

    monkeypatch.setattr(rowwise, "_install", lacking)
    with pytest.raises(UsageError, match=r"^same_draws: torch .* has no attribute 'it'\). Set train.same_draws=false"):
        rowwise.check_supported()


def test_what_is_drawn_for_batches_that_are_not_stacked_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    from types import SimpleNamespace

    from dtrain.dealing import Share
    from dtrain.draws import StepDraws

    world: Any = SimpleNamespace(device=torch.device("cpu"), size=2, is_main=True)
    stacked, loose = (torch.ones(2, 5), {"y": torch.ones(2), "t": ["a", "b"]}), [torch.ones(3, 5), torch.ones(3, 6)]
    told, draws = [], StepDraws(world, 1)
    for batch, drawn in ((stacked, 2), (loose, 0), ((torch.ones(5, 2),), 2), (loose, 2), (loose, 2)):
        draws.begin("train", 1)
        draws.enter(Share(batch, 2, 4, 1.0, rows=2))
        torch.rand(drawn, 3) if drawn else torch.rand(1)
        draws.leave()
        told.append(len(caplog.records))
    assert told == [0, 0, 0, 1, 1]
    assert caplog.records[0].getMessage().startswith("same_draws: the train step draws random numbers")
