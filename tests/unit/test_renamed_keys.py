"""Old names of config keys still work wherever keys are given, and say once what they are called now."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dtrain.checkpoint.compat import config_differences
from dtrain.config import RunConfig, load_settings
from dtrain.config import renamed as under_test
from dtrain.errors import ConfigError


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    under_test._warn.cache_clear()
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def test_every_old_name_leads_to_a_key_that_is_there() -> None:
    for old, new in under_test.RENAMED.items():
        section, _, leaf = new.partition(".")
        assert leaf in type(getattr(RunConfig(), section)).model_fields
        assert old.partition(".")[2] not in type(getattr(RunConfig(), section)).model_fields


@pytest.mark.parametrize("word", ["train.floor=0.1", "floor=0.1"])
def test_on_the_command_line(word: str, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        settings = load_settings(None, [word, "train.schedule=cosine"], {})
        assert settings.config.train.min_lr_ratio == 0.1
        assert settings.place_of("train.min_lr_ratio") == "command line"
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{word.partition('=')[0]} (command line) is now called train.min_lr_ratio: please rename it"]


def test_in_a_file_and_in_the_environment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("train:\n  floor: 0.2\n  shard: fsdp\n")
    settings = load_settings(str(file), [], {"DTRAIN_TRAIN__VALIDATE_WHOLE": "false"})
    assert settings.config.train.min_lr_ratio == 0.2
    assert settings.config.train.gather_for_validation is False
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert f"train.floor ({file}:2) is now called train.min_lr_ratio" in said
    assert "is now called train.gather_for_validation" in said


def test_a_later_source_with_the_new_name_wins(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("train: {floor: 0.2}\n")
    assert load_settings(str(file), ["train.min_lr_ratio=0.3"], {}).config.train.min_lr_ratio == 0.3


def test_both_names_in_one_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "both.yaml"
    file.write_text("train:\n  floor: 0.2\n  min_lr_ratio: 0.3\n")
    with pytest.raises(ConfigError, match=r"train\.floor .*:2\) and train\.min_lr_ratio .*:3\) are the same key"):
        load_settings(str(file), [], {})


def test_only_the_first_rank_says_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level(logging.WARNING):
        load_settings(None, ["train.floor=0.1"], {})
    assert not caplog.records


def test_a_checkpoint_with_the_old_name_is_compared_under_the_new_one() -> None:
    settings = load_settings(None, ["train.min_lr_ratio=0.1"], {})
    here = settings.plain()
    there = {
        **here,
        "train": {k: v for k, v in here["train"].items() if k not in ("min_lr_ratio", "gather_for_validation")},
    }
    there["train"] |= {"floor": 0.1, "validate_whole": None}
    assert config_differences(there, here, settings) == []
    there["train"]["floor"] = 0.5
    assert config_differences(there, here, settings) == ["train.min_lr_ratio was 0.5 and is 0.1 (command line)"]
