"""Several training loaders: what one plain loop computes of their batches, on any number of ranks, and resumed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks

import dtrain
from dtrain.config import load_settings
from dtrain.distributed.world import World, bring_up
from dtrain.errors import DataError, UsageError
from dtrain.rundir.history import read_history
from dtrain.trainer.plan import make_plan
from dtrain.trainer.setup import load_task
from dtrain.trainer.train import train_run

RECIPE = """
import os

import torch
from torch import nn, optim
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

SIZES = {"easy": (21, 6), "hard": (40, 8), "odd": (13, 5)}  # samples, batch size
WEIGHTS = {"easy": 1.0, "hard": 0.5, "odd": 0.25}


def data(name):
    n = SIZES[name][0]
    draw = torch.Generator().manual_seed(n)
    return TensorDataset(torch.randn(n, 4, generator=draw).double(), torch.randn(n, 1, generator=draw).double())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data("odd"))


def build_model(dropout: float = 0.0):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Dropout(dropout), nn.Linear(3, 1)).double()


def build_dataloaders(names: str = "easy hard odd", shuffle: bool = False, workers: int = 0, drawn: bool = False):
    def loader(name):
        if name == "odd" and not shuffle:
            return DataLoader(Stream(), SIZES[name][1])
        generator = torch.Generator().manual_seed(7) if drawn and name == "hard" else None
        return DataLoader(
            data(name), SIZES[name][1], shuffle=shuffle, num_workers=workers, generator=generator
        )

    return {name: loader(name) for name in names.split()}, None


def build_optimizer(model, lr: float = 0.1):
    return optim.SGD(model.parameters(), lr=lr)


def losses(model, batches):
    return sum(WEIGHTS[name] * (model(x) - y).square().mean() for name, (x, y) in batches.items())


def train_step(model, *batch, loader_name=""):
    batches = batch[0] if not loader_name else {loader_name: batch}
    return losses(model, batches)


def after_step(step, run):
    if step == int(os.environ.get("END_AT", 0)):
        raise RuntimeError("ended")
"""
OWN: dict[str, Any] = {}
exec(RECIPE, OWN)  # noqa: S102 - its own text
SIZES, data, losses = OWN["SIZES"], OWN["data"], OWN["losses"]
EPOCHS = 2
WAYS = ("min", "max_cycle", "alternate")
CASES = [
    (combine, *words)
    for combine in WAYS
    for words in (("batch=global",), ("batch=per_rank",), ("batch=global", "accumulation=2"))
]


def whole_batches(name: str, joined: int) -> list[tuple[torch.Tensor, ...]]:
    """A loader's global batches: so many of its batches at once."""
    size = SIZES[name][1] * joined
    return list(zip(*(torch.split(part, size) for part in data(name).tensors), strict=True))


def steps_of(combine: str, joined: int) -> Iterator[dict[str, Any]]:
    """The batches of one pass, by hand."""
    found = {name: whole_batches(name, joined) for name in SIZES}
    if combine == "alternate":
        for several in itertools.zip_longest(*found.values()):
            for name, batch in zip(found, several, strict=True):
                if batch is not None:
                    yield {name: batch}
        return
    count = (min if combine == "min" else max)(map(len, found.values()))
    for step in range(count):
        yield {name: batches[step % len(batches)] for name, batches in found.items()}


def plain(combine: str, joined: int, accumulation: int) -> tuple[list[float], list[float]]:
    """One loop by hand; returns the epochs' losses and the weights."""
    net, rows = OWN["build_model"](), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(EPOCHS):
        total = samples = 0.0
        steps = list(steps_of(combine, joined))
        for first in range(0, len(steps), accumulation):
            group = steps[first : first + accumulation]
            counts = [sum(len(x) for x, _ in batches.values()) for batches in group]
            optimizer.zero_grad()
            for batches, count in zip(group, counts, strict=True):
                loss = losses(net, batches)
                (loss * count / sum(counts)).backward()
                total, samples = total + loss.item() * count, samples + count
            optimizer.step()
        rows.append(total / samples)
    return rows, [number.item() for p in net.parameters() for number in p.flatten()]


def start(folder: Path, *words: str, world: World | None = None, name: str = "it") -> Path:
    recipe = folder / "several.py"
    if not recipe.exists():
        recipe.write_text(RECIPE)
    how = [f"run.dir={folder}", f"run.name={name}", f"epochs={EPOCHS}", "log_step_freq=100", *words]
    return train_run(load_settings(str(recipe), how, {}), world or bring_up(cpu=True))


def weights_of(run: Path) -> list[float]:
    return [number.item() for p in dtrain.load(run, "last").parameters() for number in p.flatten()]


def of_ranks(world: World, folder: str) -> list[Any]:
    for number, (combine, *words) in enumerate(CASES):
        start(Path(folder), f"combine={combine}", *words, world=world, name=f"case{number}")
    shuffled = ("shuffle=true", "workers=1", "drawn=true", "combine=max_cycle", "batch=global")
    start(Path(folder), *shuffled, world=world, name="shuffled")
    start(Path(folder), "combine=alternate", "dropout=0.5", "batch=global", world=world, name="dropout")
    start(Path(folder), "combine=min", "epoch_steps=2", "batch=global", world=world, name="counted")
    net = OWN["build_model"]()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loaders, how = OWN["build_dataloaders"]()[0], {"world": world, "batch": "global", "verbose": False}
    frame = dtrain.train_model(
        net, EPOCHS, loaders, train_step=OWN["train_step"], optimizer=optimizer, combine="min", **how
    )
    keras = dtrain.KerasModel(OWN["build_model"](), torch.nn.MSELoss())
    keras.optimizer = torch.optim.SGD(keras.net.parameters(), lr=0.1)
    kept = keras.fit(EPOCHS, loaders, combine="alternate", **how)
    return [list(frame["loss"]), list(kept["loss"])]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    (folder / "several.py").write_text(RECIPE)
    run_ranks(of_ranks, 1, folder=str(folder))
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_plain_loop_computes_the_same_on_any_number_of_ranks(tmp_path: Path, alone: Path, ranks: int) -> None:
    folder = alone
    if ranks > 1:
        folder = tmp_path
        (folder / "several.py").write_text(RECIPE)
        told = run_ranks(of_ranks, ranks, folder=str(folder))
        frames = plain("min", 1, 1)[0]
        assert all(one[0] == pytest.approx(frames, rel=1e-12) for one in told)
        assert told[0][1] == pytest.approx(told[1][1], rel=1e-12)
    for number, (combine, batch, *words) in enumerate(CASES):
        joined = ranks if batch == "batch=per_rank" else 1
        rows, weights = plain(combine, joined, 2 if words else 1)
        run = folder / f"case{number}"
        assert list(read_history(run)["loss"]) == pytest.approx(rows, rel=1e-12), (combine, batch, words)
        assert weights_of(run) == pytest.approx(weights, rel=1e-11), (combine, batch, words)
    for name in ("shuffled", "dropout", "counted"):
        known = list(read_history(alone / name)["loss"])
        assert list(read_history(folder / name)["loss"]) == pytest.approx(known, rel=1e-12), name
        assert weights_of(folder / name) == pytest.approx(weights_of(alone / name), rel=1e-11), name


RESUMED = [
    ("combine=max_cycle", "shuffle=true", "drawn=true", "batch=global", "accumulation=2"),
    ("combine=alternate", "shuffle=true", "workers=1", "drawn=true", "dropout=0.5", "batch=global"),
    ("combine=min", "batch=per_rank", "shuffle=true", "drawn=true", "epoch_steps=2", "epochs=3"),
    ("combine=max_cycle", "shuffle=true", "drawn=true", "epoch_steps=4"),
]


def ended_and_resumed(world: World, folder: str) -> list[list[Any]]:
    found = []
    for number, words in enumerate(RESUMED):
        how = [*words, "checkpoint.every_steps=1"]
        whole = start(Path(folder), *how, world=world, name=f"whole{number}")
        os.environ["END_AT"] = "3"
        with pytest.raises(Exception, match="ended"):
            start(Path(folder), *how, world=world, name=f"cut{number}")
        del os.environ["END_AT"]
        resumed = start(Path(folder), *how, world=world, name=f"cut{number}")
        found.append([weights_of(whole), weights_of(resumed)])
        found[-1] += [list(read_history(run)["loss"]) for run in (whole, resumed)]
    return found


def test_a_resumed_run_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    (tmp_path / "several.py").write_text(RECIPE)
    for weights, resumed, losses_of_whole, losses_of_resumed in run_ranks(ended_and_resumed, 2, folder=str(tmp_path))[
        0
    ]:
        assert weights == resumed
        assert losses_of_whole == losses_of_resumed


@pytest.mark.parametrize(
    ("loaders", "combine", "said"),
    [
        ({"easy": [1], "hard": [1]}, None, r"mapping of 2 loaders \(easy, hard\).*Set combine\. \"min\""),
        ([1], "min", "there is one training loader. Remove combine"),
        ({}, "min", "the mapping of training loaders is empty"),
        ({"easy": None}, "min", "the training loader 'easy' is None"),
        ({"a b": [1]}, "min", "'a b' is the name of a training loader"),
        ({"easy": [1]}, "sometimes", r"combine = 'sometimes': should be \"min\""),
        ({"easy": [(torch.ones(2, 4), torch.ones(2, 1))], "hard": []}, "min", "no batch|yields no"),
        ({"easy": [(torch.ones(2, 4), torch.ones(2, 1))] * 3, "hard": iter([(torch.ones(2, 4), torch.ones(2, 1))])},
         "max_cycle", "loader 'hard' is exhausted after one pass"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined_is_named(loaders: Any, combine: Any, said: str) -> None:
    net = OWN["build_model"]().float()
    how: dict[str, Any] = {"train_step": OWN["train_step"], "optimizer": torch.optim.SGD(net.parameters(), 0.1)}
    with pytest.raises((UsageError, DataError), match=said):
        dtrain.train_model(net, 1, loaders, combine=combine, verbose=False, cpu=True, **how)


def test_a_loss_of_features_and_labels_has_no_place_for_several(tmp_path: Path) -> None:
    model = dtrain.KerasModel(torch.nn.Linear(4, 1), torch.nn.MSELoss())
    with pytest.raises(UsageError, match=r"Use combine='alternate', or dtrain\.train_model"):
        model.fit(1, OWN["build_dataloaders"]()[0], combine="min", cpu=True)


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        (["combine=min"], (6 + 8 + 5, 3)),
        (["combine=max_cycle"], (6 + 8 + 5, 5)),
        (["combine=alternate"], (None, 12)),
        (["combine=max_cycle", "epoch_steps=7", "accumulation=2"], (6 + 8 + 5, 14)),
    ],
)
def test_the_dry_run_knows_the_steps(tmp_path: Path, words: list[str], sizes: tuple[int | None, int]) -> None:
    (tmp_path / "several.py").write_text(RECIPE)
    settings = load_settings(str(tmp_path / "several.py"), ["shuffle=true", "batch=global", "epochs=2", *words], {})
    plan = make_plan(load_task(settings), settings, 1)
    assert (plan.batch_per_rank, plan.steps_per_epoch) == sizes
