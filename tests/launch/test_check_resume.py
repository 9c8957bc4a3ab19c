"""`dtrain check resume`: equal where it should be; elsewhere the first difference and its cause."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Dtrain
from helpers.sweep import some

from dtrain.tools.check.resume import compare


def test_a_recipe_with_all_kinds_of_randomness_is_equal(dtrain: Dtrain, recipes: Path) -> None:
    done = dtrain("check", "resume", recipes / "resumable.py", "-n", 2, "data.workers=2", "--steps", 4)
    assert done.code == 0, done.text
    assert "equal: samples, losses, weights, optimizer and history, to the last bit, on 2 ranks." in done.out
    assert list(dtrain.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "where", "cause"),
    some(
        [
            (["fault=stream"], ": loss", "something that the step uses is not in the checkpoint"),
            (["own=order"], "the samples' indices", "a sampler or batch sampler with a state, or a random generator"),
        ],
        [
            (["own=stream"], "the samples' values", "a random generator that is neither global"),
            (["fault=counter"], ": loss", "a counter or list on the model or in the file"),
        ],
    ),
)
def test_what_no_checkpoint_can_know_is_found_and_named(
    dtrain: Dtrain, recipes: Path, words: list[str], where: str, cause: str
) -> None:
    done = dtrain("check", "resume", recipes / "resumable.py", "--steps", 3, *words)
    assert done.code == 1, done.text
    assert "different: the resumed run first differs from the uninterrupted one at epoch" in done.out
    assert where in done.out and cause in done.out


def test_a_recipe_that_fails_is_no_comparison(dtrain: Dtrain, recipes: Path) -> None:
    done = dtrain("check", "resume", recipes / "small.py", "fault=raise")
    assert done.code == 1
    assert "a fault of the user's own" in done.err
    assert "not compared" in done.out


LINE = {
    "epoch": 1,
    "end": False,
    "updates": 3,
    "shares": [{"rows": [1, 2], "indices": "[4, 5]", "values": {"loss": 0.5}}],
    "weights": {"w": 7},
    "optimizer": {"/0/exp_avg": 8},
    "lr": [0.1],
    "row": None,
}
END = LINE | {"end": True, "shares": [], "row": {"epoch": 1, "loss": 0.5, "val_loss": 0.25, "seconds": 1.0}}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda line, _: line["shares"][0].update(indices="[5, 4]"), "the samples' indices"),
        (lambda line, _: line["shares"][0].update(rows=[1, 3]), "the samples' values"),
        (lambda line, _: line["shares"][0]["values"].update(loss=0.5000000001), "loss"),
        (lambda line, _: line["weights"].update(w=9), "the weights: w"),
        (lambda line, _: line["optimizer"].clear(), "the optimizer: /0/exp_avg"),
        (lambda line, _: line.update(lr=[0.2]), "the learning rate"),
        (lambda _, end: end["row"].update(val_loss=0.3), "the history's val_loss"),
        (lambda line, _: line.update(updates=9), "there is such a step"),
    ],
)
def test_the_first_difference_is_told(change: Any, where: str) -> None:
    whole = [[LINE, END]]
    resumed = copy.deepcopy(whole)
    resumed[0][1]["row"]["seconds"] = 9.0
    assert compare(whole, resumed) is None
    change(*resumed[0])
    found = compare(whole, resumed)
    assert found is not None and found.where.endswith(f"rank 0: {where}") and found.cause
