"""A validation that cannot work is told before training where that can be known; else the training before it is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

import dtrain
from dtrain.config import load_settings
from dtrain.distributed.world import bring_up
from dtrain.errors import DataError, StepError
from dtrain.rundir.history import read_history
from dtrain.trainer.train import train_run

RECIPE = Path(__file__).parent.parent / "recipes" / "resumable.py"
FAILS = """

_valid_step = valid_step

def valid_step(model, *batch):
    from pathlib import Path
    if Path(__file__).with_name("fails").exists():
        raise RuntimeError("a fault in validation")
    return _valid_step(model, *batch)
"""


class Pairs(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.ones(1), torch.ones(1)


def start(folder: Path, name: str, *words: str, resume: str = "auto") -> Path:
    recipe = folder / "recipe.py"
    recipe.write_text(RECIPE.read_text() + FAILS)
    settings = load_settings(str(recipe), [f"run.dir={folder}", f"run.name={name}", "epochs=2", *words], {})
    return train_run(settings, bring_up(cpu=True), resume)


def test_the_train_pass_before_it_is_kept_and_the_run_goes_on_from_there(tmp_path: Path) -> None:
    whole = start(tmp_path, "whole")
    (tmp_path / "fails").touch()
    with pytest.raises(RuntimeError, match="a fault in validation"):
        start(tmp_path, "it")
    assert [path.name for path in (tmp_path / "it/checkpoints").iterdir()] == ["epoch-1-step-12"]
    with pytest.raises(RuntimeError, match="a fault in validation"):
        start(tmp_path, "it")
    assert [path.name for path in (tmp_path / "it/checkpoints").iterdir()] == ["epoch-1-step-12"]
    (tmp_path / "fails").unlink()
    run = start(tmp_path, "it")
    times = ["seconds", "samples_per_second"]
    assert read_history(run).drop(columns=times).equals(read_history(whole).drop(columns=times))


def test_one_within_an_epoch_that_fails_saves_nothing_that_is_not_so(tmp_path: Path) -> None:
    (tmp_path / "fails").touch()
    with pytest.raises(RuntimeError, match="a fault in validation"):
        start(tmp_path, "it", "val_every_steps=5")
    assert not list((tmp_path / "it/checkpoints").glob("*"))


def train(valid_step, dl_train, dl_valid, trained: list[int]) -> None:
    def train_step(model, x, y):
        trained.append(1)
        return (model(x) - y).square().mean()

    net = nn.Linear(1, 1)
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)  # type: ignore[assignment]
    dtrain.train_model(
        net, 1, dl_train, dl_valid, 5, train_step=train_step, valid_step=valid_step, verbose=False, cpu=True
    )


def tensors(count: int) -> TensorDataset:
    return TensorDataset(torch.ones(count, 1), torch.ones(count, 1))


@pytest.mark.parametrize("dl_valid", [DataLoader(tensors(0)), DataLoader(tensors(3), 4, drop_last=True), []])
def test_an_empty_validation_is_told_before_training(dl_valid) -> None:
    trained: list[int] = []
    with pytest.raises(DataError, match="the valid loader yielded no batch") as told:
        train(lambda model, x, y: 0.0, DataLoader(tensors(8), 4), dl_valid, trained)
    assert trained == []
    assert told.value.on_all_ranks


def test_a_wrong_signature_is_told_before_training(tmp_path: Path) -> None:
    def valid_step(model, batch):
        return 0.0

    trained: list[int] = []
    with pytest.raises(StepError, match=r"valid_step\(model, batch\) cannot be called with .* a batch of 2 parts"):
        train(valid_step, DataLoader(Pairs(), 4), DataLoader(tensors(4), 4), trained)
    parts = random_split(Pairs(), [6, 2])
    with pytest.raises(StepError, match=r"valid_step\(model, batch\) cannot be called with .* a batch of 2 parts"):
        train(valid_step, DataLoader(parts[0], 4), DataLoader(parts[1], 4), trained)
    assert trained == []


def test_what_cannot_be_known_is_not_guessed() -> None:
    """Another collate function may make one part of two; another dataset may have other parts."""
    trained: list[int] = []
    as_mapping = DataLoader(tensors(4), 2, collate_fn=lambda samples: {"x": torch.stack([x for x, _ in samples])})
    for dl_valid in (as_mapping, [{"x": torch.ones(2, 1)}]):
        train(lambda model, batch: model(batch["x"]).mean(), DataLoader(tensors(8), 4), dl_valid, trained)
    assert len(trained) == 4
