"""A run is not resumed with other code or data than it began with, unless that is accepted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from dtrain.checkpoint.code import check_same_code
from dtrain.checkpoint.rows import RowLines, read_rows
from dtrain.checkpoint.samples import _marks, alike, mark_of
from dtrain.config import load_settings
from dtrain.data.reading import read_some
from dtrain.distributed.world import bring_up
from dtrain.errors import AgreedError, CheckpointError, WorldError
from dtrain.provenance.code import Code, content_hash
from dtrain.rundir.history import read_history
from dtrain.trainer.train import train_run

# Its own file is edited, or goes, in the midst of the first epoch.
RECIPE = """
import os
import random
import torch
from pathlib import Path
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

COUNT = 0
STREAM, DRAWN, UNUSED = random.Random(5), torch.Generator(), torch.Generator()

def build_model():
    return nn.Linear(2, 1)

def build_dataloaders(file: str = "", then: str = "", sizes: str = ""):
    global THEN
    THEN = then
    g = torch.Generator().manual_seed(0)
    x = torch.randn(16, 2, generator=g)
    if file:
        x = torch.tensor([float(v) for v in Path(file).read_text().split()]).reshape(16, 2)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    if not sizes:
        return DataLoader(data, 4, shuffle=True), DataLoader(data, 8)
    class Batches:
        def __iter__(self):
            return (data[i : i + 4] for i in range(0, int(Path(sizes).read_text()), 4))
    return Batches(), None

def build_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.01)

def train_step(model, x, y):
    global COUNT
    COUNT += 1
    STREAM.random()
    torch.rand(1, generator=DRAWN)
    if COUNT == 2 and THEN == "edit":
        Path(__file__).write_text(Path(__file__).read_text().replace("square" + "()", "abs()"))
    if COUNT == 2 and THEN == "gone":
        Path(__file__).unlink()
    scale = float(os.environ.get("SCALE_OF_MINE", "1"))
    return (model(x) - y).square().mean() * scale, 1.0

def valid_step(model, x, y):
    return (model(x) - y).square().mean(), 1.0
"""


@pytest.fixture(autouse=True)
def on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.data.reading._SECONDS", 5.0)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "self_editing.py"
    path.write_text(RECIPE)
    return path


def train(recipe: Path, *words: str, resume: str = "auto") -> list[int]:
    words = (f"run.dir={recipe.parent}", "run.name=it", *words)
    settings = load_settings(str(recipe), list(words), environ={})
    return [int(epoch) for epoch in read_history(train_run(settings, bring_up(cpu=True), resume))["epoch"]]


def test_an_edit_while_it_trains_is_no_part_of_its_checkpoints(recipe: Path) -> None:
    assert train(recipe, "epochs=2", "data.then=edit") == [1, 2]
    assert "abs()" in recipe.read_text()
    with pytest.raises(AgreedError, match=r"self_editing\.py has changed: train_step, line \d+: `return .*abs\(\)"):
        train(recipe, "epochs=4", "data.then=edit")
    copy = recipe.parent / "it/code/1/self_editing.py"
    assert train(recipe, f"recipe={copy}", "epochs=3", "data.then=edit") == [1, 2, 3], "the kept copy, if asked for"


def test_a_recipe_that_goes_while_it_trains_ends_no_run(recipe: Path) -> None:
    assert train(recipe, "epochs=3", "data.then=gone") == [1, 2, 3]
    assert not recipe.exists() and (recipe.parent / "it/code/1/self_editing.py").read_text() == RECIPE


def test_other_data_of_the_same_length_is_refused_with_the_samples(
    recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = recipe.parent / "values.txt"
    word = f"data.file={values}"
    source = random.Random(0)
    numbers = [str(source.gauss(0, 1)) for _ in range(32)]
    values.write_text(" ".join(numbers))
    assert train(recipe, "epochs=1", word) == [1]
    values.write_text(" ".join(str(float(n) * (1 + 1e-6)) for n in numbers))
    assert train(recipe, "epochs=2", word) == [1, 2], "another processor or version rounds otherwise"
    values.write_text(" ".join(sorted(numbers)))
    with pytest.raises(
        AgreedError,
        match=r"train samples 0, .* have other values \(\d+ of 16 compared\); train data: tensor 0",
    ):
        train(recipe, "epochs=3", word)
    assert train(recipe, "epochs=3", word, "checkpoint.check_data=false") == [1, 2, 3]
    assert train(recipe, "epochs=4", word) == [1, 2, 3, 4], "there was nothing to compare with"
    values.write_text(" ".join(numbers))
    assert train(recipe, "epochs=5", word, "accept=data") == [1, 2, 3, 4, 5]
    assert "accepted: train samples 0, " in caplog.text
    assert train(recipe, "epochs=6", word) == [1, 2, 3, 4, 5, 6]


def test_a_change_in_the_middle_of_the_data_is_refused(recipe: Path) -> None:
    values = recipe.parent / "values.txt"
    recipe.write_text(recipe.read_text().replace("(16, 2", "(400, 2"))
    numbers = [f"{n % 7 - 3}.5" for n in range(800)]
    values.write_text(" ".join(numbers))
    recipe.write_text(recipe.read_text().replace("reshape(16, 2)", "reshape(400, 2)"))
    assert train(recipe, "epochs=1", f"data.file={values}") == [1]
    numbers[401] = "9.0"
    values.write_text(" ".join(numbers))
    with pytest.raises(
        AgreedError, match="the data is not the data that the run started with: train data: tensor 0, tensor 1"
    ):
        train(recipe, "epochs=2", f"data.file={values}")


def test_a_loader_without_a_length_that_grew_is_told_of(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And an environment variable, and a counter that no checkpoint has."""
    size = recipe.parent / "size.txt"
    size.write_text("8")
    train(recipe, "epochs=2", f"data.sizes={size}")
    assert (
        "self_editing.COUNT, self_editing.STREAM, self_editing.DRAWN changed in training and are not in checkpoints"
        in caplog.text
    )
    assert "training samples before" not in caplog.text and "SCALE" not in caplog.text
    size.write_text("16")
    monkeypatch.setenv("SCALE_OF_MINE", "2")
    train(recipe, "epochs=4", f"data.sizes={size}")
    assert caplog.text.count("an epoch had 8 training samples before the run was resumed and now has 16") == 1
    assert "SCALE_OF_MINE, which the recipe reads from the environment, is not as it was" in caplog.text


def test_a_schedule_that_gets_another_end_is_told_of(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(recipe, "epochs=1", "schedule=cosine")
    train(recipe, "epochs=1", "schedule=cosine")
    assert "curve" not in caplog.text
    train(recipe, "epochs=2", "schedule=cosine")
    assert "train.epochs was 1 and is 2: from here on the learning rate follows the cosine curve" in caplog.text


class Told:
    """A world of ranks that have loaded this, as rank 0 sees it; how values are gathered is `World.gather_json`'s."""

    def __init__(self, *files: dict[str, bytes]) -> None:
        self.codes = [Code(Path("r.py"), "r.py", each) for each in files]

    def gather_json(self, value: Any) -> list[Any]:
        hashes = [code.hashes() for code in self.codes]
        return hashes if isinstance(value, dict) else [content_hash(repr(one).encode()) for one in hashes]


def test_ranks_that_loaded_different_files_are_named() -> None:
    same, other = {"r.py": b"1", "net.py": b"1"}, {"r.py": b"1", "net.py": b"2"}
    for files in ([same, same], [same | {"draws.py": b"1"}, same, same]):  # rank 0 alone may import what draws
        world = Told(*files)
        check_same_code(world, world.codes[0])  # type: ignore[arg-type]
    world = Told(same, same, other)
    with pytest.raises(
        WorldError, match=r"net\.py was not loaded with the same .*: \w+ on rank 0, 1, \w+ on rank 2\. "
    ) as told:
        check_same_code(world, world.codes[0])  # type: ignore[arg-type]
    assert told.value.on_all_ranks


# --- reading samples ------------------------------------------------------------------------------------

STREAM = np.random.default_rng(3)
CALLS = 0


class Base(Dataset[Any]):
    def __init__(self) -> None:
        self.x = torch.arange(60.0).reshape(20, 3)
        self.n = 0
        self.read: list[int] = []

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        return {"x": self.x[index], "name": f"sample {index}", "label": int(index)}


class Random(Base):
    def __getitem__(self, index: int) -> Any:
        return self.x[index] + torch.randn(3) + random.random() + float(np.random.rand())


class Counts(Base):
    def __getitem__(self, index: int) -> Any:
        self.n += 1
        return self.x[index]


class CountsElsewhere(Base):
    def note(self, index: int) -> None:
        setattr(self, "n", self.n + 1)  # noqa: B010
        self.read.append(index)

    def __getitem__(self, index: int) -> Any:
        self.note(index)
        return self.x[index]


class CountsInAGlobal(Base):
    def __getitem__(self, index: int) -> Any:
        global CALLS  # noqa: PLW0603 - which is what it is about
        CALLS += 1
        return self.x[index]


class DrawsFromAGlobal(Base):
    def __getitem__(self, index: int) -> Any:
        return self.x[index] * STREAM.random()


class DrawsByATransform(Base):
    def __init__(self) -> None:
        super().__init__()
        self.transform = lambda x: x * STREAM.random()

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.x[index])


class Stateful(Base):
    def state_dict(self) -> dict[str, int]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.n = state["n"]


class Open(Base):
    def __init__(self) -> None:
        super().__init__()
        self.file = Path(__file__).open()  # noqa: SIM115


class Raises(Base):
    def __getitem__(self, index: int) -> Any:
        raise KeyError(index)


class Strange(Base):
    def __getitem__(self, index: int) -> Any:
        return object()


class Numbers(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from (torch.ones(2) * number for number in range(9))


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (Base(), 20),
        (Subset(Base(), range(3, 9)), 6),
        (ConcatDataset([Base(), Base()]), 32),
        (TensorDataset(torch.randn(30, 2), torch.arange(30)), 30),
        (Numbers(), 2),
        (Random(), 0),
        (Counts(), 0),
        (CountsElsewhere(), 0),
        (CountsInAGlobal(), 0),
        (DrawsFromAGlobal(), 0),
        (DrawsByATransform(), 0),
        (Stateful(), 0),
        (Raises(), 0),
        (Strange(), 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_samples_are_read_without_a_trace_or_not_at_all(data: Any, count: int) -> None:
    before = (torch.get_rng_state(), random.getstate(), STREAM.bit_generator.state, CALLS)
    own = [dict(vars(data)), list(getattr(data, "read", []))]
    marks = _marks(DataLoader(data, 4), 42)
    assert len(marks) == count
    assert marks == _marks(DataLoader(data, 4), 42)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), STREAM.bit_generator.state, CALLS)
    assert own == [dict(vars(data)), list(getattr(data, "read", []))]


def test_what_cannot_be_read_again_is_not_read() -> None:
    opened = Open()
    assert read_some(DataLoader(opened, 4), 8, 0) == {}
    opened.file.close()
    numbers = (n for n in range(3))
    assert read_some(numbers, 8, 0) == {} and list(numbers) == [0, 1, 2]
    assert list(read_some([torch.ones(2), torch.zeros(2)], 8, 0)) == ["0", "1"]
    assert read_some([], 8, 0) == {}


def test_slow_samples_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.data.reading._SECONDS", 0.0)
    assert _marks(DataLoader(Base(), 4), 42) == _marks(DataLoader(Numbers(), 4), 42) == {}


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        (torch.ones(4), torch.ones(4) + 1e-5, True),
        (torch.ones(4), torch.ones(4, dtype=torch.float64), False),
        (torch.ones(4), torch.tensor([1.0, 1, 1, 2]), False),
        (torch.arange(4.0), torch.tensor([3.0, 2, 1, 0]), False),
        (torch.arange(4), torch.arange(4) + 1, False),
        (torch.full((64,), 200, dtype=torch.uint8), torch.full((64,), 200, dtype=torch.uint8), True),
        (np.float32(1.5), np.float32(1.6), False),
        ({"a": [1, "x", None, True]}, {"a": [1, "y", None, True]}, False),
        (1.0, 1.0 + 1e-9, True),
        (float("nan"), float("nan"), True),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]), True),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 3j]), False),
        (torch.zeros(3), torch.zeros(3), True),
        (torch.zeros(0), torch.zeros(0), True),
    ],
)
def test_marks_tell_samples_apart_that_differ_in_more_than_rounding(one: Any, two: Any, same: bool) -> None:
    assert mark_of(one) and alike(mark_of(one), mark_of(two)) == same


# --- rows -----------------------------------------------------------------------------------------------


def test_rows_are_encoded_once_and_read_as_they_were() -> None:
    lines, rows = RowLines(), [{"epoch": 1, "loss": float("nan"), "lr": np.float32(0.5)}]
    for epoch in range(2, 5):
        text = lines.of(rows)
        assert [repr(row) for row in read_rows(text)] == [repr({**row, "lr": 0.5}) for row in rows]
        rows.append({"epoch": epoch, "loss": 0.1 + epoch, "lr": 0.5})
    other = [{"epoch": 9}]
    assert read_rows(lines.of(other)) == other and read_rows(lines.of([])) == []
    for damaged in (b"{", b"[1]\n", b"[" * 100_000):
        with pytest.raises(CheckpointError, match="an invalid row"):
            read_rows(damaged)
