"""Mistakes that beginners make, each with its message, as docs/mistakes.md shows them.

`cd tests && python -m helpers.mistakes` writes that page; tests/unit/test_mistakes.py compares it.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import typer

from dtrain.cli.app import app
from dtrain.cli.guard import _words
from dtrain.cli.train import settings_to_train
from dtrain.distributed.world import bring_up
from dtrain.launch.signals.stop_request import STOP_SIGNALS
from dtrain.trainer.train import train_run
from dtrain.wording import wrapped

COLUMNS = 80
PAGE = Path(__file__).parents[2] / "docs/mistakes.md"
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
        command: words after `dtrain`.
        files: further files, or others in place of the recipe; bytes as they are.
        cell: code of a notebook that is run in place of a command.
        before: words of a training that comes first; then `moves`, a file's name, is moved.
        moves: from where to where.
        without: a package that is not installed.
    """

    title: str
    change: tuple[tuple[str, str], ...] = ()
    command: str = "train recipe.py"
    files: dict[str, str | bytes] = field(default_factory=dict)
    cell: str = ""
    before: str = ""
    moves: tuple[str, str] = ("", "")
    without: str = ""

    def recipe(self) -> str:
        """Returns the recipe with the mistake in it."""
        text = RECIPE
        for before, after in self.change:
            assert before in text, before
            text = text.replace(before, after, 1)
        return text

    def shown(self) -> str:
        """Returns the mistake itself, for the page: the line that is wrong, the file, the cell, or nothing."""
        if self.cell:
            return _fenced("python", self.cell)
        lines = difflib.ndiff(RECIPE.splitlines(), self.recipe().splitlines())
        wrong = "\n".join(f"{line[0]}{line[2:]}" for line in lines if line[0] in "+-")
        wrong = _fenced("diff", wrong) if wrong else ""
        texts = {name: text for name, text in self.files.items() if isinstance(text, str)}
        return wrong + "".join(_fenced("yaml", text.rstrip()) for name, text in texts.items() if name.endswith("yaml"))


def message(mistake: Mistake, folder: Path) -> str:
    """Returns what a mistake ends in, as a terminal of 80 columns shows it.

    Names of folders, times, the machine's name and the marks below lines of code are left out or alike everywhere.
    """
    (folder / "recipe.py").write_text(mistake.recipe())
    for name, content in mistake.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with _in(folder, mistake.without):
        if mistake.before:
            with contextlib.redirect_stdout(io.StringIO()):
                _called(Mistake("", command=mistake.before))
        if mistake.moves[0]:
            Path(mistake.moves[1]).parent.mkdir(exist_ok=True)
            Path(mistake.moves[0]).rename(mistake.moves[1])
        said = _ran(mistake)
    said = said.replace(f"{folder}/", "").replace(str(folder), ".").replace(sys.executable, "python")
    said = re.sub(r"recipe-\d{8}-\d{6}", "recipe-20260101-120000", said)
    said = re.sub(r"^  on \S+, device", "  on laptop, device", said, flags=re.MULTILINE)
    said = re.sub(r"this machine has \d+ cores?", "this machine has 8 cores", re.sub(r"(?<=core: -n )\d+", "8", said))
    said = re.sub(r"^ +[~^]+\n", "", said, flags=re.MULTILINE)
    return wrapped(said.strip(), COLUMNS)


@contextlib.contextmanager
def _in(folder: Path, without: str) -> Iterator[None]:
    before, path, loaded = Path.cwd(), list(sys.path), dict(sys.modules)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}  # a verb ignores them as it ends
    os.chdir(folder)
    if without:
        sys.modules[without] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = path
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if without:
            sys.modules.pop(without)
            sys.modules |= {without: loaded[without]} if without in loaded else {}
        for name in set(sys.modules) - set(loaded):
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
            traced = error.__traceback__
            while traced is not None and traced.tb_frame.f_code.co_filename == __file__:
                traced = traced.tb_next
            error.__traceback__ = traced
            return err.getvalue() + _words(error)[0]
    return err.getvalue()


def _called(mistake: Mistake) -> None:
    if mistake.cell:
        exec(compile(mistake.cell, "cell", "exec"), {})  # noqa: S102 - the cell of a notebook
        return
    words = mistake.command.split()
    if words[0] == "train" and not any(word.startswith("-") for word in words):
        train_run(settings_to_train(words[1:], "auto", as_words=False), bring_up(cpu=True))
        return
    app(words, prog_name="dtrain")


def _box(text: str) -> str:
    """What is in typer's box."""
    lines = [line.strip("│ ").strip() for line in text.splitlines() if line.startswith("│")]
    return " ".join(lines) or text


def _fenced(kind: str, text: str) -> str:
    return f"```{kind}\n{text}\n```\n\n"


def page() -> str:
    """Returns docs/mistakes.md."""
    parts = [
        "# Common mistakes, and what dtrain says",
        "",
        f"{len(MISTAKES)} mistakes that everybody makes once, each with the message that it ends in on a terminal of "
        f"{COLUMNS} columns.",
        "The message names the value, the file and line or the key, and what to do instead.",
        "Made by `cd tests && python -m helpers.mistakes`. All of them start from this recipe, which is right:",
        "",
        _fenced("python", RECIPE.rstrip()),
    ]
    for title, text in messages().items():
        (mistake,) = (one for one in MISTAKES if one.title == title)
        command = "" if mistake.cell else f"$ dtrain {mistake.command}\n"
        parts += [f"## {title}", "", f"{mistake.shown()}{_fenced('text', command + text)}"]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def messages() -> dict[str, str]:
    """Returns title -> message of all of them."""
    found = {}
    for mistake in MISTAKES:
        with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ):
            found[mistake.title] = message(mistake, Path(folder).resolve())
    return found


_LOSS = "    return nn.functional.cross_entropy(model(x), y)\n\ndef valid"
_BUILD = "    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 3))"
_DATA = "    x, y = torch.randn(n, 4), torch.arange(n) % 3"
_LOADERS = "    return DataLoader(data, batch_size, shuffle=True), DataLoader(data, batch_size)\n"
_KERAS = """\
import torch, dtrain
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

x, y = torch.randn(8, 4), torch.randn(8, 1)
loader = DataLoader(TensorDataset(x, y), batch_size=4)
model = dtrain.KerasModel(nn.Linear(4, 1), loss_fn=nn.MSELoss())
"""


def _step(after: str) -> tuple[tuple[str, str], ...]:
    return ((_LOSS, f"{after}\n\ndef valid"),)


MISTAKES = [
    # --- the command line and the config
    Mistake("A key of another library", command="train recipe.py max_epochs=5"),
    Mistake("The learning rate by another name", command="train recipe.py learning_rate=0.1"),
    Mistake("GPUs as a value", command="train recipe.py gpus=4"),
    Mistake("A value as an option", command="train recipe.py --epochs 5"),
    Mistake("A word in place of a number", command="train recipe.py epochs=ten"),
    Mistake("A number with an exponent in place of a whole one", command="train recipe.py epochs=1e3"),
    Mistake("A value without the equals sign", command="train recipe.py epochs 5"),
    Mistake("Text for a number of the recipe", command="train recipe.py lr=fast"),
    Mistake("No rank at all", command="train recipe.py -n 0"),
    Mistake("A hundred ranks", command="train recipe.py -n 100"),
    Mistake("A recipe that is not there", command="train recpie.py"),
    Mistake("Another file's name", command="train main.py"),
    Mistake("A verb with a typo", command="trian recipe.py"),
    Mistake("A run that is not there", command="evaluate runs/first"),
    Mistake("A column that does not exist", command="train recipe.py checkpoint.monitor=val_acc"),
    Mistake(
        "Tabs in YAML", command="train train.yaml", files={"train.yaml": "recipe: recipe.py\ntrain:\n\tepochs: 3\n"}
    ),
    Mistake(
        "YAML without a space", command="train train.yaml",
        files={"train.yaml": "recipe: recipe.py\ntrain:\n  epochs:3\n"},
    ),
    Mistake(
        "A key at the top of a config", command="train train.yaml", files={"train.yaml": "recipe: recipe.py\nepochs: 3\n"}
    ),
    Mistake("A file in UTF-16", command="train other.py", files={"other.py": RECIPE.encode("utf-16")}),
    # --- the recipe
    Mistake(
        "`sys.argv` in a recipe",
        (("import torch\n", "import sys\nimport torch\nLR = float(sys.argv[1])\n"),),
        command="train recipe.py lr=0.1",
    ),
    Mistake("A relative import", (("import torch\n", "import torch\nfrom .nets import Net\n"),)),
    Mistake("A package that is not installed", (("import torch\n", "import torch\nimport torchtexts\n"),)),
    Mistake("A package of dtrain's own that is gone", command="summary recipe.py", without="torchinfo"),
    Mistake(
        "A recipe that was moved after training", command="evaluate runs/first",
        before="train recipe.py run.name=first epochs=1", moves=("recipe.py", "sub/recipe.py"),
    ),
    Mistake("`.cuda()` in a recipe, on a machine without a GPU", ((_BUILD, "    return nn.Linear(4, 3).cuda()"),)),
    Mistake("A model that is not returned", ((_BUILD, _BUILD.replace("return", "net =")),)),
    Mistake("A class in place of a model", ((_BUILD, "    return nn.Linear"),)),
    Mistake(
        "The optimizer of another model",
        (("torch.optim.Adam(model.parameters()", "torch.optim.Adam(build_model().parameters()"),),
    ),
    # --- the data
    Mistake(
        "A data file that is not there, by its default",
        (("(n: int = 12,", "(path: str = 'data/train.pt', n: int = 12,"), (_DATA, "    x, y = torch.load(path)")),
    ),
    Mistake("No validation loader", ((_LOADERS, "    return DataLoader(data, batch_size, shuffle=True)\n"),)),
    Mistake("A dataset in place of a loader", ((_LOADERS, "    return data, DataLoader(data, batch_size)\n"),)),
    Mistake("An empty dataset", command="train recipe.py n=0"),
    Mistake(
        "Fewer samples than a batch, which are dropped", (("shuffle=True", "shuffle=True, drop_last=True"),),
        command="train recipe.py n=3",
    ),
    Mistake("Features and labels swapped", (("TensorDataset(x, y)", "TensorDataset(y, x)"),)),
    Mistake("Labels as floats", ((_DATA, f"{_DATA}\n    y = y.float()"),)),
    Mistake("Labels counted from 1", ((_DATA, f"{_DATA} + 1"),)),
    Mistake("Texts in a batch", (("    data = TensorDataset(x, y)", "    data = [('a text', 1)] * n"),)),
    Mistake("A shape that does not fit", (("nn.Linear(4, hidden)", "nn.Linear(5, hidden)"),)),
    # --- the steps
    Mistake("A step that returns nothing", _step("    loss = nn.functional.cross_entropy(model(x), y)")),
    Mistake("A loss as a Python number", _step("    return nn.functional.cross_entropy(model(x), y).item()")),
    Mistake("A loss for each sample", _step("    return nn.functional.cross_entropy(model(x), y, reduction='none')")),
    Mistake("A metric that is not a number", _step("    return nn.functional.cross_entropy(model(x), y), 'good'")),
    Mistake(
        "A batch as one parameter",
        (("def train_step(model, x, y):", "def train_step(model, batch):\n    x, y = batch"),),
    ),
    Mistake("No `train_step`", (("def train_step", "def training_step"),)),
    Mistake("NaN in the data", ((_DATA, f"{_DATA}\n    x[0] = torch.nan"),), command="train recipe.py batch_size=12"),
    # --- notebooks
    Mistake("Tensors in place of a loader", cell=f"{_KERAS}model.fit(x, y, epochs=5)"),
    Mistake("Keras's batch size", cell=f"{_KERAS}model.fit(loader, batch_size=32)"),
    Mistake("An argument of another library", cell=f"{_KERAS}model.fit(loader, epochs=5, wandb=True)"),
    Mistake(
        "A net without what the default step needs",
        cell=f"{_KERAS}dtrain.train_model(nn.Linear(4, 1), 5, loader)",
    ),
]  # fmt: skip


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
