"""A finished run, used again: its net with its saved weights, evaluated or asked for predictions."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dtrain.callbacks.progress import choose_progress
from dtrain.checkpoint import load_weights
from dtrain.checkpoint.retention import RetentionPolicy
from dtrain.config import Settings
from dtrain.config.schema import CheckpointConfig
from dtrain.distributed.seeding import seed_everything
from dtrain.distributed.world import World
from dtrain.engine.callback import EngineCallback
from dtrain.engine.metrics import PassResult
from dtrain.engine.options import RunOptions
from dtrain.engine.predict import PredictStep, evaluate_task, predict
from dtrain.engine.train_step import Task
from dtrain.errors import RecipeError, UsageError
from dtrain.layout import CHECKPOINTS
from dtrain.recipe.loader import bind, load_recipe
from dtrain.trainer.agreed import agree

Which = Literal["best", "last"]
Split = Literal["valid", "train"]


@dataclass(frozen=True)
class RestoredRun:
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


def restore_run(folder: Path, settings: Settings, which: Which, world: World) -> RestoredRun:
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


def _restored(folder: Path, settings: Settings, which: Which) -> RestoredRun:
    path, row = find_checkpoint(folder, which, settings.config.checkpoint)
    seed_everything(settings.config.train.seed)
    recipe = load_recipe(settings.config.recipe, settings.base)
    task = bind(recipe, settings)
    load_weights(task.module, path)
    step = getattr(recipe.module, "predict_step", None)
    if step is not None and not callable(step):
        raise RecipeError(f"{recipe.path}: predict_step is {step!r}, not a function predict_step(model, features).")
    return RestoredRun(task, step, row, settings)


def find_checkpoint(folder: Path, which: Which, policy: CheckpointConfig) -> tuple[Path, dict[str, Any]]:
    """Returns the folder of a run's saved epoch, and that epoch's row of the history.

    Args:
        folder: the run's.
        which: the best epoch, by the policy's monitor and mode, or the last one; this one too where none has a number.
        policy: of the run's config.

    Raises:
        UsageError: the run saved none.
    """
    keeping = RetentionPolicy(monitor=policy.monitor, mode=policy.mode)
    saved = keeping.chosen(folder / CHECKPOINTS, which) or keeping.chosen(folder / CHECKPOINTS, "last")
    if saved is None or saved.row is None:
        raise UsageError(
            f"{folder} has no checkpoint: the run stopped before the end of its first epoch. Train it again."
        )
    return saved.path, saved.row


def evaluate_run(restored: RestoredRun, world: World) -> PassResult:
    """Runs a restored run's validation once; the means equal the history's row of its epoch.

    Raises:
        UsageError: the recipe has no validation.
        StepError, DataError: as in training.
    """
    options = RunOptions.of(dict(restored.settings.config.train))
    row = restored.row
    return evaluate_task(restored.task, world, options, epoch=row["epoch"], progress=_bar(restored, world))


def predict_run(restored: RestoredRun, world: World, split: Split = "valid") -> Any:
    """Returns a restored run's predictions for one of its two data sets, in the data's order, on every rank.

    Raises:
        UsageError: the recipe has no such loader.
        StepError, DataError: as in `dtrain.engine.predict.predict`.
    """
    loader = restored.task.dl_valid if split == "valid" else restored.task.dl_train
    if loader is None:
        raise UsageError("the recipe has no validation data to predict. Use --data train to predict the training data.")
    return predict(
        restored.task.module,
        loader,
        world,
        RunOptions.of(dict(restored.settings.config.train)),
        predict_step=restored.predict_step,
        batches=restored.task.batches,
        progress=_bar(restored, world),
    )


def _bar(restored: RestoredRun, world: World) -> EngineCallback | None:
    """A live bar on a terminal; elsewhere a pass of its own has nothing to say before its end."""
    if not sys.stdout.isatty():
        return None
    return choose_progress(is_main=world.is_main, log_step_freq=1)
