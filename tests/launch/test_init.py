"""`dtrain init` as a beginner uses it: what is written runs as it is, and comes to what its comment says."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.commands import Dtrain, clean_environment
from helpers.first_minutes import TEMPLATES, play
from helpers.sweep import FULL, some


# CI plays all of them from an installed wheel.
@pytest.mark.parametrize("template", some(["script"], [name for name in TEMPLATES if name != "script"]))
def test_what_is_printed_as_next_runs_and_reaches_what_is_promised(template: str, tmp_path: Path) -> None:
    played = list(play(template, tmp_path, clean_environment(), most=None if FULL else 1))
    assert len(played) == (2 if FULL else 1)
    for one in played[1:]:
        assert one.value == pytest.approx(played[0].value, abs=0.02), "one rank and two train on the same batches"


def test_the_folders_config_is_trained_and_said_to_be(dtrain: Dtrain) -> None:
    written = dtrain("init")
    assert (written.code, written.err) == (0, "")
    assert written.out.splitlines() == [
        "wrote recipe.py", "wrote train.yaml", "next: dtrain train", "      dtrain train -n 2 --cpu",
    ]  # fmt: skip
    done = dtrain("train", "epochs=1", "-n", 2, "--cpu")
    assert done.code == 0, done.text
    assert done.out.splitlines()[0] == "config: train.yaml"
    assert done.out.count("config: train.yaml") == 1, "the ranks do not say it again"
    assert dtrain.run_folder().name.startswith("recipe-")

    before = {path: path.read_bytes() for path in dtrain.folder.glob("*.*")}
    again = dtrain("init", "-t", "text")
    assert again.code == 2
    assert "recipe.py and train.yaml are already there; nothing was written." in again.err
    assert {path: path.read_bytes() for path in dtrain.folder.glob("*.*")} == before
