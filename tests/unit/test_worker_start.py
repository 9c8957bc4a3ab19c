"""How DataLoader workers start: forked where nobody chose, as Python did before 3.14; and what others can import."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from dtrain.data.loader import ShardedLoader
from dtrain.data.partition import ShardSpec
from dtrain.errors import UsageError
from dtrain.launch.signals.stop_request import STOP_SIGNALS, StopRequest, hear_signals
from dtrain.recipe.loader import load_recipe

RECIPE = """
import os, sys

class Data:
    def __len__(self): return 2
    def __getitem__(self, index): return float(index)

def work():
    sys.exit(7)
"""


class Stream(IterableDataset[Any]):
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return (self.rows[index] for index in range(len(self.rows)))


class Blocked(Dataset[bool]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> bool:
        """Whether SIGTERM does not end this process by itself."""
        return signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.fixture
def newer_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.14's default, which nobody has asked for yet."""
    default: Any = multiprocessing.context._default_context
    monkeypatch.setattr(default, "_default_context", multiprocessing.get_context("forkserver"))
    monkeypatch.setattr(default, "_actual_context", None)


@pytest.fixture
def own_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Recipes that a test imports are gone after it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if "recipe" in name:
            del sys.modules[name]


def sharded(loader: DataLoader[Any]) -> ShardedLoader:
    return ShardedLoader(loader, ShardSpec(0, 1, "per_rank", fill=False), 5, "train")


@pytest.mark.parametrize("stream", [False, True])
def test_workers_are_forked_where_nobody_chose(newer_python: None, stream: bool) -> None:
    class Local(Dataset[int]):
        """Cannot be pickled, as forked workers need not."""

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> int:
            return os.getppid()

    data = Local()
    loader = DataLoader(Stream(data) if stream else data, batch_size=1, num_workers=1)
    for _ in range(2):  # the first time did not make a choice of it
        assert [int(rank_batch.batch) for rank_batch in sharded(loader).iter_batches(1)] == [os.getpid()] * 3
    assert loader.multiprocessing_context is None and multiprocessing.get_start_method(allow_none=True) is None


@pytest.mark.parametrize("stream", [False, True])
def test_workers_of_all_loaders_are_shielded(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr("dtrain.launch.signals.shield._obey_parent", lambda parent: None)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    hear_signals(StopRequest())
    try:
        data = Blocked()
        loader = DataLoader(Stream(data) if stream else data, batch_size=1, num_workers=1)
        assert [bool(rank_batch.batch) for rank_batch in sharded(loader).iter_batches(1)] == [True]
        assert loader.worker_init_fn is None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_choice_stands(newer_python: None) -> None:
    def way(loader: DataLoader[Any]) -> Any:
        return sharded(loader)._indexed._loader.multiprocessing_context  # type: ignore[union-attr]

    chosen = DataLoader([1, 2], num_workers=1, multiprocessing_context="spawn")  # type: ignore[arg-type]
    assert way(chosen).get_start_method() == "spawn"
    assert way(DataLoader([1, 2])) is None, "there are no workers"  # type: ignore[arg-type]
    multiprocessing.set_start_method("forkserver", force=True)
    assert way(DataLoader([1, 2], num_workers=1)) is None, "it is the user's, for all"  # type: ignore[arg-type]


def test_a_worker_that_is_not_forked_imports_a_recipe_with_a_hyphen(own_modules: None, tmp_path: Path) -> None:
    (tmp_path / "my-recipe.py").write_text(RECIPE)
    recipe = load_recipe("my-recipe.py", tmp_path)
    worker = multiprocessing.get_context("spawn").Process(target=recipe.module.work)
    worker.start()
    worker.join()
    assert worker.exitcode == 7
    sharded(DataLoader(recipe.module.Data(), num_workers=1, multiprocessing_context="spawn"))


@pytest.mark.parametrize("file", ["calendar.py", "recipe-0.1.py"])
@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_one_that_cannot_be_imported_is_refused_by_name(
    own_modules: None, tmp_path: Path, file: str, context: str
) -> None:
    (tmp_path / file).write_text(RECIPE)
    data = load_recipe(file, tmp_path).module.Data()
    told = rf"^the train loader's workers start by {context}, and so cannot find Data of the recipe {tmp_path / file}: "
    how: Any = {"num_workers": 1, "multiprocessing_context": context}
    for loader in (DataLoader(data, **how), DataLoader(Subset(data, [0]), **how), DataLoader(Stream(data), **how)):
        with pytest.raises(UsageError, match=told + ".*Rename the file.*multiprocessing_context='fork'"):
            sharded(loader)
    for loader in (DataLoader(data), DataLoader(Stream(data), num_workers=1), DataLoader([1, 2], **how)):  # type: ignore[arg-type]
        sharded(loader)
