"""Early stopping and the best checkpoint: which end of a column is best, why training ended, and mistyped columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks, write_once

from dtrain.callbacks.progress import ConsoleOptions
from dtrain.config import load_settings
from dtrain.distributed.world import World, bring_up
from dtrain.errors import ConfigError, UsageError, notes_of
from dtrain.rundir.columns import Mode
from dtrain.rundir.history import read_history
from dtrain.trainer.train import train_run

# The validation's accuracy is 0.1, 0.5, 0.4, 0.3, 0.2, ... whatever is learnt.
RECIPE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

model = nn.Linear(1, 1)
model.optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
dl_train = DataLoader(TensorDataset(torch.ones(8, 1)), batch_size=2)
dl_valid = DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=4) if {validates} else None
validated = []

def train_step(model, x):
    with open({steps!r}, "a") as file:
        file.write(".")
    return {{"loss": model(x).square().mean(), "acc": 0.5}}

def valid_step(model, x):
    validated.append(1)
    return {{"loss": model(x).square().mean(), "acc": [0.1, 0.5, 0.4, 0.3, 0.2, 0.1][len(validated) - 1]}}
"""


def start(
    folder: Path, *words: str, validates: bool = True, world: World | None = None, voice: ConsoleOptions | None = None
):
    text = RECIPE.format(validates=validates, steps=str(folder / "steps"))
    recipe = write_once(folder / "scripted.py", text, world)
    settings = load_settings(str(recipe), [f"run.dir={folder}", "run.name=it", "epochs=6", *words], {})
    return train_run(settings, world or bring_up(cpu=True), voice=voice)


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_of_an_accuracy_the_highest_is_best_and_the_end_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = ["early_stopping.monitor=val_acc", "early_stopping.patience=2", "checkpoint.monitor=val_acc"]
    run = start(tmp_path, *watch, "checkpoint.keep_last=1")
    assert read_history(run)["epoch"].tolist() == [1, 2, 3, 4]
    told = "stopped early after epoch 4 of 6: no higher val_acc for 2 epochs (early_stopping.patience = 2)"
    assert capsys.readouterr().out.splitlines().count(told) == 1
    assert saved(run) == ["epoch-2", "epoch-4"], "the best one and the last one"


def test_a_mode_that_is_given_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch = ["early_stopping.monitor=val_acc", "early_stopping.mode=min", "early_stopping.patience=1"]
    run = start(tmp_path, *watch, "checkpoint.monitor=val_acc", "checkpoint.mode=min", "checkpoint.keep_last=1")
    assert saved(run) == ["epoch-1", "epoch-2"]
    told = "stopped early after epoch 2 of 6: no lower val_acc for 1 epoch (early_stopping.patience = 1)"
    assert told in capsys.readouterr().out


def test_a_program_is_told_why_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    voice = ConsoleOptions()
    monkeypatch.setattr(type(voice), "tell", lambda _, event, **facts: told.append({"event": event, **facts}))
    start(tmp_path, "early_stopping.monitor=val_acc", "early_stopping.patience=2", voice=voice)
    assert told[-1]["event"] == "complete"
    assert told[-1]["ended"].startswith("stopped early after epoch 4 of 6: no higher val_acc")
    start(tmp_path, "epochs=1", "run.name=whole", voice=voice)
    assert told[-1]["ended"] is None


@pytest.mark.parametrize("section", ["early_stopping", "checkpoint"])
@pytest.mark.parametrize(
    ("column", "steps", "meant"),
    [("val_ac", 4, "val_acc"), ("ac", 1, "acc"), ("val_ac", 2, "val_acc"), ("vall_loss", 1, "val_loss")],
)
def test_a_mistyped_column_is_told_as_soon_as_it_can_be_known(
    tmp_path: Path, section: str, column: str, steps: int, meant: str
) -> None:
    words = [f"{section}.monitor={column}", *(["val_every_steps=2"] if steps == 2 else [])]
    words += ["early_stopping.patience=2"] if section == "early_stopping" else []
    with pytest.raises(UsageError) as refused:
        start(tmp_path, *words)
    told = f"{section}.monitor = '{column}' (command line): no such column in the history. Did you mean '{meant}'?"
    assert str(refused.value).startswith(told)
    assert refused.value.on_all_ranks
    assert len((tmp_path / "steps").read_text()) == steps
    if steps == 4:  # the whole train pass, which is kept
        assert saved(tmp_path / "it") == ["epoch-1-step-4"]
        assert notes_of(refused.value)[-1] == f"last checkpoint: {tmp_path / 'it/checkpoints/epoch-1-step-4'}"


def test_a_column_of_validation_without_validation_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"checkpoint\.monitor = 'val_acc' \(command line\): there is no validation"):
        start(tmp_path, "checkpoint.monitor=val_acc", validates=False)
    assert not (tmp_path / "it").exists()


def mistyped(world: World, folder: str) -> str:
    try:
        start(Path(folder), "checkpoint.monitor=ac", world=world)
    except UsageError as error:
        return f"{error.on_all_ranks} {error}"
    return "nothing"


def test_every_rank_is_told(tmp_path: Path) -> None:
    told = run_ranks(mistyped, 2, folder=str(tmp_path))
    assert told[0] == told[1]
    assert told[0].startswith("True checkpoint.monitor = 'ac'")


@pytest.mark.parametrize(("key", "value"), [("monitor", "val_acc"), ("mode", "max"), ("mode", "min")])
def test_what_does_nothing_without_patience_is_refused(key: str, value: str) -> None:
    told = rf"early_stopping\.{key} = '{value}' \(command line\) has no effect without early_stopping\.patience"
    with pytest.raises(ConfigError, match=told):
        load_settings(None, [f"early_stopping.{key}={value}"], {})
    load_settings(None, [f"early_stopping.{key}={value}", "early_stopping.patience=null"], {})  # none, and said so


@pytest.mark.parametrize(("column", "mode"), [("val_acc", "max"), ("val_loss", "min"), ("perplexity", "min")])
def test_all_that_name_the_best_epoch_agree_on_which_end_is_best(tmp_path: Path, column: str, mode: Mode) -> None:
    from dtrain.callbacks.early_stopping import EarlyStopping
    from dtrain.checkpoint.folder import Saved
    from dtrain.checkpoint.retention import RetentionPolicy
    from dtrain.report.runs import Run

    rows = [{"epoch": 1, column: 2.0}, {"epoch": 2, column: 3.0}, {"epoch": 3, column: 1.0}]
    best = 2 if mode == "max" else 3
    ends = [Saved(tmp_path, row["epoch"], None, {"row": row}) for row in rows]
    assert RetentionPolicy(monitor=column).ranked(ends)[0].epoch == best
    stopping = EarlyStopping(column, None, 5)
    assert [row["epoch"] for row in rows if stopping.improves(row)][-1] == best
    cells = tuple(tuple(str(value) for value in row.values()) for row in rows)
    config = {"checkpoint": {"monitor": column, "mode": None}}
    assert Run("it", tmp_path, ("epoch", column), cells, config).best() == best - 1


def test_a_mode_without_a_monitor_means_the_same_to_what_keeps_and_what_reports(tmp_path: Path) -> None:
    from dtrain.checkpoint.folder import Saved
    from dtrain.checkpoint.retention import RetentionPolicy
    from dtrain.report.runs import Run

    ends = [Saved(tmp_path, epoch, None, {"row": {"val_loss": loss}}) for epoch, loss in ((1, 2.0), (2, 1.0))]
    assert RetentionPolicy(mode="max").ranked(ends)[0].epoch == 1
    config = {"checkpoint": {"monitor": None, "mode": "max"}}
    assert Run("it", tmp_path, ("epoch", "val_loss"), (("1", "2.0"), ("2", "1.0")), config).best() == 0
