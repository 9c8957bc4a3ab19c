"""Data that were moved: a path that the recipe annotates as one may change at a resume; what is there may not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import dtrain
from dtrain.config import load_settings
from dtrain.distributed.world import bring_up
from dtrain.errors import AgreedError
from dtrain.trainer.train import train_run

RECIPE = """
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def build_model():
    return nn.Linear(3, 1)

def build_dataloaders(root: Path, more: list[Path] | None = None, batch_size: int = 4):
    x = torch.load(Path(root) / "x.pt", weights_only=True)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    return DataLoader(data, batch_size=batch_size, shuffle=True), None

def build_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)

def train_step(model, x, y):
    return {"loss": (model(x) - y).square().mean()}
"""


def start(folder: Path, root: str, *words: str, name: str = "it", resume: str = "auto") -> Path:
    named = [f"run.dir={folder}", f"run.name={name}", f"data.root={folder / root}", *words]
    return train_run(load_settings(str(folder / "mine.py"), named, environ={}), bring_up(cpu=True), resume)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(RECIPE)
    for name, seed in (("old", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        torch.save(torch.randn(12, 3, generator=torch.Generator().manual_seed(seed)), tmp_path / name / "x.pt")
    return tmp_path


def test_a_moved_path_is_no_other_run_and_is_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    columns = ["epoch", "loss"]
    whole = start(folder, "old", "epochs=4", name="whole")
    run = start(folder, "old", "epochs=2")
    shutil.move(folder / "old", folder / "new")
    start(folder, "new", "epochs=3", resume=str(run))
    said = [record.getMessage() for record in caplog.records if "the same thing moved" in record.getMessage()]
    assert said == [
        f"data.root was {folder}/old and is {folder}/new (command line): a path, so it is taken for the same thing moved"
    ]
    caplog.clear()
    start(folder, "new", "epochs=4")
    assert "moved" not in caplog.text
    assert dtrain.read_history(run)[columns].equals(dtrain.read_history(whole)[columns])
    with pytest.raises(AgreedError, match=r"the data (is|are) not"):
        start(folder, "other", "epochs=5")
    with pytest.raises(AgreedError, match=r"data\.more was None and is \['a'\]"):
        start(folder, "new", "epochs=5", "data.more=[a]")  # something else, and not the same elsewhere
    with pytest.raises(AgreedError, match=r"data\.batch_size was 4 and is 6 .*Use the run's values"):
        start(folder, "new", "epochs=5", "data.batch_size=6")


def test_the_remedy_for_text_works(folder: Path) -> None:
    """The message does not ask for what was just done: it names the annotation, and that is all that it takes."""
    (folder / "mine.py").write_text(RECIPE.replace("root: Path", "root: str"))
    run = start(folder, "old", "epochs=1")
    shutil.move(folder / "old", folder / "new")
    with pytest.raises(AgreedError) as refused:
        start(folder, "new", "epochs=2", resume=str(run))
    assert "If data.root only says where the same data are, annotate it in build_dataloaders (root: Path)" in str(
        refused.value
    )
    (folder / "mine.py").write_text(RECIPE)
    start(folder, "new", "epochs=2", "checkpoint.accept=code", resume=str(run))
    assert dtrain.read_history(run)["epoch"].tolist() == [1, 2]
    with pytest.raises(AgreedError) as refused:
        start(folder, "new", "epochs=3", "data.batch_size=6")
    assert "annotate" not in str(refused.value)
