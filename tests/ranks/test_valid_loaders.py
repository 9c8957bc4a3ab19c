"""Several validation loaders: what one plain loop computes for each, on any number of ranks, and who copes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Dtrain
from helpers.ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader

import dtrain
from dtrain.config import load_settings
from dtrain.distributed.world import World, bring_up
from dtrain.engine.valid_loaders import by_name
from dtrain.rundir.history import read_history
from dtrain.trainer.train import train_run

RECIPE = """
import torch
from torch import nn, optim
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

SIZES = {"easy": (31, 5), "hard": (2, 4), "far-1.b": (9, 9)}  # samples, batch size


def data(n, seed):
    draw = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 4, generator=draw).double(), torch.randint(3, (n,), generator=draw))


def build_model():
    torch.manual_seed(3)
    return nn.Linear(4, 3).double()


def build_dataloaders(order: str = "easy hard far-1.b"):
    valid = {name: DataLoader(data(n, number), size) for number, (name, (n, size)) in enumerate(SIZES.items(), 1)}
    return DataLoader(data(21, 0), 6), {name: valid[name] for name in order.split()}


def build_optimizer(model, lr: float = 0.1):
    return optim.SGD(model.parameters(), lr=lr)


def build_metrics():
    return {"ones": lambda predicted: {"sum": int(predicted.sum()), "n": len(predicted)}}


def train_step(model, x, y):
    return cross_entropy(model(x), y)


def valid_step(model, x, y, loader_name=""):
    logits = model(x)
    seen = {"loss": cross_entropy(logits, y), "ones": logits.argmax(1)}
    return seen | ({"worst": (logits.argmax(1) != y).double().mean()} if loader_name == "hard" else {})
"""
STOPS = """

def after_step(step, run):
    if step == 6 and (run.folder.parent / "stop").exists():
        raise KeyError
"""
OWN: dict[str, Any] = {}
exec(RECIPE, OWN)  # noqa: S102 - its own text
SIZES, data, build, loaders = OWN["SIZES"], OWN["data"], OWN["build_model"], OWN["build_dataloaders"]
train_step, valid_step, cross_entropy = OWN["train_step"], OWN["valid_step"], OWN["cross_entropy"]
EPOCHS = 2


def plain() -> list[dict[str, float]]:
    """One loop by hand, with all of a loader's samples at once."""
    net, rows = build(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(EPOCHS):
        for x, y in loaders()[0]:
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()
        row: dict[str, float] = {}
        for number, (name, (n, _)) in enumerate(SIZES.items(), 1):
            x, y = data(n, number).tensors
            with torch.no_grad():
                logits = net(x)
            row[f"val_{name}_loss"] = float(cross_entropy(logits, y))
            row[f"val_{name}_ones_sum"], row[f"val_{name}_ones_n"] = float(logits.argmax(1).sum()), n
            if name == "hard":
                row["val_hard_worst"] = float((logits.argmax(1) != y).double().mean())
        rows.append(row)
    return rows


def start(folder: Path, *words: str, world: World | None = None) -> Path:
    recipe = folder / "several.py"
    if not recipe.exists():
        recipe.write_text(RECIPE)
    how = [f"run.dir={folder}", "run.name=it", f"epochs={EPOCHS}", "train.batch=global", *words]
    return train_run(load_settings(str(recipe), how, {}), world or bring_up(cpu=True))


def of_ranks(world: World, folder: str) -> list[dict[str, Any]]:
    start(Path(folder), "val_every_steps=3", world=world)
    train, valid = loaders()
    net = build()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=9)
    steps: dict[str, Any] = {"train_step": train_step, "valid_step": valid_step}
    how: dict[str, Any] = {"optimizer": optimizer, "scheduler": schedule, "world": world, "batch": "global"}
    metrics = {"ones": lambda predicted: float(predicted.sum())}
    frame = dtrain.train_model(net, EPOCHS, train, valid, **steps, **how, metrics=metrics, verbose=False)
    kept = dtrain.KerasModel(net, nn.CrossEntropyLoss()).evaluate(valid, batch="global", world=world)
    return [frame.to_dict("records")[-1], kept]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_is_what_one_loop_computes_of_its_samples(tmp_path: Path, ranks: int) -> None:
    (tmp_path / "several.py").write_text(RECIPE)
    told = run_ranks(of_ranks, ranks, folder=str(tmp_path))
    expected, frame = plain(), read_history(tmp_path / "it")
    for row, known in zip(frame.to_dict("records"), expected, strict=True):
        assert {name: row[name] for name in known} == pytest.approx(known, rel=1e-12)
        assert {name for name in row if name.startswith("val_")} == set(known)
    within = (tmp_path / "it/validations.csv").read_text().splitlines()
    assert within[0].startswith("epoch,step,val_easy_loss,val_easy_ones_sum,val_easy_ones_n,val_hard_loss")
    assert len(within) == 1 + EPOCHS * 4 // 3
    for last, kept in told:
        losses = {name: value for name, value in expected[-1].items() if name.endswith("_loss")}
        assert {name: last[name] for name in losses} == pytest.approx(losses, rel=1e-12)
        assert kept == pytest.approx(losses, rel=1e-12)


def test_the_first_loss_is_monitored_and_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(tmp_path, "data.order=hard easy", "early_stopping.patience=1")
    said = "validation loaders: hard, easy; the best epoch is that of val_hard_loss (another: checkpoint.monitor)"
    assert said in capsys.readouterr().out
    for section in ("checkpoint", "early_stopping"):
        values = load_settings(str(tmp_path / "it/config.yaml"), [], {}).config
        assert getattr(values, section).monitor == "val_hard_loss"


def test_another_column_may_be_named_and_a_wrong_one_is_refused_before_the_start(tmp_path: Path) -> None:
    start(tmp_path, "checkpoint.monitor=val_far-1.b_ones_sum", "checkpoint.mode=max")
    with pytest.raises(dtrain.UsageError, match=r"checkpoint\.monitor = 'val_loss'.* val_easy_loss or val_hard_loss"):
        start(tmp_path, "checkpoint.monitor=val_loss", "run.name=other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(dtrain.UsageError, match=r"'val_hrad_ones'.*such as val_hard_ones\.$"):
        start(tmp_path, "checkpoint.monitor=val_hrad_ones", "run.name=other")
    with pytest.raises(dtrain.UsageError, match=r"'val_easy_los'.*Did you mean 'val_easy_loss'"):
        start(tmp_path, "checkpoint.monitor=val_easy_los", "run.name=third")
    assert not (tmp_path / "third/history.csv").exists()


def test_resumed_it_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    (tmp_path / "several.py").write_text(RECIPE + STOPS)
    how = ["checkpoint.every_steps=1", "val_every_steps=1", "epochs=3"]
    whole = read_history(start(tmp_path, *how, "run.name=whole"))
    (tmp_path / "stop").touch()
    with pytest.raises(KeyError):
        start(tmp_path, *how)
    (tmp_path / "stop").unlink()
    again = read_history(start(tmp_path, *how))
    times = ["seconds", "samples_per_second"]
    assert again.drop(columns=times).to_csv() == whole.drop(columns=times).to_csv()


BAD: list[Any] = [{}, {"a b": [1]}, {1: [1]}, {"": [1]}, {"loss": [1]}, {"top-acc": [1]}, {"cer1": [1]}, {"a": None}]


@pytest.mark.parametrize("loaders", [*BAD, [DataLoader([1])], (DataLoader([1]), DataLoader([1]))])
def test_what_names_no_loader_or_no_column_is_refused(loaders: Any) -> None:
    with pytest.raises(dtrain.UsageError, match="validation loader"):
        by_name(loaders)


def test_an_empty_one_is_told_before_the_start_and_two_values_of_one_column_with_the_first_row() -> None:
    train, valid = loaders()
    steps: dict[str, Any] = {"train_step": train_step, "verbose": False, "cpu": True}
    net = build()
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    empty = {"easy": valid["easy"], "none": DataLoader(data(3, 1), 8, drop_last=True)}
    with pytest.raises(dtrain.DataError, match=r"the valid\.none loader yielded no batch"):
        dtrain.train_model(net, 1, train, empty, valid_step=valid_step, **steps)
    twice = {"a": valid["easy"], "a_b": valid["hard"]}
    with pytest.raises(dtrain.StepError, match="two validation loaders have the column val_a_b_x"):
        dtrain.train_model(net, 1, train, twice, valid_step=lambda m, x, y: {"b_x": 1.0, "x": 2.0}, **steps)
    for several, told in (
        ({"a": train}, r"the training data is a mapping of 1 loaders \(a\).* Set combine"),
        ([train, train], r"the train data is a list of 2 loaders, and should be one"),
    ):
        with pytest.raises(dtrain.UsageError, match=told):
            dtrain.train_model(net, 1, several, None, **steps)


def test_the_commands_know_the_loaders(tmp_path: Path) -> None:
    (tmp_path / "several.py").write_text(RECIPE)
    run, dtrain_ = start(tmp_path), Dtrain(tmp_path)
    row = read_history(run).to_dict("records")[-1]
    done = dtrain_("evaluate", run, "--checkpoint", "last")
    assert f"epoch 2 of {run}, {sum(n for n, _ in SIZES.values())} samples" in done.out
    for name in SIZES:
        assert f"val_{name}_loss = {row[f'val_{name}_loss']!r}" in done.out
    done = dtrain_("predict", run, "-o", tmp_path / "p.csv")
    assert "for the loader 'easy' (the first; see --loader)" in done.out
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 1 + SIZES["easy"][0]
    done = dtrain_("predict", run, "-o", tmp_path / "q.csv", "--loader", "hard")
    assert len((tmp_path / "q.csv").read_text().splitlines()) == 1 + SIZES["hard"][0]
    done = dtrain_("predict", run, "-o", tmp_path / "q.csv", "--loader", "hrd")
    assert "--loader hrd" in done.text and "they are easy, hard, far-1.b. Did you mean 'hard'?" in done.text
    done = dtrain_("plot", run, "--metric", "val_hard_loss")
    assert done.code == 0 and "hard_loss" in done.out
