"""The learning-rate range test: losses against NumPy, on any number of ranks, and what they suggest."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import Dtrain
from helpers.ranks import run_ranks
from torch.optim.optimizer import register_optimizer_step_post_hook

from dtrain.cli.find import _print_next
from dtrain.config import load_settings
from dtrain.distributed.world import bring_up
from dtrain.errors import AgreedError, StepError, UsageError
from dtrain.tools.find.curve import SMOOTHING, Suggestion, growing
from dtrain.tools.find.lr import find_clear_lr, find_lr

N, BATCH, STEPS = 19, 6, 14

RECIPE = """
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import dtrain

def build_model(kind: str = "declarative", flat: bool = False):
    net = nn.Linear(3, 1).double()
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    net.kind, net.flat = kind, flat
    return net

def build_dataloaders(once: bool = False):
    rows = np.random.RandomState(5).randn(19, 3)
    data = TensorDataset(torch.from_numpy(rows), torch.from_numpy(rows @ [[3.0], [-4.0], [5.0]]))
    loader = DataLoader(data, batch_size=6)
    return iter(loader) if once else loader, loader

def build_optimizer(model, lr: float = 0.01, none: bool = False, own: bool = False):
    model.own = None if not own else torch.optim.SGD(model.parameters(), lr=lr)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": lr / 4}]
    return None if none else torch.optim.SGD(groups, lr=lr)

def build_scheduler(optimizer, warmup: bool = False):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 if warmup else 1.0), "step"

def train_step(model, x, y):
    loss = ((model(x) - y) ** 2).mean()
    if model.flat:
        loss = loss * 0 + 3.0 + model.bias.sum() * 0
    if model.kind == "imperative":
        optimizer = model.own or model.optimizer
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()
    if model.kind == "mean":
        return dtrain.Mean(((model(x) - y) ** 2).sum(), len(x))
    return loss

def valid_step(model, x, y):
    raise RuntimeError("there is no validation in a range test")
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "ranged.py"
    file.write_text(RECIPE)
    return file


def found(recipe: str, *words: str, world: Any = None, rates: list[float] | None = None) -> Any:
    settings = load_settings(recipe, ["batch=global", *words], {})
    return find_lr(settings, world or bring_up(cpu=True), rates or growing(1e-4, 0.5, STEPS))


def all_found(world: Any, recipe: str, cases: list[list[Any]]) -> list[list[float]]:
    """One rank: the losses of each case."""
    words = [[f"model.kind={kind}", f"accumulation={accumulation}"] for kind, accumulation in cases]
    return [found(recipe, *some, world=world).curve.losses for some in words]


def by_numpy(accumulation: int) -> list[float]:
    """The losses of the same steps, over the whole global batches, until they are 4 times the best."""
    x = np.random.RandomState(5).randn(N, 3)
    y = x @ np.array([3.0, -4.0, 5.0])
    weight, bias = np.zeros(3), 0.0
    losses: list[float] = []
    mean, best = 0.0, math.inf
    starts = list(range(0, N, BATCH * accumulation)) * STEPS
    for step in range(STEPS):
        rows = slice(starts[step], starts[step] + BATCH * accumulation)
        rate = 1e-4 * (0.5 / 1e-4) ** (step / (STEPS - 1))
        error = x[rows] @ weight + bias - y[rows]
        losses.append(float(np.mean(error**2)))
        mean = SMOOTHING * mean + (1 - SMOOTHING) * losses[-1]
        smooth = mean / (1 - SMOOTHING ** (step + 1))
        best = min(best, smooth) if step else best
        if smooth > 4 * best:
            break
        weight = weight - rate * 2 * error @ x[rows] / len(error)
        bias = bias - rate / 4 * 2 * error.mean()
    return losses


CASES = [[kind, accumulation] for kind in ("imperative", "declarative", "mean") for accumulation in (1, 2)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_losses_are_those_of_the_global_batches_by_numpy(ranks: int, recipe: Path) -> None:
    """14 steps of at most 4 an epoch: the loader goes around; the groups' rates keep their ratio of 4."""
    for answers in run_ranks(all_found, ranks, recipe=str(recipe), cases=CASES):
        for case, losses in zip(CASES, answers, strict=True):
            np.testing.assert_allclose(losses, by_numpy(case[1]), rtol=1e-9, err_msg=str(case))


def test_rates_grow_by_a_factor_whatever_schedule_and_groups_there_are(recipe: Path) -> None:
    rates = growing(1e-4, 1e-2, 11)
    for words in ([], ["scheduler.warmup=true"], ["scheduler.warmup=true", "optimizer.lr=3.0"]):
        taken: list[list[float]] = []
        note = lambda optimizer, *_: taken.append([group["lr"] for group in optimizer.param_groups])  # noqa: B023, E731
        handle = register_optimizer_step_post_hook(note)
        try:
            test = found(str(recipe), *words, rates=rates)
        finally:
            handle.remove()
        np.testing.assert_allclose(taken, [[rate, rate / 4] for rate in rates])
        assert (test.key, test.several) == ("lr", (1.0, 0.25))
    np.testing.assert_allclose(np.diff(np.log(rates)), np.log(100) / 10)
    once = found(str(recipe), "data.once=true")
    assert len(once.curve.losses) == 4, "an iterator does not go around"


def test_what_cannot_be_is_an_error_by_name(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # files of one second and size are told apart by no cache
    with pytest.raises(StepError, match=r"there is no optimizer\. Define build_optimizer"):
        recipe.write_text(RECIPE.replace("def build_scheduler", "def no_scheduler"))
        found(str(recipe), "optimizer.none=true")
    with pytest.raises(
        AgreedError, match=r"ratios of the parameter groups' lr \(0\.0, 2\.0\) to the optimizer's lr, which is 0"
    ):
        recipe.write_text(RECIPE.replace('"lr": lr / 4', '"lr": 2.0'))
        found(str(recipe), "optimizer.lr=0.0")
    with pytest.raises(StepError, match="the train step returns no value named loss; it returns mistake"):
        recipe.write_text(RECIPE.replace("return loss.item()", 'return {"mistake": loss.item()}'))
        found(str(recipe), "model.kind=imperative")
    for start, end in ((1.0, 1.0), (2.0, 1.0), (0.0, 1.0), (1.0, math.inf)):
        with pytest.raises(UsageError, match="--from should be less than --to"):
            growing(start, end, 10)


def test_the_key_is_named_only_where_it_sets_the_rate(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def key(text: str) -> str | None:
        recipe.write_text(text)
        key: str | None = found(str(recipe)).key
        return key

    assert key(RECIPE.replace("flat: bool", "lr: int = 1, flat: bool")) == "optimizer.lr", "two builders have an lr"
    assert key(RECIPE.replace("lr: float", "rate: float").replace("lr / 4", "rate").replace("lr=lr", "lr=rate")) is None
    assert key(RECIPE.replace("lr / 4", "2 * lr").replace("lr=lr", "lr=2 * lr")) is None, "it sets another rate"


TWO = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def build_model():
    net = nn.ModuleDict({"one": nn.Linear(3, 1), "two": nn.Linear(3, 1), "free": nn.Linear(3, 1)}).double()
    net.optimizers = {"one": torch.optim.SGD(net["one"].parameters(), lr=0.1)}
    net.second = torch.optim.SGD([{"params": [net["two"].weight]}, {"params": [net["two"].bias], "lr": 0.05}], lr=0.2)
    return net

def build_dataloaders():
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(2)).double()
    return DataLoader(TensorDataset(x), batch_size=6), None

def train_step(model, x):
    loss = (model["one"](x) - x[:, :1]).square().mean()
    other = (model["two"](x) - loss.detach()).square().mean()
    for one, value in ((model.optimizers["one"], loss), (model.second, other)):
        one.zero_grad()
        value.backward()
        one.step()
    return {"loss": loss.item() + other.item()}
"""


def test_several_optimizers_keep_the_ratios_of_their_rates(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(TWO)
    taken: list[list[float]] = []
    note = lambda optimizer, *_: taken.append([group["lr"] for group in optimizer.param_groups])  # noqa: E731
    handle = register_optimizer_step_post_hook(note)
    rates = growing(1e-4, 1e-2, 11)
    try:
        test = found(str(recipe), rates=rates)
    finally:
        handle.remove()
    assert taken == [pytest.approx(one) for rate in rates for one in ([rate], [2 * rate, 0.5 * rate])]
    _print_next(test, Suggestion(0.1, 0.1, 1.0, 1.0), load_settings("digits", [], {}), [], [])
    assert (
        "this is the lr of optimizers.one; the other optimizers kept their ratios to it: second: 2, 0.5"
        in capsys.readouterr().out
    )


NOISY = """
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def build_model(hidden: int = 32):
    layers = nn.Linear(20, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2)
    return nn.Sequential(*layers)

def build_dataloaders(batch_size: int = 8):
    random = np.random.RandomState(0)
    rows = 2 * random.randn(800, 20)
    classes = (rows[:, :8].sum(axis=1) > 0) ^ (random.rand(800) < 0.08)
    data = TensorDataset(torch.tensor(rows).float(), torch.tensor(classes).long())
    loader = DataLoader(data, batch_size, shuffle=True)
    return loader, loader

def build_optimizer(model, lr: float = 0.01):
    return torch.optim.SGD(model.parameters(), lr=lr)

def train_step(model, rows, classes):
    return {"loss": nn.functional.cross_entropy(model(rows), classes)}

valid_step = train_step
"""


@pytest.mark.parametrize("seed", [42, 1, 3])
def test_a_small_noisy_recipe_gets_a_rate_with_which_it_learns(seed: int, tmp_path: Path) -> None:
    """Losses of eight samples each: it learns well between 0.02 and 0.3, and not at 0.001 or 1."""
    file = tmp_path / "noisy.py"
    file.write_text(NOISY)
    told: list[int] = []
    found = find_clear_lr(
        load_settings(str(file), [f"seed={seed}"], {}),
        bring_up(cpu=True),
        growing(1e-7, 10, 100),
        tell_again=lambda curve: told.append(len(curve.rates)),
    )
    suggestion = found.curve.suggestion()
    assert suggestion is not None and suggestion.agree
    assert 0.02 < suggestion.careful < 0.3
    assert [*told, len(found.curve.rates)] == [100, 400, 1600][: len(told) + 1], "again only while it is unclear"


def test_it_is_tested_again_only_where_that_can_help(tmp_path: Path) -> None:
    """With noise that hides any fall: not a net that was made with the file, and so was trained; nor a flat loss."""
    file = tmp_path / "hidden.py"

    def steps(text: str) -> int:
        file.write_text(text)
        settings = load_settings(str(file), [], {})
        return len(find_clear_lr(settings, bring_up(cpu=True), growing(1e-6, 1e-5, 12)).curve.rates)

    assert steps(NOISY) == 16 * 12
    made = "\nmodel = build_model()\ndl_train = dl_valid = build_dataloaders()[0]\n"
    made += "model.optimizer = build_optimizer(model)\ndel build_model, build_dataloaders, build_optimizer\n"
    assert steps(NOISY + made) == 12
    assert steps(NOISY.replace("cross_entropy(model(rows), classes)", "relu(model(rows)).sum() * 0 + 3")) == 12


# --- as a user has it -----------------------------------------------------------------------------------


def test_the_command_shows_a_curve_and_says_what_is_next(dtrain: Dtrain, recipe: Path) -> None:
    words = ("batch=global", "optimizer.lr=0.5", "--from", "1e-4", "--steps", 40, "-n", 2, "--cpu", "-o", "lr.svg")
    done = dtrain("find", "lr", recipe, *words)
    assert done.code == 0, done.text
    assert "smoothed training loss" in done.out and "log10 of the lr" in done.out
    assert "4 times its best" in done.out
    lines = done.out.splitlines()
    (steepest,) = (line.split()[2].rstrip(":") for line in lines if "falls most steeply" in line)
    (tenth,) = (line.split()[2].rstrip(":") for line in lines if "a tenth of the lr at which it is lowest" in line)
    assert 1e-4 < float(tenth) < float(steepest) < 1
    assert f"next: dtrain train {recipe} batch=global lr={tenth} -n 2 --cpu" in lines, "the more careful one"
    assert (dtrain.folder / "lr.svg").read_text().lstrip().startswith("<?xml")
    assert sorted(path.name for path in dtrain.folder.iterdir() if path.name != "__pycache__") == [
        "lr.svg",
        "ranged.py",
    ]


def test_a_loss_that_stays_is_exit_code_1_without_a_suggestion(dtrain: Dtrain, recipe: Path) -> None:
    done = dtrain("find", "lr", recipe, "model.flat=true", "--steps", 20, "--cpu")
    assert done.code == 1
    assert "no lr is suggested: the loss does not fall between lr 1e-07 and 10." in done.err
    assert "next:" not in done.out and not (dtrain.folder / "runs").exists()
