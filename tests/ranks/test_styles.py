"""The three styles are one engine: the same numbers from script, functions and Keras, to the last digit."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.commands import Dtrain
from helpers.sweep import some


@pytest.mark.parametrize("ranks", some([3], [1, 2]))
def test_the_same_history_to_the_last_printed_digit(dtrain: Dtrain, recipes: Path, ranks: int) -> None:
    """Shuffled, with dropout, unequal last batches and parts; the csv has all 17 digits of each number."""
    texts = {}
    for style in ("script", "function", "keras"):
        done = dtrain("launch", "-n", ranks, "--cpu", "--", recipes / "styles.py", style, f"{style}.csv")
        assert done.code == 0, done.text
        texts[style] = (dtrain.folder / f"{style}.csv").read_text()
    done = dtrain("train", recipes / "styles.py", "-n", ranks, "--cpu", "epochs=3", "run.name=recipe")
    assert done.code == 0, done.text
    rows = (dtrain.folder / "runs/recipe/history.csv").read_text().splitlines()
    texts["recipe"] = "".join(",".join(row.split(",")[:6]) + "\n" for row in rows)
    assert len(texts["script"].splitlines()) == 4
    assert set(texts.values()) == {texts["script"]}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_mean_of_zero_to_eight_is_four_in_every_style(dtrain: Dtrain, recipes: Path, ranks: int) -> None:
    done = dtrain("launch", "-n", ranks, "--cpu", "--", recipes / "zero_to_eight.py")
    assert done.code == 0, done.text
    right = "loss = 4.0, metric = 4.0, val_loss = 4.0, val_metric = 4.0; validated on n = 9, each value "
    right += str([1] * 9)
    assert done.out.splitlines() == [f"{style}: {right}" for style in ("function", "keras", "script")]
