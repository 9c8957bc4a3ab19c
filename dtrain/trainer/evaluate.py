"""A finished run, used again: its net with its saved weights, evaluated or asked for predictions."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dtrain.callbacks.progress import choose_progress
from dtrain.checkpoint.chosen import choose_checkpoint
from dtrain.checkpoint.folder import Saved
from dtrain.checkpoint.restored import restore_net
from dtrain.config import Settings
from dtrain.config.recipe_file import WHERE_NOW, locate
from dtrain.data.loader_group import train_by_name
from dtrain.distributed.seeding import seed_everything
from dtrain.distributed.world import World
from dtrain.engine.callback import EngineCallback
from dtrain.engine.metrics import PassResult
from dtrain.engine.options import RunOptions
from dtrain.engine.predict import PredictStep, evaluate_task, predict
from dtrain.engine.train_step import Task
from dtrain.engine.valid_loaders import by_name
from dtrain.errors import RecipeError, UsageError, nearest
from dtrain.layout import CONFIG
from dtrain.recipe.loader import bind, load_recipe
from dtrain.trainer.agreed import agree
from dtrain.trainer.classes import BUILDER, classes_of
from dtrain.trainer.initial import base_of_run

Split = Literal["valid", "train"]


@dataclass(frozen=True)
class RestoredRun:
    """A run's objects, with saved weights in the net.

    Attributes:
        task: the recipe's objects.
        predict_step: the recipe's own, or None.
        saved: the checkpoint whose weights these are.
        settings: the run's config.
        classes: the names of the classes that the net tells apart, where the recipe says them.
    """

    task: Task
    predict_step: PredictStep | None
    saved: Saved
    settings: Settings
    classes: list[str] | None = None

    @property
    def where(self) -> str:
        """When the weights were saved, in words."""
        return f"epoch {self.saved.epoch}" + (f", step {self.saved.step}" if self.saved.step is not None else "")


def restore_run(folder: Path, settings: Settings, which: str, world: World) -> RestoredRun:
    """Builds a run's objects and loads its weights, on every rank.

    Args:
        folder: the run's folder.
        settings: its config, as `load_run_settings` read it.
        which: "best" epoch, as the run's `checkpoint.monitor` and `checkpoint.mode` say, or the "last" one; or a
            checkpoint's name.
        world: the ranks.

    Raises:
        AgreedError: it failed on some rank: no checkpoint, or weights that do not fit; every rank raises it.
    """
    # Rank 0 chooses for all: a run that trains meanwhile may save another one at any moment.
    policy = settings.config.checkpoint
    chosen = agree(world, lambda: choose_checkpoint(folder, which, policy).path.name if world.is_main else None)
    name = world.gather_json(chosen)[0]
    return agree(world, lambda: _restored(folder, settings, name))


def _restored(folder: Path, settings: Settings, name: str) -> RestoredRun:
    saved = choose_checkpoint(folder, name)
    seed_everything(settings.config.train.seed)
    try:
        locate(settings.config.recipe, settings.base)
    except RecipeError as error:
        raise RecipeError(f"{folder / CONFIG}: {error}{WHERE_NOW}") from None
    recipe = load_recipe(settings.config.recipe, settings.base)
    task = bind(recipe, settings, base_of_run(folder, settings))
    restore_net(task.module, saved.path)
    step = getattr(recipe.module, "predict_step", None)
    if step is not None and not callable(step):
        raise RecipeError(f"{recipe.path}: predict_step is {step!r}, not a function predict_step(model, features).")
    classes = classes_of(getattr(recipe.module, BUILDER, None), recipe.path, task.dl_train)
    return RestoredRun(task, step, saved, settings, classes)


def evaluate_run(restored: RestoredRun, world: World) -> PassResult:
    """Runs a restored run's validation once; the means equal the history's row of its epoch.

    Raises:
        UsageError: the recipe has no validation.
        StepError, DataError: as in training.
    """
    options = RunOptions.of(dict(restored.settings.config.train))
    return evaluate_task(restored.task, world, options, epoch=restored.saved.epoch, progress=_bar(restored, world))


def chosen_loader(restored: RestoredRun, split: Split, name: str | None) -> tuple[str, Any]:
    """Returns a loader of a restored run's recipe, and its name; "" is that of a sole one.

    Args:
        restored: the run.
        split: which of the two data sets.
        name: of several validation loaders; None for the first.

    Raises:
        UsageError: the recipe has no such loader.
    """
    loaders = train_by_name(restored.task.dl_train) if split == "train" else by_name(restored.task.dl_valid)
    if not loaders:
        raise UsageError("the recipe has no validation data to predict. Use --data train to predict the training data.")
    if name is not None and name not in loaders:
        there = f"they are {', '.join(loaders)}" if "" not in loaders else "there is one, without a name"
        raise UsageError(
            f"--loader {name}: the {split} data has no loader of this name; {there}.{nearest(name, loaders)}"
        )
    name = next(iter(loaders)) if name is None else name
    return name, loaders[name]


def predict_run(restored: RestoredRun, world: World, split: Split = "valid", name: str | None = None) -> Any:
    """Returns a restored run's predictions for one of its two data sets, in the data's order, on every rank.

    Args:
        restored: the run.
        world: the ranks.
        split: which of the two data sets.
        name: of several validation loaders; None for the first.

    Raises:
        UsageError: the recipe has no such loader.
        StepError, DataError: as in `dtrain.engine.predict.predict`.
    """
    _, loader = chosen_loader(restored, split, name)
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
