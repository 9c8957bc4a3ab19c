"""The two calling forms of `KerasModel.fit`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.data.loader_group import Combine, grouped
from dtrain.engine.arguments import check_whole
from dtrain.engine.valid_loaders import first_loss
from dtrain.errors import UsageError
from dtrain.rundir.columns import Mode


@dataclass(frozen=True)
class FitPlan:
    """What both calling forms of `fit` come to."""

    epochs: int
    train_data: Any
    val_data: Any
    log_step_freq: int
    ckpt_path: str | Path | None
    patience: int | None
    monitor: str
    mode: Mode | None


def read_fit(args: tuple[Any, ...], kwargs: dict[str, Any]) -> FitPlan:
    """Tells the two calling forms apart and checks the values.

    Args:
        args, kwargs: those of `KerasModel.fit` that differ between the forms.

    Raises:
        UsageError: a value is wrong.
    """
    classic = "dl_train" in kwargs or (bool(args) and isinstance(args[0], int))
    plan = _classic_form(*args, **kwargs) if classic else _current_form(*args, **kwargs)
    check_whole(epochs=plan.epochs, log_step_freq=plan.log_step_freq)
    if plan.patience is not None:
        check_whole(patience=plan.patience)
    if plan.mode not in ("min", "max", None):
        raise UsageError(f'mode = {plan.mode!r}: should be "min" or "max".')
    if plan.monitor != "val_loss":
        return plan
    usual = "loss" if plan.val_data is None else first_loss(plan.val_data) or plan.monitor
    return FitPlan(**{**vars(plan), "monitor": usual})


def in_turn(train_data: Any, combine: Combine | None) -> Any:
    """Returns a mapping of training loaders as one, of loaders that take turns.

    Raises:
        UsageError: they are combined otherwise, for which the loss of features and labels has no place.
    """
    found = grouped(train_data, combine, where="KerasModel.fit")
    if combine not in (None, "alternate"):
        raise UsageError(
            f"KerasModel.fit with combine={combine!r}: a step would get a batch of each loader, and KerasModel's takes "
            "features and labels. Use combine='alternate', or dtrain.train_model with a train_step of your own."
        )
    return found


def _classic_form(  # noqa: PLR0913, PLR0917 - the calling form
    epochs: int,
    dl_train: Any,
    dl_val: Any = None,
    log_step_freq: int = 10,
    ckpt_path: str | Path | None = None,
    patience: int | None = None,
    monitor: str = "val_loss",
    mode: Mode | None = None,
) -> FitPlan:
    return FitPlan(epochs, dl_train, dl_val, log_step_freq, ckpt_path, patience, monitor, mode)


def _current_form(  # noqa: PLR0913, PLR0917 - the calling form
    train_data: Any,
    val_data: Any = None,
    epochs: int = 10,
    ckpt_path: str | Path | None = "checkpoint",
    patience: int | None = 5,
    monitor: str = "val_loss",
    mode: Mode | None = None,
    log_step_freq: int = 10,
) -> FitPlan:
    return FitPlan(epochs, train_data, val_data, log_step_freq, ckpt_path, patience, monitor, mode)
