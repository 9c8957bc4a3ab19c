"""What is said before the first step, and what `dtrain keys` lists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import dtrain
from dtrain.cli.keys import _found, table
from dtrain.config.keys import alias_of, meant, suggestion
from dtrain.config.schema import leaves
from dtrain.errors import UsageError
from dtrain.recipe.loader import _missing

DATA = TensorDataset(torch.ones(10, 2), torch.ones(10, 1))
HEAD = r"device: cpu \(\d+ threads?\), 1 rank, fp32; "


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(DATA)


def step(model, x, y):  # type: ignore[no-untyped-def]
    return nn.functional.mse_loss(model(x), y)


def first_lines(capsys: pytest.CaptureFixture[str], dl_train: object = None, **more: object) -> list[str]:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    net[0].requires_grad_(False)
    net.optimizer = torch.optim.SGD(net[1].parameters(), lr=0.1)  # type: ignore[assignment]
    how = {"train_step": step, "valid_step": step, "cpu": True, **more}
    dtrain.train_model(net, 2, DataLoader(DATA, 4) if dl_train is None else dl_train, how.pop("dl_valid", None), **how)  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    return lines[: next((n for n, line in enumerate(lines) if line.startswith("epoch ")), 0)]


def test_the_lines_say_what_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    device, data = first_lines(capsys, dl_valid=DataLoader(DATA, 10))
    assert re.fullmatch(f"{HEAD}13 parameters, 4 trained", device)
    assert data == "data: 10 train, 10 valid samples; batch 4; 6 optimizer steps in 2 epochs"


def test_of_accumulated_batches_the_step_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    _, data, batch = first_lines(capsys, accumulation=2)
    assert data == "data: 10 train samples; 4 optimizer steps in 2 epochs"
    assert batch == "batch 4 x accumulation 2 = 8 samples per step"


def test_of_a_stream_nothing_is_read_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    _, data = first_lines(capsys, DataLoader(Stream(), 4))
    assert data == "data: streamed train samples; batch 4"


def test_nothing_is_said_where_nothing_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    assert first_lines(capsys, verbose=False) == []


def test_keys_are_listed_with_default_type_and_sentence() -> None:
    text = table(*_found(["checkpoint"]), width=80)
    assert "checkpoint.keep_last = 2  (whole number of at least 1)\n    number of latest checkpoints to keep" in text
    assert "train." not in text.partition("With a recipe")[0]
    assert max(map(len, text.splitlines())) <= 80
    every = table(*_found([]), width=80)
    assert all(f"{key}" in every for key in leaves() if key != "defaults")


def test_a_recipe_s_own_parameters_are_listed(recipe_file: Path) -> None:
    text = table(*_found([str(recipe_file)]), width=80)
    assert "model.hidden = 8  (int)\n    of build_model" in text
    assert "data.path  (str)\n    of build_dataloaders, required" in text


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "listed.py"
    file.write_text("def build_model(hidden: int = 8): ...\ndef build_dataloaders(path: str): ...\n")
    return file


def test_a_default_that_is_an_array_is_listed(tmp_path: Path) -> None:
    """It compares each of its values, where it is asked whether it is None."""
    file = tmp_path / "arrays.py"
    file.write_text("import numpy as np\ndef build_model(weights=np.ones(3), seen=None): ...\n")
    found, _ = _found([str(file), "model"])
    assert [(key.name, key.default) for key in found] == [("model.weights", "[1. 1. 1.]"), ("model.seen", "")]


def test_a_missing_file_is_put_down_to_the_path_that_leads_to_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"split": "train", "folder": "data/train", "file": str(tmp_path / "data/train/a.csv"), "here": "."}
    error = FileNotFoundError(2, "No such file or directory", "data/train/a.csv")
    assert list(_missing(error, given)) == ["folder", "file"]
    assert f"started, {tmp_path}" in error.__notes__[0]
    assert _missing(FileNotFoundError("no file of that kind"), given) == {}


def test_what_is_no_section_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="'checkpoint'"):
        _found(["checkpiont"])
    with pytest.raises(UsageError, match=r"model\.\* are parameters of build_model: `dtrain keys RECIPE.py model`"):
        _found(["model"])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("max_epochs", "'train.epochs'"),
        ("gradient_accumulation_steps", "'train.accumulation'"),
        ("learning_rate", "build_optimizer"),
        ("batch_size", "build_dataloaders"),
        ("gpus", "-n N"),
        ("device", "--cpu"),
        ("fp16", "precision=fp16"),
        ("strategy", "train.shard=fsdp"),
        ("num_nodes", "--nodes N"),
        ("output_dir", "'run.dir'"),
        ("epohcs", "'epochs'"),
        ("keep", "'keep_last' or 'keep_best'"),
    ],
)
def test_other_libraries_names_and_near_ones_are_answered(word: str, said: str) -> None:
    known = [key.rpartition(".")[2] for key in leaves()]
    assert said in suggestion(word, known)


def test_each_alias_names_a_key_that_there_is() -> None:
    for word in ("n_epochs", "bf16", "warmup_ratio", "wandb"):
        assert meant(word)
    assert alias_of("max-epochs") == "train.epochs"
    assert {alias_of(word) for word in ("n_epochs", "warmup_ratio", "wandb", "log_every", "save_steps")} <= set(
        leaves()
    )
    assert alias_of("epochs") is None
