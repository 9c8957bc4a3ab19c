"""How long a run is: optimizer steps, batches, the same batches again; and the two switches of how it computes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from safetensors.torch import load_file

from dtrain import read_history
from dtrain.config import load_settings
from dtrain.distributed.world import bring_up
from dtrain.errors import AgreedError, DataError, UsageError
from dtrain.trainer.plan import make_plan
from dtrain.trainer.setup import configured_engine, load_task, run_epochs
from dtrain.trainer.train import train_run

RECIPE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SEEN, RAN = [], []
X = torch.arange(19, dtype=torch.float64)[:, None]

def build_model():
    net = nn.Linear(1, 1).double()
    net.weight.data.fill_(0.1)
    net.bias.data.fill_(0.0)
    return net

def build_dataloaders(shuffle: bool = False):
    data = TensorDataset(X / 19, X * 2 / 19)
    return DataLoader(data, batch_size=4, shuffle=shuffle), DataLoader(data, batch_size=4)

def build_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)

def train_step(model, x, y):
    SEEN.append([round(v * 19) for v in x[:, 0].tolist()])
    RAN.append(torch.are_deterministic_algorithms_enabled())
    return ((model(x) - y) ** 2).mean()

def valid_step(model, x, y):
    SEEN.append("valid")
    return ((model(x) - y) ** 2).mean()
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "lengths.py"
    file.write_text(RECIPE)
    return file


def all_fitted(world, recipe: str, cases: list[list[str]]) -> list[dict[str, Any]]:
    """One rank: what a run of each config came to."""
    return [fitted(world, recipe, words) for words in cases]


def fitted(world: Any, recipe: str, words: list[str]) -> dict[str, Any]:
    settings = load_settings(recipe, ["train.batch=global", *words], {})
    task = load_task(settings)
    epochs = run_epochs(task, world.size, settings)
    engine = configured_engine(task, world, settings, epochs=epochs)
    total = engine.updates_in_all()
    rows = engine.fit().rows
    return {
        "weights": [task.module.weight.item(), task.module.bias.item()],  # type: ignore[union-attr, operator]
        "rows": [row["epoch"] for row in rows],
        "updates": engine.place.updates,
        "total": total,
        "epochs": epochs,
    }


def by_hand(updates: int, accumulation: int) -> list[float]:
    """The weights after so many optimizer steps, in plain floats: rows in order, four a batch, the epoch's rest last."""
    weight, bias = 0.1, 0.0
    size = 4 * accumulation
    starts = [start for _ in range(20) for start in range(0, 19, size)][:updates]
    for start in starts:
        rows = [k / 19 for k in range(start, min(start + size, 19))]
        errors = [weight * x + bias - 2 * x for x in rows]
        weight -= 0.1 * sum(2 * e * x for e, x in zip(errors, rows, strict=True)) / len(rows)
        bias -= 0.1 * sum(2 * e for e in errors) / len(rows)
    return [weight, bias]


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_ends_after_so_many_optimizer_steps(recipe: Path, ranks: int) -> None:
    """An epoch has 5 batches; with two of them a step, 3 steps."""
    cases = (
        (["max_steps=7"], 7, 1, [1, 2]),
        (["max_steps=10"], 10, 1, [1, 2]),
        (["max_steps=4", "accumulation=2"], 4, 2, [1, 2]),
        (["max_steps=99", "epochs=1"], 5, 1, [1]),
    )
    for answers in run_ranks(all_fitted, ranks, recipe=str(recipe), cases=[case[0] for case in cases]):
        for (words, updates, accumulation, epochs), found in zip(cases, answers, strict=True):
            assert found["rows"] == epochs, words
            assert found["updates"] == found["total"] == updates
            assert found["epochs"] == len(epochs)
            assert found["weights"] == pytest.approx(by_hand(updates, accumulation))


def run_in(folder: Path, recipe: Path, *words: str, name: str = "it") -> Path:
    settings = load_settings(str(recipe), [*words, f"run.dir={folder}/runs", f"run.name={name}"], {})
    return train_run(settings, bring_up(cpu=True))


def test_a_run_of_so_many_steps_goes_on_within_its_last_epoch(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("max_steps=8", "checkpoint.every_steps=1", "checkpoint.keep_last=20", "checkpoint.keep_best=0")
    whole = run_in(tmp_path, recipe, *words, name="whole")
    assert read_history(whole)["epoch"].tolist() == [1, 2]
    for place in ("epoch-1", "epoch-2-step-2", "epoch-2-step-3"):
        cut = tmp_path / "runs/it"
        shutil.copytree(whole, cut)
        kept = {"epoch-1": ["epoch-1"]}.get(place, ["epoch-1", place])
        for path in (cut / "checkpoints").iterdir():
            if path.name not in kept:
                shutil.rmtree(path)
        assert run_in(tmp_path, recipe, *words) == cut
        assert f"resuming from {cut}/checkpoints/{place}" in capsys.readouterr().out
        one, two = (load_file(run / "checkpoints/epoch-2/model.safetensors") for run in (whole, cut))
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert read_history(cut)["loss"].tolist() == read_history(whole)["loss"].tolist()
        run_in(tmp_path, recipe, *words)
        assert "is complete: 2 epochs. train.max_steps = 8 is reached." in capsys.readouterr().out
        shutil.rmtree(cut)
    with pytest.raises(AgreedError, match=r"train\.max_steps was 8 and is 9"):
        run_in(tmp_path, recipe, "max_steps=9", *words[1:], name="whole")


def seen_by(recipe: Path, *words: str) -> tuple[list[Any], list[bool]]:
    settings = load_settings(str(recipe), [*words, "epochs=2"], {})
    task = load_task(settings)
    configured_engine(task, bring_up(cpu=True), settings, epochs=2).fit()
    names = task.train_step.__globals__
    return names["SEEN"], names["RAN"]


def test_limited_batches_and_the_same_batches_again(recipe: Path) -> None:
    seen, _ = seen_by(recipe, "limit_batches=2")
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], "valid", "valid"] * 2
    seen, _ = seen_by(recipe, "overfit_batches=2", "data.shuffle=true")
    first, second = seen[:2], seen[7:9]
    assert first == second and first != [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert seen[2:7] == ["valid"] * 5, "validation is whole"
    seen, _ = seen_by(recipe, "limit_batches=2", "data.shuffle=true")
    assert seen[:2] != seen[4:6], "else each epoch has an order of its own"


def test_deterministic_algorithms_are_on_while_it_trains(recipe: Path, tmp_path: Path) -> None:
    settings = load_settings(str(recipe), ["train.deterministic=true", "epochs=1", f"run.dir={tmp_path}/runs"], {})
    train_run(settings, bring_up(cpu=True))
    ran = next(module.RAN for module in sys.modules.values() if getattr(module, "__file__", None) == str(recipe))
    assert ran and all(ran)
    assert not torch.are_deterministic_algorithms_enabled()


def test_channels_last_is_how_weights_and_images_lie(recipe: Path) -> None:
    recipe.write_text(
        RECIPE
        + """
def build_model():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 1))

def build_dataloaders():
    data = TensorDataset(torch.ones(5, 3, 6, 6), torch.ones(5, 1))
    return DataLoader(data, batch_size=5), None

def train_step(model, x, y):
    return ((model(x) - y) ** 2).mean()
"""
    )
    settings = load_settings(str(recipe), ["train.channels_last=true"], {})
    task = load_task(settings)
    lies: list[bool] = []

    def look(module: Any, _: Any, out: torch.Tensor) -> None:
        lies.extend(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (module.weight, out))

    task.module[1].register_forward_hook(look)  # type: ignore[index]
    configured_engine(task, bring_up(cpu=True), settings, epochs=1).fit()
    assert lies and all(lies)


def test_without_a_length_the_steps_are_one_epoch_unless_batches_are_limited(recipe: Path) -> None:
    recipe.write_text(RECIPE + "\ndef build_dataloaders():\n    return iter([(X / 19, X)]), None\n")
    settings = load_settings(str(recipe), ["max_steps=3"], {})
    assert run_epochs(load_task(settings), 1, settings) == 1
    settings = load_settings(str(recipe), ["max_steps=3", "limit_batches=1"], {})
    with pytest.raises(UsageError, match=r"train\.max_steps = 3 .*the training loader has no length"):
        run_epochs(load_task(settings), 1, settings)
    with pytest.raises(Exception, match="limit_batches and overfit_batches both limit"):
        load_settings(str(recipe), ["limit_batches=3", "overfit_batches=1"], {})


def test_a_plan_says_how_long_it_will_be(recipe: Path) -> None:
    for words, epochs, steps in (
        (["max_steps=7"], 2, 7),
        (["max_steps=7", "accumulation=2"], 3, 7),
        (["max_steps=99", "epochs=2"], 2, 10),
        (["limit_batches=2", "epochs=3"], 3, 6),
        (["overfit_batches=1", "max_steps=4"], 4, 4),
    ):
        settings = load_settings(str(recipe), ["train.batch=global", *words], {})
        task = load_task(settings)
        plan = make_plan(task, settings, 2)
        assert (plan.epochs, plan.optimizer_steps) == (epochs, steps), words
        engine = configured_engine(task, bring_up(cpu=True), settings, epochs=plan.epochs)
        assert engine.updates_in_all() == steps


def test_a_loader_without_a_batch_is_told_as_such(recipe: Path) -> None:
    recipe.write_text(RECIPE + "\ndef build_dataloaders():\n    return DataLoader(X[:0], batch_size=4), None\n")
    settings = load_settings(str(recipe), ["max_steps=3", "train.schedule=cosine"], {})
    with pytest.raises(DataError, match="the train loader yielded no batch"):
        configured_engine(
            task := load_task(settings), bring_up(cpu=True), settings, epochs=run_epochs(task, 1, settings)
        ).fit()
