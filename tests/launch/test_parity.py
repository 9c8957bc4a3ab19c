"""`dtrain check parity`: equal where it should be; elsewhere the first difference and its cause."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.commands import Dtrain
from helpers.sweep import some


@pytest.mark.parametrize("more", some([["accumulation=2"]], [[], ["batch=global"]]))
def test_digits_with_their_dropout_are_equal(dtrain: Dtrain, more: list[str]) -> None:
    done = dtrain("check", "parity", "digits", "-n", 3, "--steps", 3, *more)
    assert done.code == 0, done.text
    assert "equal: 3 ranks and 1 took the same samples in 3 optimizer steps" in done.out
    assert list(dtrain.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "where", "cause"),
    some(
        [
            (["fault=seed"], "before step 1", "rank-dependent seed"),
            (["fault=batch-norm"], "step 1: loss", "BatchNorm"),
            (["fault=metric"], "step 1: metric", "isn't an average over samples"),
            (["fault=gradient"], "optimizer step 1: the gradient of 0.bias", "how the batch is split"),
            (["noisy=true"], "step 1: the samples", "random augmentation"),
        ],
        [
            (["fault=dropout", "train.same_draws=false"], "step 1: loss", "dropout"),
            (["fault=summed"], "step 1: loss", "summed loss"),
        ],
    ),
)
def test_what_depends_on_the_split_is_found_and_named(
    dtrain: Dtrain, recipes: Path, words: list[str], where: str, cause: str
) -> None:
    done = dtrain("check", "parity", recipes / "split.py", *words)
    assert done.code == 1, done.text
    assert f"different: 2 ranks and 1 first differ at {where}" in done.out
    assert cause in done.out


def test_a_recipe_that_fails_is_no_comparison(dtrain: Dtrain, recipes: Path) -> None:
    done = dtrain("check", "parity", recipes / "small.py", "fault=raise")
    assert done.code == 1
    assert "a fault of the user's own" in done.err
    assert "not compared: the run on 1 rank failed" in done.out


def test_rounding_that_the_optimizer_makes_grow_is_no_difference(dtrain: Dtrain) -> None:
    done = dtrain("check", "parity", "text", "length=32", "batch_size=8", "--steps", 8)
    assert done.code == 0, done.text


def test_ranks_that_part_from_each_other_after_a_step_are_found(dtrain: Dtrain, recipes: Path) -> None:
    done = dtrain("check", "parity", recipes / "split.py", "fault=optimizer", "train.same_draws=false")
    assert done.code == 1, done.text
    assert "the optimizers' settings differ: lr" in done.err
    assert "not compared: the run on 2 ranks failed, see above" in done.out


def test_padded_batches_channels_last_and_two_optimizers_are_compared(dtrain: Dtrain, recipes: Path) -> None:
    done = dtrain("check", "parity", recipes / "two_optimizers.py", "batch=global", "--steps", 3)
    assert done.code == 0, done.text
    assert "equal: 2 ranks and 1 took the same samples in 6 optimizer steps" in done.out


def test_batches_of_two_loaders_are_compared(dtrain: Dtrain, recipes: Path) -> None:
    done = dtrain("check", "parity", recipes / "two_loaders.py", "train.combine=max_cycle", "--steps", 3)
    assert done.code == 0, done.text
    assert "equal: 2 ranks and 1 took the same samples in" in done.out


@pytest.mark.parametrize(
    ("fault", "where", "cause"),
    [
        ("padding", "step 1: loss", "padding: a batch is padded to its longest sample"),
        ("scaled", "optimizer step 2: the gradient of tagger.", "how the batch is split"),
    ],
)
def test_differences_of_these_are_found(dtrain: Dtrain, recipes: Path, fault: str, where: str, cause: str) -> None:
    words = ["batch=global", "--steps", 2, f"fault={fault}"]
    done = dtrain("check", "parity", recipes / "two_optimizers.py", *words)
    assert done.code == 1, done.text
    assert f"different: 2 ranks and 1 first differ at {where}" in done.out
    assert cause in done.out
