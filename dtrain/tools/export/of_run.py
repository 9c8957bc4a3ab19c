"""A run's net, exported: built by its recipe, called as its own step calls it, compared on its validation data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from dtrain.config import Settings
from dtrain.data.batches import BatchReader
from dtrain.data.dataloaders import in_data_order
from dtrain.distributed.world import World
from dtrain.engine.predict import features_of
from dtrain.engine.step_contract import call_step
from dtrain.engine.valid_loaders import named_step
from dtrain.errors import DataError, UsageError, nothing_yielded
from dtrain.tools.export.checked import Exported, export_net
from dtrain.tools.export.formats import Format
from dtrain.tools.export.model_call import ModelCall, recorded_call
from dtrain.trainer.evaluate import RestoredRun, Split, chosen_loader, restore_run
from dtrain.trainer.load import built_net

RECOMPUTED = "train.activation_checkpointing=[]"  # of the run's values the one that changes how its net is traced


def export_run(  # noqa: PLR0913 - keyword-only after the run and its config
    folder: Path,
    settings: Settings,
    which: str,
    world: World,
    *,
    file: Path,
    kind: Format,
    force: bool,
    tolerance: float,
) -> tuple[Exported, RestoredRun]:
    """Writes a run's net to a file; see `export_net`.

    Args:
        folder: the run's.
        settings: its config, with `RECOMPUTED`.
        which: "best", "last" or a checkpoint's name.
        world: of one rank, on the CPU.
        file, kind, force, tolerance: as for `export_net`.

    Returns:
        what was written, and the run.

    Raises:
        DtrainError: as `restore_run` and `export_net`.
    """
    restored = restore_run(folder, settings, which, world)

    def fresh() -> nn.Module:
        return built_net(settings, folder)

    call = _call_of(restored, kind)
    how = {"kind": kind, "fresh": fresh, "force": force, "tolerance": tolerance}
    return export_net(restored.task.module, call, file, **how), restored  # type: ignore[arg-type]


def _call_of(restored: RestoredRun, kind: Format) -> ModelCall | None:
    """Returns how the net is called for the first batch of the validation data; without any, of the training data.

    Where that is unknown, None for a file that needs not know it.
    """
    task = restored.task
    split: Split = "valid" if task.dl_valid is not None else "train"
    name, loader = chosen_loader(restored, split, None)
    batch = next(iter(in_data_order(loader)), None)
    if batch is None:
        raise DataError(nothing_yielded(split))
    net = task.module.eval()
    size = _samples(task.batches, batch, split)
    step, called = _step_of(restored, name, batch)
    try:
        return recorded_call(net, step, called, size, batched=kind.is_program)
    except UsageError:
        if kind.is_program:
            raise
        return None


def _step_of(restored: RestoredRun, loader_name: str, batch: Any) -> tuple[Callable[[], Any], str]:
    """Returns the recipe's step that says how the net is called, and its name."""
    task, predict = restored.task, restored.predict_step
    net = task.module
    if predict is not None:
        return lambda: predict(net, features_of(batch)), "predict_step"
    if task.valid_step is None:
        return lambda: call_step(task.train_step, net, batch), "train_step"
    validate = named_step(task.valid_step, loader_name)
    return lambda: call_step(validate, net, batch), "valid_step"


def _samples(functions: Any, batch: Any, split: str) -> int | None:
    """The batch's number of samples; None where nothing says it, and the first tensor's length has to."""
    try:
        return BatchReader(functions, split=split).size_of(batch)
    except DataError:
        return None
