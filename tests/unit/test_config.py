"""Config: sources, precedence, provenance, and what is said of bad values."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.config import load_settings
from dtrain.errors import ConfigError


def test_later_sources_win_and_each_value_knows_its_place(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  epochs: 5\n  seed: 1\n  log_step_freq: 7\n")
    settings = load_settings(str(file), ["seed=3"], {"DTRAIN_TRAIN__SEED": "2", "DTRAIN_TRAIN__LOG_STEP_FREQ": "8"})
    train = settings.config.train
    assert (train.epochs, train.seed, train.log_step_freq, train.batch) == (5, 3, 8, "per_rank")
    assert settings.place_of("train.epochs") == f"{file}:2"
    assert settings.place_of("train.seed") == "command line"
    assert settings.place_of("train.log_step_freq") == "environment DTRAIN_TRAIN__LOG_STEP_FREQ"
    assert settings.place_of("train.batch") == "default"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("epochs=0", ["train.epochs = 0", "command line", "greater than or equal to 1", "default: 3"]),
        ("epochs=true", ["train.epochs = True", "integer"]),
        ("epochs=2.5", ["train.epochs = 2.5", "integer"]),
        ("train.epoch=3", ["train.epoch = 3", "'epochs'", "`dtrain keys train` lists all"]),
        ("trian.epochs=3", ["trian.epochs", "'train'", "recipe, model"]),
        ("epochs", ["'epochs'", "key=value"]),
        ("train=3", ["train = 3"]),
        ("batch=local", ["train.batch = 'local'", "per_rank", "global"]),
        ("run.name=a/b", ["run.name = 'a/b'", "folder name"]),
        ("run.name=a\nb", ["run.name", "control characters"]),
        ("track.wandb.mode=offline", ["track.wandb.project is required"]),
        ("epochs=010", ["train.epochs = '010'"]),
        ("train.seed=[1", ["train.seed = [1", "command line"]),
    ],
)
def test_a_bad_value_is_named_with_place_and_remedy(override: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(None, [override], {})
    for part in expected:
        assert part in str(caught.value)


NESTED = "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  epochs: 1\n  epochs: 2\n", [":3: train.epochs is set twice", "line 2"]),
        ("train.epochs: 1\ntrain:\n  epochs: 2\n", [":3: train.epochs is set twice"]),
        ("? [a]\n: 1\n", ["not a list or a mapping"]),
        ("- a\n- b\n", [":1:", "mapping"]),
        ("train:\n\tepochs: 1\n", ["indent with spaces"]),
        ("train:\n  epochs: x\n", ["train.epochs = 'x'", ":2)"]),
        ("no_such: 1\n", ["no_such = 1", "`dtrain keys` lists all"]),
        ("model:\n  a: &x {b: *x}\n", [":2:", "*x refers to itself"]),
        ("a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n" + NESTED, [":5:", "more than 100,000 values"]),
        ("model:\n  a: " + "[" * 100 + "]" * 100, [":2:", "nested more than 64 levels deep"]),
        ("model:\n  a: " + "{b: " * 3000 + "1" + "}" * 3000, [":2:", "nested more than 64 levels deep"]),
        ("model:\n  a: " + "9" * 5000, [":2:", "a number has more than 1,000 digits"]),
        ("model:\n  a: !!timestamp x\n", [":2: model.a: cannot be read as YAML"]),
        ("model:\n  a: !!python/object:os.system {}\n", [":2: model.a: cannot be read as YAML"]),
        ("model: " + "x" * (1 << 20), ["larger than the limit of 1,048,576 bytes"]),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, text: str, expected: list[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(str(file), [], {})
    for part in expected:
        assert part in str(caught.value)


def test_aliases_within_bounds_mean_what_they_name(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("\ufeffmodel:\n  a: &x [1, 2]\n  b: *x\n", encoding="utf-8")
    assert load_settings(str(file), [], {}).config.model == {"a": [1, 2], "b": [1, 2]}
    (tmp_path / "linked.yaml").symlink_to(file)
    assert load_settings(str(tmp_path / "linked.yaml"), [], {}).config.model["b"] == [1, 2]


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop"])
def test_a_config_that_is_no_file_is_named(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "run.yaml"
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(file)
    with pytest.raises(ConfigError, match=r"run\.yaml: cannot read the config: "):
        load_settings(str(file), [], {})


@given(st.text(st.sampled_from("&*ab:[]{}-,!\"'?|> \n\t%@`0123456789._~#<=eE+"), max_size=60))
def test_whatever_is_typed_is_a_value_or_one_clear_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        load_settings(None, [f"model.x={text}"], {})


@given(st.text(st.sampled_from("&*ab:[]{}-,!\"'? \n%0123456789.~#<="), max_size=80))
def test_whatever_a_file_holds_is_a_config_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(f"model:\n  x: {text}")
    with contextlib.suppress(ConfigError):
        load_settings(str(file), [], {})


def test_a_config_that_is_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"train:\n  epochs: \xff\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_settings(str(file), [], {})


def test_scalars_are_what_people_mean() -> None:
    settings = load_settings(
        None,
        ["model.lr=1e-3", "model.on=on", "model.n=1_000", "model.t=2026-01-02", "model.l=[1, 2]", "run.name=007"],
        {},
    )
    expected = {"lr": 0.001, "on": "on", "n": 1000, "t": "2026-01-02", "l": [1, 2]}
    assert settings.config.model == expected
    assert settings.config.run.name == "007"


def test_the_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    settings = load_settings(
        None,
        [
            "epochs=9",
            "model.width=3",
            "model.limit=.inf",
            "model.t=12:30",
            "model.text='1e3'",
            "track.wandb.project=p",
            "run.name=1e3",
        ],
        {},
    )
    file = tmp_path / "config.yaml"
    file.write_text(settings.to_yaml())
    assert load_settings(str(file), [], {}).config == settings.config


def test_a_bundled_config_is_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    by_name, by_path = load_settings("digits", [], {}), load_settings("configs/digits.yaml", [], {})
    assert by_name.config == by_path.config
    assert by_name.config.recipe == "dtrain.recipes.digits"


def test_a_bare_key_goes_to_the_one_builder_that_has_it() -> None:
    settings = load_settings(None, ["width=4"], {})
    settings.place({"model": ["width"], "data": ["rows"]})
    assert settings.config.model == {"width": 4}
    assert settings.place_of("model.width") == "command line"


def test_a_bare_key_that_two_have_is_ambiguous() -> None:
    with pytest.raises(ConfigError, match=r"model\.width, data\.width"):
        load_settings(None, ["width=4"], {}).place({"model": ["width"], "data": ["width"]})
    with pytest.raises(ConfigError, match=r"train\.seed, data\.seed"):
        load_settings(None, ["seed=4"], {}).place({"data": ["seed"]})


def test_a_bare_key_that_nobody_has_lists_what_is_there() -> None:
    with pytest.raises(ConfigError, match=r"(?s)'widht'.*Did you mean 'width'.*`dtrain keys "):
        load_settings(None, ["widht=4"], {}).place({"model": ["width"]})


@pytest.mark.parametrize("key", ["width", "step"])
def test_a_builder_s_parameter_given_by_both_its_names_is_refused(key: str, tmp_path: Path) -> None:
    for words in ([f"{key}=A", f"model.{key}=B"], [f"model.{key}=B", f"{key}=A"]):
        told = rf"{key} = A and model\.{key} = B \(command line\) are one parameter\. Give it once\."
        with pytest.raises(ConfigError, match=told):
            load_settings(None, words, {}).place({"model": [key]})
    (tmp_path / "run.yaml").write_text(f"model:\n  {key}: B\n")
    settings = load_settings(str(tmp_path / "run.yaml"), [f"{key}=A"], {})
    settings.place({"model": [key]})
    assert settings.config.model == {key: "A"}, "the command line's over the file's"


def test_a_key_that_an_older_dtrain_did_not_have_counts_as_its_default() -> None:
    from dtrain.checkpoint.compat import config_differences

    settings = load_settings("digits", [], {})
    there = settings.plain()
    del there["train"]["clip_norm"], there["parameters"]
    assert config_differences(there, settings.plain(), settings) == []
    now = load_settings("digits", ["clip_norm=1.0"], {})
    assert config_differences(there, now.plain(), now) == ["train.clip_norm was None and is 1.0 (command line)"]
