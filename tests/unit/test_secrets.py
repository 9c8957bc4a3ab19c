"""Secrets of a config are masked wherever it is shown, sent or stored, and put back where a run needs them."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain import masking as secrets
from dtrain.checkpoint.compat import config_differences
from dtrain.config import load_settings
from dtrain.config.keeping import write_secrets
from dtrain.config.saved import load_run_settings
from dtrain.errors import ConfigError, RecipeError
from dtrain.launch.monitor.describe import describe
from dtrain.masking import HIDDEN, MASK, hidden_variables, hide, masked, restored, secrets_of
from dtrain.report.data import run_data
from dtrain.report.runs import Run


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_values", set())
    monkeypatch.setattr(secrets, "_marked", set())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[
            (f"data.{name}", "hush")
            for name in ("token", "password", "secret", "credential", "credentials", "passphrase")
        ],
        *[
            (f"data.{name}", "hush")
            for name in ("api_key", "apiKey", "HF_TOKEN", "dbPassword", "access-key", "wandb_api_key")
        ],
        *[
            (f"data.{name}", "hush")
            for name in ("secret_key", "private_key", "accessToken", "auth_token", "APIKey", "passwd")
        ],
        ("token", "hush"),
        ("model.hub.token", "hush"),
        ("data.credentials.user", "hush"),
        ("data.key", "sk-12ab34cd"),
        ("data.key", "hunter-2"),
        ("data.passwords", ["hush", "hush-hush"]),
        ("data.store", {"token": "hush", "rows": 3}),
        ("track.mlflow.uri", "https://bob:hush@tracking.example/x"),
    ],
)
def test_it_is_masked(key: str, value: Any) -> None:
    assert "hush" not in json.dumps(masked(key, value))
    assert "hunter" not in json.dumps(masked(key, value))
    assert "12ab" not in json.dumps(masked(key, value))
    assert MASK in json.dumps(masked(key, value))
    assert restored(key, masked(key, value), secrets_of(key, value)) == value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[
            (f"data.{name}", "text")
            for name in ("max_tokens", "monkey", "keyboard", "token_level", "tokenizer", "tokens")
        ],
        *[(f"data.{name}", "<s>") for name in ("pad_token", "mask_token", "bos_token", "eosToken", "special_token")],
        *[
            (f"data.{name}", "text")
            for name in ("secret_name", "password_file", "sort_key", "primary_key", "secretary")
        ],
        ("data.key", "column name"),
        ("data.key", "image_id"),
        ("data.key", "col_2"),
        ("data.password", 1234),
        ("data.token", True),
        ("data.token", None),
        ("data.token", ""),
        ("data.token", "12"),  # as it was typed
        ("model.hidden", "64"),
        ("data.url", "https://example.com:8080/a@b"),
    ],
)
def test_it_is_not(key: str, value: Any) -> None:
    assert masked(key, value) == value
    assert secrets_of(key, value) == {}


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.dictionaries(st.sampled_from(["token", "key", "a", "b_password"]), inner) | st.lists(inner, max_size=3)
    ),
    max_leaves=12,
)


@given(TREES)
def test_what_is_masked_can_be_put_back_at_any_depth(tree: Any) -> None:
    value = {"model": tree}
    safe = masked("", value)
    assert masked("", safe) == safe
    back = {name: restored(name, inner, secrets_of("", value)) for name, inner in safe.items()}
    assert back == value


def recipe(folder: Path, first: str = 'secrets = ["data.dsn"]') -> Path:
    path = folder / "mine.py"
    path.write_text(f"{first}\ndef build_dataloaders(token='', dsn='', key='', n=3): ...\n")
    return path


WORDS = ["data.token=hush-token", "data.dsn=hush-dsn", "data.key=sk-hush-1", "data.n=5"]


def test_the_config_is_masked_and_the_run_has_its_values_again(tmp_path: Path) -> None:
    path, run = recipe(tmp_path), tmp_path / "runs/x"
    run.mkdir(parents=True)
    found = load_settings(str(path), [*WORDS, f"run.dir={tmp_path}/runs", "run.name=x"], {})
    assert found.config.data == {"token": "hush-token", "dsn": "hush-dsn", "key": "sk-hush-1", "n": 5}
    assert "hush" not in found.to_yaml()
    assert "hush" not in json.dumps(found.plain())
    (run / "config.yaml").write_text(found.to_yaml())
    write_secrets(run, found.secrets())
    assert stat.S_IMODE((run / "secrets.json").stat().st_mode) == 0o600
    again = load_run_settings(run, [])
    assert again.config == found.config
    assert config_differences(found.plain(), again.plain(), again) == []
    # The same words as they are printed, with the masks in them, mean the same run.
    words = hide([*WORDS, f"run.dir={tmp_path}/runs", "run.name=x"])[0]
    assert "hush" not in " ".join(words)
    assert load_settings(str(path), words, {}).config == found.config
    (run / "secrets.json").unlink()
    with pytest.raises(
        ConfigError, match=r"data\.token .* is masked, and its value is not in secrets\.json .*DTRAIN_DATA__TOKEN"
    ):
        load_run_settings(run, [])
    assert load_run_settings(run, WORDS).config == found.config
    write_secrets(run, {"data.token": "x"})
    write_secrets(run, {})
    assert not (run / "secrets.json").exists()


def test_another_value_is_told_when_it_is_stored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_secrets(tmp_path, {"data.token": "a"})
    write_secrets(tmp_path, {"data.token": "a", "data.dsn": "b"})
    assert caplog.text == ""
    write_secrets(tmp_path, {"data.token": "c", "data.dsn": "b"})
    assert "data.token differs from the run's value" in caplog.text


def test_a_checkpoint_of_an_older_version_fits_still(tmp_path: Path) -> None:
    found = load_settings(str(recipe(tmp_path)), WORDS, {})
    older = found.plain() | {"data": {**found.config.data, "n": 6}}
    assert config_differences(older, found.plain(), found) == ["data.n was 6 and is 5 (command line)"]


def test_another_token_is_the_same_run_and_another_key_is_not(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    one, other = (load_settings(str(path), [f"data.token=hush-{n}", f"data.key=k-{n}"], {}) for n in (1, 2))
    (difference,) = config_differences(one.plain(), other.plain(), other)
    assert difference.startswith("data.key was '***")


def test_bare_words_and_the_environment_are_masked_too(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    found = load_settings(str(path), ["token=hush-1", "dsn=hush-2"], {"DTRAIN_DATA__KEY": "k-hush-3"})
    assert found.secrets() == {"token": "hush-1", "dsn": "hush-2", "data.key": "k-hush-3"}
    assert hide(["token=hush-1", "dsn=hush-2", "n=5"])[0] == ["token=***", "dsn=***", "n=5"]


def test_ranks_get_by_their_environment_what_their_command_line_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path)
    load_settings(str(path), WORDS, {})
    words, hidden = hide([str(path), *WORDS])
    assert words == [str(path), "data.token=***", "data.dsn=***", words[3], "data.n=5"]
    assert hidden_variables({}) == {}
    monkeypatch.setenv(HIDDEN, hidden_variables(hidden)[HIDDEN])
    found = load_settings(words[0], words[1:], {})
    assert found.config.data == {"token": "hush-token", "dsn": "hush-dsn", "key": "sk-hush-1", "n": 5}
    assert found.place_of("data.token") == "command line"
    monkeypatch.delenv(HIDDEN)


@pytest.mark.parametrize(
    "words", [["data.token=[hush-token", "x=1"], ["nosuch.token=hush-token"], ["train.token=hush-token"]]
)
def test_messages_have_no_secret(tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_settings(str(recipe(tmp_path)), words, {})
    assert "hush" not in describe(error.value)[0]


def test_nor_has_an_exception_of_the_users_own(tmp_path: Path) -> None:
    load_settings(str(recipe(tmp_path)), WORDS, {})
    text, _ = describe(RuntimeError("cannot log in with hush-token to hush-dsn"))
    assert "cannot log in with *** to ***" in text


@pytest.mark.parametrize("wrong", ['secrets = ["dsn"]', "secrets = [1]", 'secrets = "data.dsn"'])
def test_marks_that_are_none_are_refused(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(RecipeError, match=r"mine\.py:1: secrets = .*should be a list of keys"):
        load_settings(str(recipe(tmp_path, wrong)), [], {})


def test_the_page_masks_configs_of_older_runs(tmp_path: Path) -> None:
    shown = run_data(Run("x", tmp_path, config={"data": {"token": "hush", "n": 3}}))["config"]
    assert shown == {"data.token": "***", "data.n": "3"}


def test_a_submitted_run_brings_its_secrets_by_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtrain.slurm import submission

    path, folder = recipe(tmp_path), tmp_path / "runs/x"
    words = (str(path), "token=hush-token", "data.dsn=hush-dsn", f"run.dir={tmp_path}/runs", "run.name=x")
    load_settings(words[0], words[1:], {})
    monkeypatch.setattr(submission, "submit", lambda *_, **__: "7")
    submission.submit_runs([submission.PlannedRun("x", folder, words)], "#!/bin/sh\n", None, path)
    held = [one.name for one in folder.rglob("*") if one.is_file() and b"hush" in one.read_bytes()]
    assert held == ["secrets.json"]
    assert stat.S_IMODE((folder / "secrets.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "slurm/config.yaml").stat().st_mode) == 0o600
    in_script = hide(words)[0]
    assert in_script[1:3] == ["token=***", "data.dsn=***"]
    found = load_settings(in_script[0], in_script[1:], {})
    assert found.unplaced["token"].value == "hush-token"
    assert found.config.data == {"dsn": "hush-dsn"}
