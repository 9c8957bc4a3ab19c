"""Bad input ends in exit code 1 or 2 and one clear message: value, place, remedy; no traceback of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.commands import Done, Dtrain

# Each: words after `dtrain train`, the exit code, and what the message must name.
USAGE = {
    "missing config": (["nope.yaml"], 2, ["nope.yaml", "no such file", "configs/digits.yaml"]),
    "missing recipe": (["nope.py"], 2, ["nope.py", "no such file"]),
    "missing module": (["no.such.module"], 2, ["no.such.module", "no module"]),
    "unknown key": (["train.epoch=3"], 2, ["train.epoch = 3", "command line", "'epochs'"]),
    "unknown bare key": (["dropot=3"], 2, ["dropot = 3", "Did you mean 'dropout'?", "`dtrain keys "]),
    "wrong type": (["epochs=many"], 2, ["train.epochs = 'many'", "integer"]),
    "no epochs": (["epochs=0"], 2, ["train.epochs = 0", "greater than or equal to 1"]),
    "wrong builder type": (["model.dropout=high"], 2, ["model.dropout = 'high'", "number", "build_model("]),
    "unknown builder key": (["data.batchsize=3"], 2, ["data.batchsize = 3", "'batch_size'", "digits.py:"]),
    "too few ranks": (["-n", "0"], 2, ["-n", "greater than or equal to", "1"]),
}
FAULTS = {
    "returns nothing": (["model.fault=nothing"], 1, ["train step returned nothing (None)", "train step 1"]),
    "returns three": (["model.fault=three"], 1, ["a tuple of 3 values"]),
    "returns text": (["model.fault=text"], 1, ["'metric' as str"]),
    "returns no value": (["model.fault=empty"], 1, ["train step returned"]),
    "two elements": (["model.fault=two-elements"], 1, ["'metric'", "(2,)", "mean()"]),
    "does not train": (["model.fault=no-graph"], 1, ["does not train", "model.optimizer.step()"]),
    "never steps": (["model.fault=backward-only"], 1, ["no optimizer's step() ran", "model.optimizer.step()"]),
    "exits in a step": (["model.fault=sys-exit"], 1, ["your code called sys.exit(3)", "train step 1"]),
    "no train data": (["n_train=0"], 1, ["train loader yielded no batch"]),
    "no valid data": (["n_valid=0"], 1, ["valid loader yielded no batch"]),
    "all dropped": (["n_train=3", "drop_last=true"], 1, ["train loader yielded no batch", "drop_last"]),
    "wrong bool": (["drop_last=perhaps"], 2, ["data.drop_last = 'perhaps'", "boolean", "build_dataloaders("]),
}
EMPTY = ("no train data", "no valid data", "all dropped")
FILES = {
    "syntax error": ("def train_step(model:\n  pass\n", 2, [":1: syntax error", "def train_step(model:"]),
    "no train_step": ("model = dl_train = None\n", 2, ["defines no train_step"]),
    "no model": ("def train_step(m): pass\ndl_train = []\n", 2, ["defines no model"]),
    "wrong model": ("def train_step(m): pass\nmodel = 3\n", 2, ["the model is a int"]),
    "no data": ("from torch import nn\nmodel = nn.Linear(1, 1)\ndef train_step(m): pass\n", 2, ["defines no data"]),
    "no valid_step": (
        "from torch import nn\nmodel = nn.Linear(1, 1)\ndl_train = dl_valid = []\ndef train_step(m): pass\n",
        2,
        ["defines no valid_step", "dl_valid = None"],
    ),
    "one loader": (
        "from torch import nn\nmodel = nn.Linear(1, 1)\ndef train_step(m): pass\ndef build_dataloaders(): return []\n",
        2,
        ["build_dataloaders returned list", "(dl_train, dl_valid)"],
    ),
    "exits": ("import sys\nsys.exit(4)\n", 2, ["sys.exit(4)", "__main__"]),
    "lazy net": (
        "from torch import nn\nmodel = nn.LazyLinear(1)\ndl_train = []\ndef train_step(m): pass\n",
        2,
        ["weight has no shape yet"],
    ),
    "dataset as loader": (
        "import torch\nfrom torch import nn\nfrom torch.utils.data import TensorDataset\nmodel = nn.Linear(1, 1)\n"
        "dl_train = TensorDataset(torch.ones(3))\ndl_valid = None\ndef train_step(m): pass\n",
        2,
        ["TensorDataset", "DataLoader(dataset"],
    ),
    "builder's signature": (
        "from torch import nn\ndef build_model(a, /): pass\ndef train_step(m): pass\n",
        2,
        ["build_model(a, /) cannot be called"],
    ),
    "no parameter": (
        "from torch import nn\ndef build_model(width): return nn.Linear(width, 1)\ndef train_step(m): pass\n",
        2,
        ["model.width is required"],
    ),
}


def assert_told_once(done: Done, code: int, expected: list[str]) -> None:
    assert done.code == code, done.text
    for part in expected:
        assert part in done.err, done.text
    assert "Traceback" not in done.text
    assert done.err.count("dtrain: error") <= 1, f"told more than once: {done.err}"
    assert len(done.err.strip().splitlines()) <= 9, f"no clear message: {done.err}"


@pytest.mark.parametrize("case", USAGE)
def test_usage(dtrain: Dtrain, case: str) -> None:
    words, code, expected = USAGE[case]
    assert_told_once(dtrain("train", *words), code, expected)
    assert not (dtrain.folder / "runs").exists(), "bad usage starts nothing"


@pytest.mark.parametrize("case", FAULTS)
def test_steps_and_loaders(dtrain: Dtrain, recipes: Path, case: str) -> None:
    words, code, expected = FAULTS[case]
    assert_told_once(dtrain("train", recipes / "small.py", "epochs=1", *words), code, expected)
    if case in EMPTY:
        assert not (dtrain.folder / "runs").exists(), "told before anything starts"


@pytest.mark.parametrize("case", ["returns nothing", "does not train", "no train data", "no valid data"])
def test_steps_and_loaders_on_two_ranks(dtrain: Dtrain, recipes: Path, case: str) -> None:
    words, code, expected = FAULTS[case]
    assert_told_once(dtrain("train", recipes / "small.py", "epochs=1", *words, "-n", 2, "--cpu"), code, expected)


@pytest.mark.parametrize("case", FILES)
def test_recipe_files(dtrain: Dtrain, case: str) -> None:
    text, code, expected = FILES[case]
    (dtrain.folder / "mine.py").write_text(text)
    done = dtrain("train", "mine.py")
    assert_told_once(done, code, expected)
    assert not (dtrain.folder / "runs").exists()


def test_a_failed_set_up_is_told_once_on_two_ranks(dtrain: Dtrain) -> None:
    text, code, expected = FILES["no valid_step"]
    (dtrain.folder / "mine.py").write_text(text)
    assert_told_once(dtrain("train", "mine.py", "-n", 2, "--cpu"), code, expected)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_users_own_exception_keeps_its_traceback_and_tells_where(dtrain: Dtrain, recipes: Path, ranks: int) -> None:
    fault = f"raise@{ranks - 1}"
    done = dtrain("train", recipes / "small.py", f"model.fault={fault}", "-n", ranks, "--cpu")
    assert done.code == 1
    assert done.err.count("Traceback") == 1, done.err
    assert 'small.py", line' in done.err
    assert "ValueError: a fault of the user's own" in done.err
    assert f"rank {ranks - 1}, epoch 1, train step 1" in done.err
    assert "dtrain/engine/loop.py" not in done.err


def test_a_fault_in_validation_a_worker_or_a_builder_tells_where(dtrain: Dtrain, recipes: Path) -> None:
    for words, told in (
        (["fault=raise-in-valid"], ["a fault in validation", "rank 0, epoch 1, valid step 1"]),
        (["kind=faulty"], ["the disk with sample 5 is gone", "__getitem__", "rank 0, epoch 1, train step 2"]),
        (["fault=build"], ["no such layer", "in build_model"]),
    ):
        done = dtrain("train", recipes / "small.py", *words)
        assert done.code == 1
        for part in told:
            assert part in done.err


@pytest.mark.parametrize(
    ("fault", "told"), [("kill@1", "rank 1 was killed by SIGKILL"), ("exit@1", "rank 1 exited with code 0")]
)
def test_a_rank_that_dies_without_a_word_ends_the_job(dtrain: Dtrain, recipes: Path, fault: str, told: str) -> None:
    done = dtrain("train", recipes / "small.py", f"model.fault={fault}", "-n", 2, "--cpu")
    assert done.code == 1
    assert told in done.err


def test_a_run_is_never_written_over(dtrain: Dtrain, recipes: Path) -> None:
    words = ["train", recipes / "small.py", "epochs=1", "run.name=mine"]
    assert dtrain(*words).code == 0
    before = (dtrain.folder / "runs/mine/history.csv").read_text()
    assert_told_once(dtrain(*words, "--resume", "never"), 2, ["runs/mine already exists", "run.name"])
    assert_told_once(dtrain(*words, "optimizer.lr=0.3"), 2, ["optimizer.lr was 0.1 and is 0.3", "run.name"])
    assert (dtrain.folder / "runs/mine/history.csv").read_text() == before


@pytest.mark.parametrize("name", ["a b", "$(touch x)", "ünï-日本", "it's", "--help", ";rm"])
def test_awkward_run_names_arrive_unchanged(dtrain: Dtrain, recipes: Path, name: str) -> None:
    done = dtrain("train", recipes / "small.py", "epochs=1", f"run.name={name}")
    if done.code == 0:
        assert dtrain.run_folder().name == name
    else:
        assert_told_once(done, 2, ["run.name"])
    assert not (dtrain.folder / "x").exists()


def test_a_folder_that_cannot_be_made_is_named(dtrain: Dtrain, recipes: Path) -> None:
    (dtrain.folder / "file").write_text("")
    done = dtrain("train", recipes / "small.py", "run.dir=file")
    assert_told_once(done, 2, ["run.dir = 'file'", "Not a directory"])


PAST = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)


def build_model():
    return Module()


def build_dataloaders():
    return DataLoader(TensorDataset(torch.randn(24, 3)), batch_size=2), None


def build_optimizer(model, lr: float = 0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def train_step(model, x):
    return model.net(x).square().mean()
"""


def test_a_part_of_the_net_that_is_called_on_two_ranks_is_told_of_at_once_with_ddp(dtrain: Dtrain) -> None:
    (dtrain.folder / "past.py").write_text(PAST)
    done = dtrain("train", "past.py", "-n", 2, "--cpu", "average=ddp")
    assert done.code == 1, done.text
    assert "gradients come without a call of the model itself: of a part of it" in done.err
    assert "Set train.average=step" in done.err
    assert "epoch 1, train step 1\n" in done.err
    assert "StepError" not in done.text
