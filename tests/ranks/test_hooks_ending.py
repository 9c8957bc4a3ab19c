"""A hook that has the run may end it at any time; a column of a hook's need not be there in each epoch."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dtrain.config import load_settings
from dtrain.distributed.world import bring_up
from dtrain.rundir.history import read_history
from dtrain.trainer.train import train_run

RECIPE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def build_model():
    return nn.Linear(2, 1)


def build_dataloaders():
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), batch_size=4), DataLoader(TensorDataset(x), batch_size=4)


def build_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def train_step(model, x):
    return model(x).square().mean()


valid_step = train_step
"""
IN_A_STEP = """
def before_train(run):
    global RUN
    RUN = run


def train_step(model, x):
    if RUN.step == 2:
        RUN.stop("enough")
    return model(x).square().mean()
"""
THEN_FAILS = """
from pathlib import Path


def after_step(step, run):
    if step == 2:
        run.stop("enough")
    if step == 3 and not Path(run.folder, "again").exists():
        Path(run.folder, "again").touch()
        raise KeyError("fails")
"""
AT_TIMES = """
def build_scheduler(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0, factor=0.5)


def after_epoch(row, run):
    return {"val_f1": {2: 0.5, 4: 0.7, 6: 0.6}[row["epoch"]]} if row["epoch"] % 2 == 0 else None
"""


def start(folder: Path, more: str, *words: str) -> Path:
    (folder / "it.py").write_text(RECIPE + more)
    settings = load_settings(str(folder / "it.py"), [f"run.dir={folder}", "run.name=it", *words], {})
    return train_run(settings, bring_up(cpu=True))


def test_one_that_only_keeps_the_run_ends_it_from_a_step(tmp_path: Path) -> None:
    assert read_history(start(tmp_path, IN_A_STEP, "epochs=4"))["epoch"].tolist() == [1]


def test_what_was_asked_for_before_a_failure_holds_in_the_resumed_run(tmp_path: Path) -> None:
    words = ("epochs=4", "checkpoint.every_steps=1", "checkpoint.asynchronous=false")
    with pytest.raises(KeyError):
        start(tmp_path, THEN_FAILS, *words)
    assert (tmp_path / "it/checkpoints/epoch-1-step-2").is_dir()
    assert read_history(start(tmp_path, THEN_FAILS, *words))["epoch"].tolist() == [1]


def test_a_column_that_is_there_at_times_is_monitored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An epoch without it is never the best, counts as one without a new best, and is no step of the scheduler's."""
    columns = [f"{key}.monitor=val_f1" for key in ("checkpoint", "early_stopping", "scheduler")]
    with caplog.at_level(logging.WARNING):
        run = start(tmp_path, AT_TIMES, "epochs=9", "early_stopping.patience=2", "checkpoint.keep_last=1", *columns)
    history = read_history(run)
    assert history["epoch"].tolist() == [1, 2, 3, 4, 5, 6]  # 5 and 6 brought no new best
    assert history["val_f1"].isna().tolist() == [True, False] * 3
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["epoch-4", "epoch-6"]
    assert history["lr"].tolist() == [0.1] * 6  # 0.6 after 0.7 would halve it after epoch 6
    (told,) = [record.message for record in caplog.records if "checkpoint.monitor" in record.message]
    assert told == (
        "checkpoint.monitor = 'val_f1': no such column in the history yet. An epoch without it is never the best."
    )
