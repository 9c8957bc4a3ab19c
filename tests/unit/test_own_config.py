"""A command that names neither a config nor a recipe takes the current folder's train.yaml, if there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dtrain.cli.app import app
from dtrain.cli.train import log_own_config, read_target, settings_to_train, split_words, with_own_config
from dtrain.errors import UsageError


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "train.yaml"
    file.write_text("train:\n  epochs: 7\n")
    (tmp_path / "other.yaml").write_text("train:\n  epochs: 8\n")
    return file


def test_it_is_taken_where_nothing_is_named(own: Path) -> None:
    settings = read_target(["train.seed=1"])
    assert (settings.config.train.epochs, settings.config.train.seed) == (7, 1)
    assert settings.place_of("train.epochs") == "train.yaml:2"
    assert split_words([]) == ("train.yaml", [])
    assert with_own_config(["epochs=1"]) == ["train.yaml", "epochs=1"]


@pytest.mark.parametrize(
    "words", [["digits"], ["other.yaml"], ["recipe=dtrain.recipes.digits"], ["epochs=3", "recipe=m"]]
)
def test_what_is_named_counts_alone(own: Path, words: list[str]) -> None:
    assert with_own_config(words) == words
    assert read_target(words).config.train.epochs in (3, 8)


def test_without_it_the_bundled_digits_are_trained(own: Path) -> None:
    own.unlink()
    assert with_own_config(["epochs=5"]) == ["epochs=5"]
    assert read_target([]).config.recipe == "dtrain.recipes.digits"
    own.mkdir()  # a folder of that name is no config
    assert read_target([]).config.recipe == "dtrain.recipes.digits"


def test_it_is_said_once_to_people_alone(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_own_config([], as_words=False)
    log_own_config(["digits"], as_words=True)
    with monkeypatch.context() as launched:
        for name, value in {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "1",
            "MASTER_ADDR": "a",
            "MASTER_PORT": "1",
        }.items():
            launched.setenv(name, value)
        log_own_config([], as_words=True)
    assert capsys.readouterr().out == ""
    log_own_config([], as_words=True)
    assert capsys.readouterr().out == "config: train.yaml\n"


def test_a_run_that_is_named_to_be_gone_on_with_has_its_own_config(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = own.parent / "runs" / "it"
    (run / "checkpoints" / "epoch-1").mkdir(parents=True)
    (run / "config.yaml").write_text("train:\n  epochs: 4\n  seed: 9\nrun:\n  name: it\n")
    monkeypatch.setenv("DTRAIN_TRAIN__SEED", "3")
    config = settings_to_train(["epochs=6"], "runs/it", as_words=True).config
    assert (config.train.epochs, config.train.seed, config.run.name) == (6, 9, "it")
    assert capsys.readouterr().out == "config: runs/it/config.yaml\n"
    config = settings_to_train([], "runs/it/checkpoints/epoch-1", as_words=False).config
    assert (config.train.epochs, config.run.name) == (4, None), "a new run, which has a name of its own"
    assert settings_to_train(["run.name=b"], "runs/it/checkpoints/epoch-1", as_words=False).config.run.name == "b"
    assert settings_to_train(["other.yaml"], "runs/it", as_words=False).config.train.epochs == 8
    assert settings_to_train([], "auto", as_words=False).config.train.epochs == 7
    assert capsys.readouterr().out == ""
    with pytest.raises(UsageError, match=r"runs/ti: no such run\. Runs in runs: it"):
        settings_to_train([], "runs/ti", as_words=False)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["launch", "-n", "2", "--cpu", "--dry-run", "--", "train", "epochs=1"], "config: train.yaml\n"),
        (
            ["submit", "--dry-run", "--no-check", "--no-freeze", "--time", "10", "--cpu", "epochs=1"],
            "\n    train.yaml\n",
        ),
    ],
)
def test_what_starts_ranks_elsewhere_names_it(own: Path, command: list[str], shown: str) -> None:
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert shown in done.output
    assert "config: train.yaml\n" in done.output
