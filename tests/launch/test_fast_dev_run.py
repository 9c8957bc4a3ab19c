"""`dtrain train --fast-dev-run`: goes through all of a run, and leaves nothing."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import BIN, Dtrain
from helpers.sweep import some

from dtrain.callbacks.progress import ConsoleOptions
from dtrain.cli.train import _refuse_beside_fast_dev_run
from dtrain.config import load_settings
from dtrain.distributed.world import bring_up
from dtrain.errors import AgreedError, UsageError
from dtrain.launch.signals.stop_request import StopRequest
from dtrain.trainer.fast_dev_run import fast_dev_run, small


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made; nothing is to be left there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def gone_through(recipe: Path, *words: str) -> None:
    fast_dev_run(
        load_settings(str(recipe), list(words), {}), bring_up(cpu=True), StopRequest(), ConsoleOptions("plain")
    )


def test_all_of_a_run_on_two_ranks_and_nothing_of_the_users_is_touched(dtrain: Dtrain, recipes: Path) -> None:
    (dtrain.folder / "temporary").mkdir()
    (dtrain.folder / "runs/it").mkdir(parents=True)
    (dtrain.folder / "runs/it/history.csv").write_text("mine\n")
    before = files(dtrain.folder)
    words = [
        "train",
        recipes / "resumable.py",
        "run.name=it",
        "epochs=50",
        "track.wandb.project=p",
        "val_every_steps=9",
    ]
    done = dtrain(*words, "--fast-dev-run", "-n", 2, "--cpu", TMPDIR=str(dtrain.folder / "temporary"))
    assert done.code == 0, done.text
    assert "epoch 1/1, 2 steps" in done.out
    assert "[validation after 1 optimizer step]" in done.out
    assert (
        "fast dev run: 2 optimizer steps on 2 ranks, validation (1 within the epoch), checkpoint saved "
        "and restored, in "
    ) in done.out.splitlines()[-1]
    assert "\nrun:" not in done.out and "next:" not in done.out and "resuming from" not in done.out
    assert files(dtrain.folder) == before


def test_ranks_that_another_launcher_started(dtrain: Dtrain, recipes: Path) -> None:
    words = ["--standalone", "--nproc-per-node", 2, "-m", "dtrain", "train", recipes / "small.py", "--cpu"]
    done = dtrain.run(BIN / "torchrun", *words, "--fast-dev-run", "--log-format", "json", OMP_NUM_THREADS="1")
    assert done.code == 0, done.text
    last = json.loads(done.out.splitlines()[-1])
    assert (last["event"], last["ranks"], last["updates"], last["validated"]) == ("fast_dev_run", 2, 2, True)
    assert last["row"]["epoch"] == 1
    assert list(dtrain.folder.iterdir()) == []


def test_what_fails_is_told_and_nothing_is_left(dtrain: Dtrain, recipes: Path) -> None:
    (dtrain.folder / "temporary").mkdir()
    words = ["train", recipes / "small.py", "model.fault=raise-in-valid", "--fast-dev-run", "--cpu"]
    for ranks, where in some([(2, "@1")], [(1, ""), (2, "")]):
        words[2] = f"model.fault=raise-in-valid{where}"
        done = dtrain(*words, "-n", ranks, TMPDIR=str(dtrain.folder / "temporary"))
        assert done.code == 1
        assert "ValueError" in done.err and "a fault in validation" in done.err and "epoch 1, valid step 1" in done.err
        assert "failure.json" not in done.text and "fast dev run:" not in done.text
        deadline = time.monotonic() + 30  # rank 0 may have been killed, and was to remove it
        while left := list((dtrain.folder / "temporary").glob("dtrain-fast*")):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
        assert not (dtrain.folder / "runs").exists()


def test_it_goes_back_from_the_checkpoint(temporary: Path, tmp_path: Path, recipes: Path) -> None:
    """A net that is another one the next time could not be gone on with."""
    recipe = tmp_path / "fickle.py"
    text = (recipes / "small.py").read_text().replace("model = nn.Linear(width, 1)", "model = made(width)")
    recipe.write_text(
        f"{text}\n\ndef made(width):\n    import os\n    os.environ['FICKLE'] = os.environ.get('FICKLE', '') + 'x'\n"
        "    last = nn.Linear(width, 1)\n    return last if os.environ['FICKLE'] == 'x' else nn.Sequential(last)\n"
    )
    try:
        with pytest.raises(AgreedError, match="weight"):
            gone_through(recipe)
    finally:
        del os.environ["FICKLE"]
    assert list(temporary.glob("dtrain-*")) == []


def test_a_recipe_without_validation(temporary: Path, recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone_through(recipes / "small.py", "data.kind=no-valid")
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith("fast dev run: 2 optimizer steps on 1 rank, no validation (there is no loader")
    assert list(temporary.glob("dtrain-*")) == []


def test_accumulated_batches_make_two_optimizer_steps_with_validation_in_between(
    temporary: Path, recipes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone_through(recipes / "small.py", "data.batch_size=1", "accumulation=5", "val_every_steps=100")
    told = capsys.readouterr().out.splitlines()
    assert "epoch 1/1, 4 steps" in told
    went = "fast dev run: 2 optimizer steps on 1 rank, validation (1 within the epoch), checkpoint saved and restored"
    assert told[-1].startswith(went)


@pytest.mark.parametrize(
    ("given", "option"),
    [((True, 0, "auto"), "--dry-run"), ((False, 2, "auto"), "--retries"), ((False, 0, "runs/a"), "--resume runs/a")],
)
def test_what_contradicts_is_refused_by_name(given: Any, option: str) -> None:
    with pytest.raises(UsageError, match=f"--fast-dev-run and {option} cannot be combined"):
        _refuse_beside_fast_dev_run(*given)
    _refuse_beside_fast_dev_run(False, 0, "auto")


def test_the_command_refuses_it_too(dtrain: Dtrain) -> None:
    done = dtrain("train", "--fast-dev-run", "--resume", "runs/a")
    assert done.code == 2 and "--fast-dev-run and --resume runs/a cannot be combined" in done.err


def test_its_config_is_the_runs_but_for_how_much() -> None:
    words = ["train.batch=global", "overfit_batches=3", "max_steps=9", "track.tensorboard=true", "lr=0.5", "seed=3"]
    settings = small(load_settings("digits", [*words, "checkpoint.every_epochs=0"], {}), 4, "folder")
    train = settings.config.train
    assert (train.epochs, train.max_steps, train.limit_batches, train.overfit_batches) == (1, None, 2, None)
    assert (train.seed, train.batch, train.val_every_steps) == (3, "global", None)
    assert (settings.config.checkpoint.every_epochs, settings.config.track.tensorboard) == (1, False)
    assert settings.config.run.dir == "folder"
    assert small(load_settings("digits", [], {}), 4, "folder").config.train.limit_batches == 8
