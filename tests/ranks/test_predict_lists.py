"""Predictions that are no rows of numbers: an entry for each sample, in the data's order, on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.commands import Dtrain
from helpers.ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain.distributed.world import World, bring_up
from dtrain.engine.predict import predict
from dtrain.errors import StepError, UsageError
from dtrain.trainer.export import write_predictions

COUNT = 11


def entry(number: int) -> dict[str, Any]:
    """What is predicted for a sample, made anew from its number."""
    boxes = [[float(number), float(side)] for side in range(number % 3)]
    return {"tags": ["B"] * (number % 4), "text": f"sample {number} ✓", "boxes": boxes, "score": number / 4}


def step(model: Any, features: torch.Tensor) -> list[Any]:
    found = [entry(int(number)) for number in features[:, 0]]
    return [one | {"boxes": torch.tensor(one["boxes"]).reshape(-1, 2)} for one in found]


def loader(batch_size: int = 2) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(float(COUNT))[:, None]), batch_size)


def plain(found: Any) -> Any:
    return [one | {"boxes": one["boxes"].tolist()} for one in found]


def of_ranks(world: World, batch_size: int) -> Any:
    return plain(predict(nn.Linear(1, 1), loader(batch_size), world, predict_step=step))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_each_sample_has_its_own_once_and_in_order(ranks: int, batch_size: int) -> None:
    for found in run_ranks(of_ranks, ranks, batch_size=batch_size):  # with 16, two ranks of three have no sample
        assert found == [entry(number) for number in range(COUNT)]


def test_rows_stay_rows() -> None:
    world = bring_up(cpu=True)
    pair = predict(nn.Linear(1, 1), loader(), world, predict_step=lambda model, x: [x, x + 1])
    assert [tuple(part.shape) for part in pair] == [(COUNT, 1), (COUNT, 1)], "a list of tensors with a row per sample"
    texts = predict(nn.Linear(1, 1), loader(), world, predict_step=lambda model, x: [str(float(one)) for one in x])
    assert texts[:2] == ["0.0", "1.0"]
    with pytest.raises(StepError, match="a list with an entry per sample for one batch, and rows for another"):
        mixed = lambda model, x: x if len(x) == 2 else ["a"] * len(x)  # noqa: E731
        predict(nn.Linear(1, 1), loader(), world, predict_step=mixed)
    with pytest.raises(StepError, match="or a list with an entry per sample"):
        predict(nn.Linear(1, 1), loader(), world, predict_step=lambda model, x: ["a"] * 3)


def test_files_hold_them(tmp_path: Path) -> None:
    found = predict(nn.Linear(1, 1), loader(), bring_up(cpu=True), predict_step=step)
    write_predictions(found, tmp_path / "x.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert lines == [entry(number) for number in range(COUNT)]
    write_predictions(["a", "b,c"], tmp_path / "x.csv")
    assert pd.read_csv(tmp_path / "x.csv")["prediction"].tolist() == ["a", "b,c"]
    write_predictions([{"a": 1, "b": "x"}, {"a": 2, "b": "y"}], tmp_path / "y.csv")
    assert pd.read_csv(tmp_path / "y.csv")["b"].tolist() == ["x", "y"]
    write_predictions({"a": torch.tensor([[1.0], [float("nan")]]), "b": torch.tensor([3, 4])}, tmp_path / "y.jsonl")
    assert json.loads((tmp_path / "y.jsonl").read_text().splitlines()[1]) == {"a": ["nan"], "b": 4}
    for name in ("z.csv", "z.npy"):
        with pytest.raises(UsageError, match=r"Use \.jsonl"):
            write_predictions(found, tmp_path / name)
        assert not (tmp_path / name).exists()


def test_what_no_file_holds_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="predict_step returned a Linear for a sample"):
        write_predictions([nn.Linear(1, 1)], tmp_path / "x.jsonl")
    assert not list(tmp_path.iterdir())


def test_from_the_command(tmp_path: Path, dtrain: Dtrain, recipes: Path) -> None:
    text = (recipes / "small.py").read_text()
    recipe = tmp_path / "tags.py"
    recipe.write_text(
        f"{text}\n\ndef predict_step(model, features):\n    return [{{'n': [1] * k}} for k in range(len(features))]\n"
    )
    assert dtrain("train", recipe, "epochs=1", "run.name=it", "--cpu").code == 0
    done = dtrain("predict", "runs/it", "-o", "x.jsonl", "--cpu")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (dtrain.folder / "x.jsonl").read_text().splitlines()]
    assert rows[:2] == [{"n": []}, {"n": [1]}]
    refused = dtrain("predict", "runs/it", "-o", "x.csv", "--cpu")
    assert refused.code == 2
    assert "Use .jsonl" in refused.err


def test_rows_of_unequal_lengths_name_a_remedy_that_works() -> None:
    world = bring_up(cpu=True)

    def padded(model: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), 1 + int(x[0, 0]) % 4)

    told = r"rows of the shapes \(1,\), \(3,\) for different batches.*\[row\.tolist\(\) for row in rows\]"
    with pytest.raises(StepError, match=told):
        predict(nn.Linear(1, 1), loader(), world, predict_step=padded)
    found = predict(
        nn.Linear(1, 1), loader(), world, predict_step=lambda model, x: [row.tolist() for row in padded(model, x)]
    )
    assert [len(row) for row in found] == [1, 1, 3, 3] * 2 + [1, 1, 3]
