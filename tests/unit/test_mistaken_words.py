"""Mistakes in words, configs and recipes' files: each is told with its key or file, its line, and the remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from dtrain.cli.train import read_target
from dtrain.config import load_settings
from dtrain.engine.train_step import Task
from dtrain.errors import ConfigError, RecipeError, UsageError
from dtrain.launch.monitor.describe import describe, explain
from dtrain.recipe.loader import bind, load_recipe
from dtrain.trainer.folder import make_folder

FILES = {
    "nb.ipynb": "{}",
    "a.txt": "",
    "nul.py": "x = 1\n\0\n",
    "tabs.yaml": "train:\n  epochs: 2\n\tseed: 3\n",
    "list.yaml": "- 1\n",
    "open.yaml": "train: {epochs: 2\n",
    "named.yaml": "train:\n  epochs: 2\nrecipe: nope.py\n",
    "notebook.yaml": "recipe: nb.ipynb\n",
}
TOLD = {
    "nb.ipynb": "nb.ipynb is a notebook: `jupyter nbconvert --to script nb.ipynb`, then `dtrain train nb.py`",
    "a.txt": "recipe a.txt is not a .py file. A recipe is a .py file or a module; a config ends in .yaml.",
    "old": "recipe old is a folder. It is a run's folder: dtrain evaluate old",
    "some": "recipe some is a folder. Name a .py file or a .yaml config in it: train.yaml.",
    "nothing": "recipe nothing is a folder. Name a .py file or a .yaml config.",
    "nul.py": "nul.py:2: the file contains a NUL byte",
    "tabs.yaml": "tabs.yaml:3: indent with spaces, not tabs",
    "list.yaml": "list.yaml:1: a config should be a mapping of sections, such as 'train:', not a list.",
    "open.yaml": "open.yaml:2: not valid YAML: while parsing a flow mapping: expected ',' or '}'",
    "named.yaml": "named.yaml:3: recipe nope.py: no such file",
    "notebook.yaml": "notebook.yaml:1: nb.ipynb is a notebook",
    "track.wandb=true": "track.wandb = True (command line): should be a section: track.wandb.project=NAME.",
    "model=3": "model = 3 (command line): should be a section: model.KEY=VALUE.",
    "train=3": "train = 3 (command line): should be a section: train.epochs=3.",
    f"run.name={'a' * 256}": "(command line): should be a folder name of at most 255 bytes",
    f"run.name={'é' * 128}": "(command line): should be a folder name of at most 255 bytes",
}
RECIPE = """
import torch
from torch import nn
from torch.utils.data import DataLoader

def build_model(hidden: int = 2, bias: bool = True):
    return nn.Linear(2, hidden, bias)

def build_dataloaders(batch_size: int = 1):
    return DataLoader([torch.ones(2)], batch_size), None

def build_optimizer(model, lr: float = 0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)

def train_step(model, x):
    return model(x).mean()
"""
REJECTED = {
    "hidden=-3": "in build_model(hidden=-3): model.hidden = -3 (command line)",
    "batch_size=0": "in build_dataloaders(batch_size=0): data.batch_size = 0 (command line)",
    "lr=-1": "in build_optimizer(lr=-1.0): optimizer.lr = -1.0 (command line)",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    for name in ("old/config.yaml", "some/train.yaml", "nothing/x", "package/__init__.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("word", TOLD)
def test_it_is_told(here: Path, word: str) -> None:
    with pytest.raises((ConfigError, RecipeError)) as told:
        read_target([word])
    assert TOLD[word] in str(told.value)
    assert "\n" not in str(told.value).strip()


def test_what_is_right_stays_so(here: Path) -> None:
    assert read_target(["package"]).config.recipe == "package"
    assert read_target([f"run.name={'a' * 255}"]).config.run.name == "a" * 255


def test_a_folder_of_runs_that_is_a_file_is_told_without_the_name_that_nobody_gave(here: Path) -> None:
    with pytest.raises(UsageError, match=r"^run\.dir = 'a.txt' \(command line\): cannot create a.txt/digits-"):
        make_folder(load_settings(None, ["run.dir=a.txt"], {}))
    named = re.escape("run.dir = 'a.txt' (command line), run.name = 'it' (command line): cannot create a.txt/it")
    with pytest.raises(UsageError, match=named):
        make_folder(load_settings(None, ["run.dir=a.txt", "run.name=it"], {}))


@pytest.mark.parametrize("word", REJECTED)
def test_what_a_builder_rejects_is_traced_to_its_key(tmp_path: Path, word: str) -> None:
    (tmp_path / "mine.py").write_text(RECIPE)
    settings = load_settings(str(tmp_path / "mine.py"), [word], {})
    with pytest.raises((RuntimeError, ValueError)) as raised:
        bind(load_recipe(settings.config.recipe, settings.base), settings)
    text, _ = describe(raised.value)
    assert text.endswith(f"raised by your code\n  {REJECTED[word]}")


def test_a_builder_that_took_nothing_of_the_config_is_not_blamed_on_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RECIPE.replace("hidden: int = 2", "hidden: int = -2"))
    settings = load_settings(str(tmp_path / "mine.py"), [], {})
    with pytest.raises(RuntimeError) as raised:
        bind(load_recipe(settings.config.recipe, settings.base), settings)
    assert describe(raised.value)[0].endswith("raised by your code")


@pytest.mark.parametrize(
    "frames",
    [
        "Exception raised from f at /pytorch/x.cpp:12 (most recent call first):\nframe #0: c10::Error (0x1 in libc10.so)",
        "C++ CapturedTraceback:\n#4 std::_Function_handler from ??:0\n#5 c10::Error from ??:0",
    ],
)
def test_torchs_own_frames_are_left_out(frames: str) -> None:
    try:
        raise RuntimeError(f"negative dimension -3\n{frames}\n")
    except RuntimeError as error:
        found = explain(error)
    assert "RuntimeError: negative dimension -3\ndtrain: error" in found.text
    assert found.told.message.strip() == "negative dimension -3"


@pytest.mark.parametrize("name", ["loss_func", "metric_func"])
def test_a_loss_that_became_a_layer_is_told_before_training(name: str) -> None:
    net = nn.Sequential(nn.Linear(2, 1))
    setattr(net, name, nn.BCEWithLogitsLoss())
    with pytest.raises(UsageError, match=rf"model\.{name} = BCEWithLogitsLoss\(...\) makes it a layer of the net"):
        Task(net, lambda model, x, y: None, [])
    apart = nn.Sequential(nn.Linear(2, 1))
    setattr(apart, name, torch.nn.functional.binary_cross_entropy_with_logits)
    Task(apart, lambda model, x, y: None, [])
