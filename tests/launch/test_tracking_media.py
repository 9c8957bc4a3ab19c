"""Images, histograms, texts and files of a run's hooks, in W&B's own files and on a fake MLflow server: each once."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from helpers.wandb_files import wandb_media

from dtrain.config import load_settings
from dtrain.distributed.world import bring_up
from dtrain.trainer.train import train_run

FAKE = Path(__file__).parents[1] / "helpers/fake_mlflow"
RECIPE = """
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

net = nn.Linear(2, 1)
net.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
dl_train = DataLoader(TensorDataset(torch.ones(16, 2), torch.ones(16, 1)), batch_size=4)
dl_valid = None


def train_step(model, x, y):
    return (model(x) - y).square().mean()


def after_step(step, run):
    if step % 2 == 0:
        run.image("pixels", torch.full((4, 6), step / 10))
    if step == 3:
        run.histogram("weights", net.weight)
        run.text("note", "<b> & text")
        run.file(run.folder / "config.yaml")
    if step == 7 and not (run.folder / "again").exists():
        (run.folder / "again").touch()
        raise RuntimeError("once")
"""


def train(folder: Path, *words: str) -> Path:
    (folder / "recipe.py").write_text(RECIPE)
    how = [f"run.dir={folder}", "run.name=it", "epochs=2", "checkpoint.every_steps=5", *words]
    return train_run(load_settings(str(folder / "recipe.py"), how, {}), bring_up(cpu=True))


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has the stand-in imported in its place, for this test alone."""

    def forgotten() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] == "mlflow"}

    before = forgotten()
    monkeypatch.syspath_prepend(str(FAKE))
    yield
    forgotten()
    sys.modules.update(before)


@pytest.mark.usefixtures("mlflow")
def test_wandb_and_mlflow_get_each_once_also_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")  # which MLflow's tracker sets
    monkeypatch.setenv("FAKE_MLFLOW", str(tmp_path))
    how = ("track.wandb.project=x", "track.wandb.mode=offline", "track.mlflow.experiment=x")
    with pytest.raises(Exception, match="once"):
        train(tmp_path, *how)
    run = train(tmp_path, *how)
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    found = [one for file in files for one in wandb_media(file)]
    images = [(step, "pixels", "image-file") for step in (2, 4, 6, 8)]
    assert sorted(one for one in found if one[0] >= 0) == sorted(
        [*images, (3, "weights", "histogram"), (3, "note", "html-file")]
    )
    assert [one[1].rpartition("/")[2] for one in found if one[0] < 0] == ["step-00000003.yaml"]
    sent = json.loads((tmp_path / "store.json").read_text())["runs"][0]["files"]
    media = sorted(name for name in sent if name.startswith("media/"))
    assert media == sorted(
        [
            *(f"media/pixels/step-0000000{step}.png" for step in (2, 4, 6, 8)),
            "media/weights/step-00000003.json",
            "media/note/step-00000003.txt",
            "media/config.yaml/step-00000003.yaml",
        ]
    )
