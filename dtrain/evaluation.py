"""A finished run, used again: its net with its saved weights, evaluated or asked for predictions."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dtrain.checkpoint import load_weights
from dtrain.checkpoint.keeping import Keeping
from dtrain.config import Settings
from dtrain.config.schema import CheckpointConfig
from dtrain.errors import RecipeError, UsageError
from dtrain.inference import PredictStep, evaluate_task, predict
from dtrain.learning import Task
from dtrain.metrics import PassResult
from dtrain.progress import Progress, Silent, choose_progress
from dtrain.recipe import bind, load_recipe
from dtrain.run import agree
from dtrain.run_folder import CHECKPOINTS
from dtrain.seeding import seed_everything
from dtrain.world import World

Which = Literal["best", "last"]
Split = Literal["valid", "train"]


@dataclass(frozen=True)
class Restored:
    """A run's objects, with saved weights in the net.

    Attributes:
        task: the recipe's objects.
        predict_step: the recipe's own, or None.
        row: the history's row of the epoch whose weights these are.
        settings: the run's config.
    """

    task: Task
    predict_step: PredictStep | None
    row: dict[str, Any]
    settings: Settings


def restore_run(folder: Path, settings: Settings, which: Which, world: World) -> Restored:
    """Builds a run's objects and loads its weights, on every rank.

    Args:
        folder: the run's folder.
        settings: its config, as `load_run_settings` read it.
        which: the best epoch, as the run's `checkpoint.monitor` and `checkpoint.mode` say, or the last one.
        world: the ranks.

    Raises:
        AgreedError: it failed on some rank: no checkpoint, or weights that do not fit; every rank raises it.
    """
    return agree(world, lambda: _restored(folder, settings, which))


def _restored(folder: Path, settings: Settings, which: Which) -> Restored:
    path, row = find_checkpoint(folder, which, settings.config.checkpoint)
    seed_everything(settings.config.train.seed)
    recipe = load_recipe(settings.config.recipe, settings.base)
    task = bind(recipe, settings)
    load_weights(task.module, path)
    step = getattr(recipe.module, "predict_step", None)
    if step is not None and not callable(step):
        raise RecipeError(f"{recipe.path}: predict_step is {step!r}, not a function predict_step(model, features).")
    return Restored(task, step, row, settings)


def find_checkpoint(folder: Path, which: Which, policy: CheckpointConfig) -> tuple[Path, dict[str, Any]]:
    """Returns the folder of a run's saved epoch, and that epoch's row of the history.

    Args:
        folder: the run's.
        which: the best epoch, by the policy's monitor and mode, or the last one; this one too where none has a number.
        policy: of the run's config.

    Raises:
        UsageError: the run saved none.
    """
    keeping = Keeping(monitor=policy.monitor, mode=policy.mode)
    saved = keeping.chosen(folder / CHECKPOINTS, which) or keeping.chosen(folder / CHECKPOINTS, "last")
    if saved is None or saved.row is None:
        raise UsageError(f"{folder} has no checkpoint: the run ended before its first epoch did. Train it again.")
    return saved.path, saved.row


def evaluate_run(restored: Restored, world: World) -> PassResult:
    """Runs a restored run's validation once; the means equal the history's row of its epoch.

    Raises:
        UsageError: the recipe has no validation.
        StepError, DataError: as in training.
    """
    train = restored.settings.config.train
    return evaluate_task(
        restored.task,
        world,
        batch=train.batch,
        seed=train.seed,
        same_draws=train.same_draws,
        fetch_batches=train.fetch_batches,
        precision=train.precision,
        compile=train.compile,
        epoch=restored.row["epoch"],
        progress=_bar(restored, world),
    )


def predict_run(restored: Restored, world: World, split: Split = "valid") -> Any:
    """Returns a restored run's predictions for one of its two data sets, in the data's order, on every rank.

    Raises:
        UsageError: the recipe has no such loader.
        StepError, DataError: as in `dtrain.inference.predict`.
    """
    loader = restored.task.dl_valid if split == "valid" else restored.task.dl_train
    if loader is None:
        raise UsageError("the recipe has no validation data to predict. Add --data train to predict the training data.")
    train = restored.settings.config.train
    return predict(
        restored.task.module,
        loader,
        world,
        predict_step=restored.predict_step,
        batch=train.batch,
        batches=restored.task.batches,
        seed=train.seed,
        fetch_batches=train.fetch_batches,
        precision=train.precision,
        compile=train.compile,
        progress=_bar(restored, world),
    )


def _bar(restored: Restored, world: World) -> Progress:
    """A live bar on a terminal; elsewhere a pass of its own has nothing to say before its end."""
    if not sys.stdout.isatty():
        return Silent()
    return choose_progress(is_main=world.is_main, log_step_freq=1)
