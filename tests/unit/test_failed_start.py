"""What a start that fails leaves: what was in the run's folder before, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.config import load_settings
from dtrain.distributed.world import bring_up
from dtrain.errors import DtrainError
from dtrain.trainer import train

RECIPE = """
import torch


def build_model():
    return torch.nn.Linear(1, 1)


def build_dataloaders():
    return [torch.ones(2, 1)], None


def build_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def train_step(model, x):
    return model(x).square().mean()
"""


def failing(*_: object, **__: object) -> None:
    raise RuntimeError("no tracker")


@pytest.mark.parametrize("before", ["slurm/job.json", "logs/rank-0.log", "starts.jsonl", None])
def test_what_was_in_a_runs_folder_before_outlives_a_tracker_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.setattr(train, "start_tracking", failing)
    (tmp_path / "r.py").write_text(RECIPE)
    folder = tmp_path / "runs/it"
    settings = load_settings(str(tmp_path / "r.py"), [f"run.dir={tmp_path / 'runs'}", "run.name=it", "epochs=1"], {})
    if before is not None:
        (folder / before).parent.mkdir(parents=True)
        (folder / before).write_text("kept")
        (folder / "config.yaml").write_text(settings.to_yaml())
    with pytest.raises((RuntimeError, DtrainError), match="no tracker"):
        train.train_run(settings, bring_up(cpu=True))
    assert folder.exists() is (before is not None)
    assert before is None or (folder / before).read_text() == "kept"
