"""The recipes of docs/gallery and their plain loops: how each is run, small or as it is, and what a run comes to."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from dtrain.config import load_settings
from dtrain.distributed.seeding import derive
from dtrain.distributed.world import World
from dtrain.layout import CHECKPOINTS
from dtrain.rundir.columns import TIMES
from dtrain.rundir.history import read_history
from dtrain.trainer import train
from dtrain.trainer.evaluate import evaluate_run, predict_run, restore_run

GALLERY = Path(__file__).parents[2] / "docs" / "gallery"
SEED = 42  # train.seed's default, and that of the plain loops


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe of the gallery.

    Attributes:
        words: what its page's command sets, besides `epochs`.
        epochs: the plain loop's own number of epochs.
        small: arguments of the plain loop for a short run; those of the recipe are the same, or `words_small`.
        sharded: whether each rank reads its part of a stream, so that the batch size is a rank's.
        needs: packages that dtrain does not install.
    """

    words: tuple[str, ...] = ()
    epochs: int = 8
    small: dict[str, Any] = dataclasses.field(default_factory=lambda: {"samples": 80, "batch_size": 20})
    words_small: tuple[str, ...] | None = None
    sharded: bool = False
    needs: tuple[str, ...] = ()

    def small_words(self, ranks: int) -> list[str]:
        """The words of a short run, of two epochs."""
        given = [f"data.{name}={value}" for name, value in self.small.items()]
        words = [*self.words, *(given if self.words_small is None else self.words_small)]
        return [*(word.replace("PART", str(24 // ranks)) for word in words), "epochs=2"]

    def full_words(self, ranks: int, folder: str) -> list[str]:
        """The words of a run of the recipe as it is; a stream's batches are parts of the plain loop's."""
        more = [f"data.batch_size={32 // ranks}"] if self.sharded else []
        return [*self.words, *more, f"epochs={self.epochs}"]

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


BATCH, NORM = "train.batch=global", "train.sync_batchnorm=true"
CASES = {
    "language_model": Case((BATCH,), 5),
    "lora": Case((BATCH, "checkpoint.weights=trained"), 4, needs=("transformers", "peft")),
    "images": Case((BATCH, NORM, "train.ema_decay=0.98"), 8),
    "gan": Case((BATCH, NORM), 20),
    "contrastive": Case((BATCH,), 10),
    "tagging": Case((BATCH,), 6),
    "stream": Case(
        ("train.epoch_steps=100",),
        8,
        small={"epoch_steps": 3, "batch_size": 24},
        words_small=("train.epoch_steps=3", "data.batch_size=PART"),
        sharded=True,
    ),
    "shards": Case((), 6, {"samples": 250, "workers": 0, "batch_size": 24}, sharded=True),
    "distillation": Case(
        (BATCH, "checkpoint.weights=trained", "checkpoint.monitor=val_accuracy"),
        8,
        {"samples": 80, "batch_size": 20, "steps": 5},
        ("data.samples=80", "data.batch_size=20", "model.steps=5"),
    ),
    "multitask": Case((BATCH,), 10, {"samples": 100}),
    "detection": Case((BATCH,), 8, {"samples": 24, "batch_size": 8}),
    "callbacks": Case((BATCH, "early_stopping.monitor=val_kappa", "early_stopping.target=0.95"), 10),
}


def copy_double(folder: Path) -> None:
    """Writes copies of all files in double precision, in which rounding hides nothing."""
    for path in GALLERY.glob("*.py"):
        head, mark, rest = path.read_text(encoding="utf-8").partition("import torch\n")
        rest = rest.replace("torch.float32", "torch.float64")
        (folder / path.name).write_text(f"{head}{mark}torch.set_default_dtype(torch.float64)\n{rest}", encoding="utf-8")


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Puts back what a file of the gallery changes in its process."""
    path, folder, dtype = list(sys.path), Path.cwd(), torch.get_default_dtype()
    try:
        yield
    finally:
        sys.path[:] = path
        os.chdir(folder)
        torch.set_default_dtype(dtype)
        for name in [name for name in sys.modules if name.endswith("_data") and name.split("_")[0] in CASES]:
            del sys.modules[name]


class StepSeeds(DataLoader):  # type: ignore[type-arg]
    """A plain loop's DataLoader, with torch's generator seeded before each step as dtrain seeds it."""

    split = "train"  # of the next loader; a loop makes the train loader first

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._seeds, self._passes = type(self).split, 0
        type(self).split = "valid"

    def __iter__(self) -> Iterator[Any]:
        self._passes += 1
        return self._seeded(super().__iter__())

    def _seeded(self, batches: Iterator[Any]) -> Iterator[Any]:
        base, start = derive(SEED, "random", self._seeds, self._passes), 0
        for batch in batches:
            torch.manual_seed(base + start)
            yield batch
            first = next(iter(batch.values())) if isinstance(batch, dict) else batch
            start += len(first if isinstance(first, torch.Tensor) else first[0])


def merged(ranks: int) -> Any:
    """A plain loop's DataLoader of shards, whose k-th batch has the k-th batches of so many ranks.

    A rank's part of the shards is what a worker's would be.
    """

    class Merged(DataLoader):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Any]:
            if not self.dataset.shuffle:
                return super().__iter__()
            known, parts = type(self.dataset).__iter__.__globals__, []
            for rank in range(ranks):
                known["get_worker_info"] = lambda rank=rank: SimpleNamespace(id=rank, num_workers=ranks)
                parts.append(list(self.dataset))
            known["get_worker_info"] = lambda: None
            size = self.batch_size
            together = ([row for part in parts for row in part[k : k + size]] for k in itertools.count(0, size))
            return map(default_collate, itertools.takewhile(bool, together))

    return Merged


def plain_rows(files: Path, name: str, folder: Path, loader: Any = StepSeeds, **small: Any) -> list[dict[str, Any]]:
    """Runs a plain loop in a folder of its own, and returns its history."""
    with _restored():
        sys.path.insert(0, str(files))
        module = ModuleType(f"{name}_plain")
        exec(compile((files / f"{name}_plain.py").read_text(), f"{name}_plain.py", "exec"), vars(module))  # noqa: S102
        loader.split = "train"
        module.DataLoader = loader  # type: ignore[attr-defined]
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        return [dict(row) for row in module.main(**small)]


def train_once(world: World, files: Path, name: str, folder: Path, words: list[str]) -> dict[str, Any]:
    """Trains a recipe on this rank, or goes on with what is in the folder; evaluates it and predicts with it."""
    with _restored():
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)  # where a recipe writes the data that it makes
        settings = load_settings(str(files / f"{name}.py"), [*words, f"run.dir={folder}", "run.name=it"], {})
        train.train_run(settings, world)
        restored = restore_run(folder / "it", settings, "last", world)
        evaluated, predicted = evaluate_run(restored, world), predict_run(restored, world)
    rows = read_history(folder / "it").drop(columns=list(TIMES), errors="ignore").to_dict("records")
    return {
        "rows": rows,
        "evaluated": dict(evaluated.means),
        "predicted": json.loads(json.dumps(predicted, default=_listed)),
    }


def _listed(value: Any) -> Any:
    return value.tolist()


def train_and_die(world: World, files: Path, name: str, folder: Path, words: list[str], steps: int) -> None:
    """Trains, and all ranks die of SIGKILL as they begin train step `steps` + 1 of the run."""
    load = train.load_task
    counted = itertools.count(1)

    def loaded(*arguments: Any) -> Any:
        task = load(*arguments)

        @functools.wraps(task.train_step)
        def step(*batch: Any, **options: Any) -> Any:
            if next(counted) > steps:
                os.kill(os.getpid(), signal.SIGKILL)
            return task.train_step(*batch, **options)

        return dataclasses.replace(task, train_step=step)

    train.load_task = loaded
    train_once(world, files, name, folder, words)


def checkpoints(folder: Path) -> list[str]:
    """The names of a run's checkpoints."""
    return sorted(path.name for path in (folder / "it" / CHECKPOINTS).iterdir())
