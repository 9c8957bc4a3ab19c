"""Mistakes that beginners make, each with the command that shows it: tried in one process, and shown in docs/mistakes.md."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import typer

from dtrain.cli.app import app
from dtrain.cli.guard import _words
from dtrain.cli.train import settings_to_train
from dtrain.distributed.world import bring_up
from dtrain.trainer.train import train_run
from dtrain.wording import wrapped

COLUMNS = 80
RECIPE = """\
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def build_model(hidden: int = 8):
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 3))

def build_dataloaders(n: int = 12, batch_size: int = 4):
    x, y = torch.randn(n, 4), torch.arange(n) % 3
    data = TensorDataset(x, y)
    return DataLoader(data, batch_size, shuffle=True), DataLoader(data, batch_size)

def build_optimizer(model, lr: float = 0.01):
    return torch.optim.Adam(model.parameters(), lr=lr)

def train_step(model, x, y):
    return nn.functional.cross_entropy(model(x), y)

def valid_step(model, x, y):
    return nn.functional.cross_entropy(model(x), y)
"""


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
        title: what was done, in words.
        change: (text of the recipe, what stands in its place): the mistake in the recipe.
        command: words after `dtrain`, or Python code for `call`.
        files: further files, or others in place of the recipe; bytes as they are.
        call: runs Python code of a notebook in place of a command.
    """

    title: str
    change: tuple[tuple[str, str], ...] = ()
    command: str = "train recipe.py"
    files: dict[str, str | bytes] = field(default_factory=dict)
    call: str = ""


def message(mistake: Mistake, folder: Path) -> str:
    """Returns what a mistake ends in, as a terminal of 80 columns shows it; folders and memory addresses are dots."""
    text = RECIPE
    for before, after in mistake.change:
        assert before in text, before
        text = text.replace(before, after)
    (folder / "recipe.py").write_text(text)
    for name, content in mistake.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with _in(folder):
        said = _ran(mistake)
    said = re.sub(r"\S*/site-packages/", ".../", said.replace(f"{folder}/", "").replace(str(folder), "."))
    return wrapped(re.sub(r"0x[0-9a-f]{6,}", "0x...", said.strip()), COLUMNS)


@contextlib.contextmanager
def _in(folder: Path) -> Iterator[None]:
    before, path, loaded = Path.cwd(), list(sys.path), set(sys.modules)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = path
        for name in set(sys.modules) - loaded:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(folder):
                del sys.modules[name]


def _ran(mistake: Mistake) -> str:
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            _called(mistake)
        except typer.Exit:
            pass
        except SystemExit:
            return _box(err.getvalue())
        except BaseException as error:  # noqa: BLE001 - it is what is looked at
            return err.getvalue() + _words(error)[0]
    return err.getvalue() or "(nothing)"


def _called(mistake: Mistake) -> None:
    if mistake.call:
        exec(compile(mistake.call, "notebook.py", "exec"), {})  # noqa: S102 - the cell of a notebook
        return
    words = mistake.command.split()
    if words[0] == "train" and not any(word.startswith("-") for word in words):
        settings = settings_to_train(words[1:], "auto", as_words=False)
        train_run(settings, bring_up(cpu=True))
        return
    app(words, prog_name="dtrain")


def _box(text: str) -> str:
    """What is in typer's box."""
    lines = [line.strip("│ ").strip() for line in text.splitlines() if line.startswith("│")]
    return " ".join(lines) or text
