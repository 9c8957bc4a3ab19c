"""The files of a project that its code opens, executes or loads are compared when a run is resumed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.config import load_settings
from dtrain.distributed.world import bring_up
from dtrain.errors import AgreedError
from dtrain.provenance import opened
from dtrain.provenance.opened import OpenedFiles, opened_files
from dtrain.rundir.history import read_history
from dtrain.trainer.train import train_run

RECIPE = """
import ctypes, importlib.util, json, runpy
from pathlib import Path
import torch
from torch import nn
import helper_of_opened

HERE = Path(__file__).parent
exec((HERE / "executed.py").read_text())
ran = runpy.run_path(str(HERE / "ran.py"))
LIBRARY = ctypes.CDLL(str(HERE / "library.so"))
spec = importlib.util.spec_from_file_location("_yaml", HERE / "extension.so")
importlib.util.module_from_spec(spec)
state = HERE / "state.txt"
state.write_text(state.read_text() + "1" if state.exists() else "1")

def build_model():
    return nn.Linear(2, 1)

def build_dataloaders():
    batches = [(torch.ones(2, 2) * n, torch.ones(2, 1)) for n in range(4)]
    return batches, batches

def build_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.01)

def train_step(model, x, y):
    with open(HERE / "log.txt", "a") as log:
        log.write("a step")
    scale = json.loads((HERE / "step.json").read_text())
    return scale * (model(x) - y).square().mean(), 1.0

def valid_step(model, x, y):
    return (model(x) - y).square().mean(), 1.0
"""
WORDS = "not what the run was trained with"


def train(folder: Path, epochs: int) -> list[int]:
    values = [f"run.dir={folder / 'runs'}", "run.name=it", f"epochs={epochs}"]
    settings = load_settings(str(folder / "opens_files.py"), values, environ={})
    return [int(epoch) for epoch in read_history(train_run(settings, bring_up(cpu=True), "auto"))["epoch"]]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    library = importlib.util.find_spec("yaml._yaml")
    assert library is not None and library.origin is not None
    for name in ("library.so", "extension.so"):
        shutil.copy(library.origin, tmp_path / name)
    files = {"opens_files.py": RECIPE, "helper_of_opened.py": "A = 1\n", "step.json": "1.0", "never.json": "1"}
    files |= {"executed.py": "EXECUTED = 1\n", "ran.py": "RAN = 1\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def add(path: Path) -> None:
    """Another content that does the same."""
    with path.open("ab") as file:
        file.write(b"\n")


@pytest.mark.parametrize("name", ["executed.py", "step.json", "library.so", "extension.so", "never.json"])
def test_a_file_that_was_opened_and_is_another_one_is_named(
    project: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    train(project, 1)
    (project / "runs/it/note.txt").write_text("of the run itself")
    assert train(project, 2) == [1, 2]
    assert WORDS not in caplog.text, "neither what the recipe writes nor what it imports"
    add(project / name)
    assert train(project, 3) == [1, 2, 3]
    assert (f"{name}, which the code opens, is {WORDS}" in caplog.text) is (name != "never.json")


def test_what_runpy_executes_is_code(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(project, 1)
    (project / "ran.py").write_text("# comments do not count\nRAN = 1\n")
    assert train(project, 2) == [1, 2]
    (project / "ran.py").write_text("RAN = 2\n")
    with pytest.raises(AgreedError, match=r"the code is not that of the checkpoint: ran\.py has changed: line 1"):
        train(project, 3)
    assert (project / "runs/it/code/1/ran.py").read_text() == "RAN = 1\n"


def test_an_edit_after_a_file_was_opened_is_not_what_the_run_was_trained_with(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = project / "opens_files.py"
    recipe.write_text(
        RECIPE.replace("def build_model():", "def build_model():\n    edit()")
        + '\ndef edit():\n    import os\n    os.system(f"echo >> {HERE}/executed.py")\n'
    )
    train(project, 1)
    assert train(project, 2) == [1, 2]
    assert f"executed.py, which the code opens, is {WORDS}" in caplog.text


def test_the_manifest_names_what_was_opened_and_shows_nothing_of_it(project: Path) -> None:
    (project / "step.json").write_text("1.0" + " " * 50)
    train(project, 1)
    (manifest,) = project.glob("runs/it/checkpoints/*/manifest.json")
    found = json.loads(manifest.read_text())["opened"]
    assert set(found) == {"executed.py", "library.so", "extension.so", "step.json"}
    assert found["step.json"].startswith("53:53:")


@pytest.fixture
def hears(tmp_path: Path) -> Callable[[str], OpenedFiles]:
    """What `opened_files`, whose hook stays with the process, has noted after code of a recipe's was executed."""

    def execute(text: str) -> OpenedFiles:
        opened_files.watch(tmp_path)
        opened_files._own.add("of_a_recipe")
        exec(text, {"__name__": "of_a_recipe", "HERE": tmp_path})  # noqa: S102
        return opened_files

    return execute


def test_there_is_a_limit_to_their_number_and_to_what_is_hashed(
    tmp_path: Path, hears: Callable[[str], OpenedFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened, "_MOST_FILES", 3)
    monkeypatch.setattr(opened, "_HASHED_AT_ALL", 12)
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("12345")
    found = hears("for n in range(5): (HERE / f'{n}.txt').read_text()").marks(set(), None)
    assert [mark.rpartition(":")[0] for mark in found.values()] == ["5:5", "5:5", "5:2"]
    (tmp_path / "2.txt").write_text("1234x")
    assert opened_files.changed(found) == [], "of which two bytes were hashed"
    (tmp_path / "2.txt").write_text("1x345")
    assert opened_files.changed(found) == ["2.txt"]
    (tmp_path / "2.txt").unlink()
    assert opened_files.changed(found) == []


def test_what_a_manifest_of_somebody_else_names_is_not_read(tmp_path: Path) -> None:
    opened_files.watch(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "x").write_text("1")
    odd = {"/etc/passwd": "1:1:x", "../x": "1:1:x", "fifo": "1:1:x", "x/../x": "1:1:x", "": "", "\0": "::", "x": "y"}
    assert opened_files.changed(odd) == ["x"]


def test_files_of_no_interest_are_not_noted(tmp_path: Path, hears: Callable[[str], OpenedFiles]) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / ".hidden").mkdir()
    for name in (".hidden/a", "b", "c"):
        (tmp_path / name).write_text("1")
    text = """
import os
os.close(os.open(HERE / "fifo", os.O_RDONLY | os.O_NONBLOCK))
open(HERE / ".hidden/a").close()
open("/dev/null").close()
open(os.open("/dev/null", os.O_RDONLY)).close()
open(HERE / "b").close()
open(HERE / "c").close()
open(HERE / "c", "r+").close()
open(HERE / "c").close()
for wrong in (HERE / "missing", "\\0"):
    try:
        open(wrong)
    except (OSError, ValueError):
        pass
"""
    assert list(hears(text).marks(set(), None)) == ["b"]
    opened_files.watch(tmp_path)
    (tmp_path / "b").read_text()
    assert opened_files.marks(set(), None) == {}, "no code of a recipe's has opened it"
