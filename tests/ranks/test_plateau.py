"""ReduceLROnPlateau watches the column that it is told of, in the mode of that column; schedules with an end; lazy nets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, OneCycleLR, ReduceLROnPlateau, SequentialLR
from torch.utils.data import DataLoader, TensorDataset

import dtrain as library
from dtrain.config import load_settings
from dtrain.distributed.world import bring_up
from dtrain.errors import DtrainError, UsageError
from dtrain.rundir.columns import sure_mode_of
from dtrain.rundir.history import read_history
from dtrain.trainer.train import train_run

X = torch.arange(12.0, dtype=torch.float64).reshape(12, 1) / 12
SCORES = [0.1, 0.2, 0.2, 0.3, 0.1, 0.1]  # of each epoch; the loss falls in all of them

RECIPE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

SCORES = [0.1, 0.2, 0.2, 0.3, 0.1, 0.1]


def build_model():
    torch.manual_seed(0)
    net = nn.Linear(1, 1)
    net.register_buffer("epoch", torch.zeros((), dtype=torch.int64))
    return net


def build_dataloaders():
    data = TensorDataset(torch.arange(12.0).reshape(12, 1) / 12)
    return DataLoader(data, 3), DataLoader(data, 3)


def build_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=1.0)


def build_scheduler(optimizer, mode: str = "min", kind: str = "plateau"MORE):
    if kind == "cycle":
        return OneCycleLR(optimizer, 0.1, total_steps=8), "step"
    return ReduceLROnPlateau(optimizer, mode=mode, factor=0.5, patience=0, threshold=0.0)


def train_step(model, x):
    return {"loss": (model(x) - 1).square().mean() * 1e-3, "accuracy": 0.5}


def valid_step(model, x):
    if float(x[0]) == 0:
        model.epoch += 1
    number = int(model.epoch)
    return {"loss": 1.0 / number, "accuracy": SCORES[number - 1], "gap": SCORES[number - 1]}
"""


def reference(mode: str, values: list[float]) -> list[float]:
    """The rates of the epochs, of torch's scheduler alone."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = ReduceLROnPlateau(optimizer, mode=mode, factor=0.5, patience=0, threshold=0.0)
    rates = []
    for value in values:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(value)
    return rates


def run(folder: Path, *words: str, more: str = "", epochs: int = 6) -> tuple[str, list[float]]:
    """Trains the recipe on this rank; returns what ended it, and the rates of the history."""
    recipe = folder / "plateau.py"
    recipe.write_text(RECIPE.replace("MORE", more))
    words = (f"run.dir={folder}", "run.name=it", f"epochs={epochs}", *words)
    try:
        train_run(load_settings(str(recipe), list(words), environ={}), bring_up(cpu=True))
    except DtrainError as error:
        return str(error), []
    return "", read_history(folder / "it")["lr"].tolist()


@pytest.mark.parametrize(
    ("words", "mode", "values"),
    [
        ([], "min", [1 / n for n in range(1, 7)]),
        (["scheduler.mode=max", "checkpoint.monitor=val_accuracy"], "max", SCORES),
        (["scheduler.mode=max", "scheduler.monitor=val_accuracy"], "max", SCORES),
        (["scheduler.monitor=val_gap"], "min", SCORES),  # of a name that says nothing, the mode is believed
        (["checkpoint.monitor=val_accuracy", "scheduler.monitor=loss"], "min", None),
    ],
)
def test_the_column_that_is_named_or_the_checkpoints(
    tmp_path: Path, words: list[str], mode: str, values: list[float] | None
) -> None:
    ended, rates = run(tmp_path, *words)
    values = read_history(tmp_path / "it")["loss"].tolist() if values is None else values
    assert (ended, rates) == ("", reference(mode, values))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["scheduler.mode=max"], ["mode='max' and watches val_loss (checkpoint.monitor, default), where lower is"]),
        (
            ["checkpoint.monitor=val_accuracy"],
            ["mode='min' and watches val_accuracy (checkpoint.monitor, command line)", "scheduler.monitor=COLUMN"],
        ),
        (
            ["scheduler.monitor=val_gap", "checkpoint.monitor=val_gap", "checkpoint.mode=max"],
            ["where higher is better"],
        ),
        (["scheduler.monitor=accuracies"], ["scheduler.monitor = 'accuracies' (command line)", "'accuracy'?"]),
        (["scheduler.kind=cycle", "scheduler.monitor=loss"], ["but build_scheduler returned OneCycleLR. Remove it"]),
        (["scheduler.kind=cycle"], ["built for 8 optimizer steps (total_steps), but the run has 24", "train.epochs=2"]),
    ],
)
def test_what_contradicts_itself_is_told(tmp_path: Path, words: list[str], told: list[str]) -> None:
    ended, _ = run(tmp_path, *words)
    assert all(text in ended for text in told), ended
    assert not (tmp_path / "it" / "history.csv").exists() or read_history(tmp_path / "it").empty


def test_a_builder_may_have_the_key_itself(tmp_path: Path) -> None:
    assert run(tmp_path, "scheduler.monitor=7", more=", monitor: int = 3")[0] == ""


def test_a_resumed_run_watches_what_it_watched(tmp_path: Path) -> None:
    words = ["scheduler.mode=max", "checkpoint.monitor=val_accuracy"]
    run(tmp_path, *words, epochs=3)
    other, _ = run(tmp_path, "scheduler.mode=max", "checkpoint.monitor=accuracy")
    assert "the column that ReduceLROnPlateau watches was val_accuracy and is accuracy (scheduler.monitor" in other
    assert run(tmp_path, *words)[1] == reference("max", SCORES)


def test_a_cycle_is_no_longer_after_its_end(tmp_path: Path) -> None:
    assert run(tmp_path, "scheduler.kind=cycle", epochs=2)[0] == ""
    longer, _ = run(tmp_path, "scheduler.kind=cycle", epochs=4)
    assert "cannot be extended after its start: train 2 epochs (train.epochs=2), or start a new run" in longer
    assert run(tmp_path, "scheduler.kind=cycle", epochs=2)[0] == ""


@pytest.mark.parametrize(
    ("name", "mode"), [("val_loss", "min"), ("val_f1", "max"), ("val_top1", "max"), ("wer", "min"), ("val_gap", None)]
)
def test_the_mode_of_a_name_is_known_or_not(name: str, mode: str | None) -> None:
    assert sure_mode_of(name) == mode


def plateaus(world, mode: str) -> list[Any]:
    """One rank: the rates of train_model and KerasModel, or what they say."""
    answers: list[Any] = []
    data = TensorDataset(X, X)
    for style in ("function", "keras"):
        net = nn.Linear(1, 1).double()
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        scheduler = ReduceLROnPlateau(optimizer, mode=mode, factor=0.5, patience=0)

        def step(model, x, y):
            return {"loss": (model(x) - y).square().mean() * 1e-3, "accuracy": 0.5}

        try:
            if style == "function":
                kept = {"optimizer": optimizer, "scheduler": scheduler, "scheduler_monitor": "val_accuracy"}
                frame = library.train_model(
                    net,
                    3,
                    *[DataLoader(data, 5)] * 2,
                    train_step=step,
                    valid_step=step,
                    verbose=False,
                    world=world,
                    **kept,
                )
            else:
                model = library.KerasModel(net, nn.MSELoss(), {"acc": lambda p, y: 0.5}, optimizer, scheduler)
                frame = model.fit(*[DataLoader(data, 5)] * 2, 3, None, 9, "val_acc", verbose=False, world=world)
            answers.append(frame["lr"].tolist())
        except UsageError as error:
            answers.append(str(error))
    return answers


@pytest.mark.parametrize("ranks", [1, 2])
def test_and_in_python(ranks: int) -> None:
    for answers in run_ranks(plateaus, ranks, mode="max"):
        assert answers == [[1.0, 1.0, 0.5]] * 2
    for answers in run_ranks(plateaus, ranks, mode="min") if ranks == 1 else ():
        assert "watches val_accuracy (scheduler_monitor, the argument of train_model), where higher" in answers[0]
        assert "watches val_acc (monitor, the argument of fit), where higher is better" in answers[1]


def cycle(optimizer: Any, kind: str) -> Any:
    if kind == "sequential":
        parts = [ConstantLR(optimizer), OneCycleLR(optimizer, 0.1, total_steps=4)]
        return SequentialLR(optimizer, parts, [3])
    one = OneCycleLR(optimizer, 0.1, total_steps=6)
    return ChainedScheduler([one, ConstantLR(optimizer)]) if kind == "chained" else one


@pytest.mark.parametrize(
    ("kind", "interval", "epochs", "told"),
    [
        ("plain", "step", 2, ""),
        (
            "plain",
            "step",
            3,
            "built for 6 optimizer steps (total_steps), but the run has 9. Make it with total_steps=9",
        ),
        ("plain", "epoch", 7, "built for 6 epochs (total_steps), but the run has 7"),
        ("sequential", "step", 2, ""),
        ("sequential", "step", 3, "built for 4 optimizer steps (total_steps), but the run has 6."),
        ("chained", "step", 3, "built for 6 optimizer steps (total_steps), but the run has 9"),
    ],
)
def test_a_schedule_with_an_end_is_looked_at_before_the_first_step(
    kind: str, interval: Any, epochs: int, told: str
) -> None:
    net = nn.Linear(1, 1).double()
    before = net.weight.clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)

    def train() -> None:
        loader = DataLoader(TensorDataset(X, X), 4)
        how = {"optimizer": optimizer, "scheduler": cycle(optimizer, kind), "scheduler_interval": interval}
        library.train_model(net, epochs, loader, train_step=lambda m, x, y: (m(x) - y).mean(), verbose=False, **how)

    if not told:
        train()
        return
    with pytest.raises(UsageError) as refused:
        train()
    assert told in str(refused.value) and torch.equal(net.weight, before)


def test_a_step_that_steps_itself_may_take_fewer(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Linear(1, 1).double()
    net.optimizer = optimizer = torch.optim.SGD(net.parameters(), lr=1.0)  # type: ignore[assignment]

    def step(model, x, y):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    scheduler = OneCycleLR(optimizer, 0.1, total_steps=3)
    with pytest.raises(ValueError, match="total steps"):
        library.train_model(
            net,
            2,
            DataLoader(TensorDataset(X, X), 4),
            train_step=step,
            scheduler=scheduler,
            scheduler_interval="step",
            verbose=False,
        )
    assert "is built for 3 optimizer steps (total_steps), but the run has 6" in caplog.text


def test_lazy_nets_are_refused_with_words_that_help() -> None:
    loader = DataLoader(TensorDataset(X, X), 4)
    for style in ("function", "keras", "prepare"):
        net = nn.Sequential(nn.LazyLinear(1, dtype=torch.float64))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        calls = {
            "function": lambda net=net, optimizer=optimizer: library.train_model(
                net, 1, loader, train_step=lambda m, x, y: (m(x) - y).mean(), optimizer=optimizer, verbose=False
            ),
            "keras": lambda net=net, optimizer=optimizer: library.KerasModel(
                net, nn.MSELoss(), optimizer=optimizer
            ).fit(1, loader, verbose=False),
            "prepare": lambda net=net: library.prepare(net, loader),
        }
        with pytest.raises(UsageError, match=r"0\.weight has no shape yet: 0 is a lazy module \(LazyLinear\). Run one"):
            calls[style]()
        net(X[:1])
        calls[style]()
