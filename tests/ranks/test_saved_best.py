"""With checkpoint.on_error=warn, an epoch whose checkpoint could not be written is never called the best one."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from dtrain.checkpoint.folder import write_checkpoint
from dtrain.config import load_settings
from dtrain.distributed.world import bring_up
from dtrain.rundir.history import best_row, read_history
from dtrain.trainer.train import train_run

RECIPE = Path(__file__).parents[1] / "recipes/small.py"


def test_it_is_not_called_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(name: str, *words: str) -> list[dict[Any, Any]]:
        given = [f"run.dir={tmp_path}", f"run.name={name}", "epochs=3", "checkpoint.keep_last=3", *words]
        run = train_run(load_settings(str(RECIPE), given, {}), bring_up(cpu=True))
        return read_history(run).to_dict("records")

    rows = start("whole")
    best, monitor = best_row(rows)
    assert best is not None
    assert monitor is not None
    assert f"best epoch: {best['epoch']:.0f} (" in capsys.readouterr().out

    def full(folder: Path, name: str, *more: Any) -> Path:
        if name == f"epoch-{best['epoch']:.0f}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_checkpoint(folder, name, *more)

    monkeypatch.setattr("dtrain.checkpoint.saver.write_checkpoint", full)
    start("full", "checkpoint.on_error=warn")
    second = best_row([row for row in rows if row["epoch"] != best["epoch"]])[0]
    assert second is not None
    told = capsys.readouterr().out
    assert f"best epoch: {second['epoch']:.0f} ({monitor} = {second[monitor]:.4g})" in told
    assert f"epoch {best['epoch']:.0f} ({monitor} = {best[monitor]:.4f}) was better, but has no checkpoint" in told
