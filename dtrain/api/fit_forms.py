"""The two calling forms of `KerasModel.fit`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.callbacks.progress.choose import can_display
from dtrain.data.loader_group import Combine, grouped
from dtrain.engine.arguments import check_switch, check_whole
from dtrain.engine.valid_loaders import first_loss
from dtrain.errors import UsageError, nearest
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
    form = _classic_form if classic else _current_form
    _check_names(form, args, kwargs)
    plan = form(*args, **kwargs)
    for name, data in (("train_data", plan.train_data), ("val_data", plan.val_data)):
        if type(data).__module__.partition(".")[0] in ("torch", "numpy", "pandas") and hasattr(data, "shape"):
            raise UsageError(
                f"{name} is a {type(data).__name__}: should be a loader of batches. Wrap the features and labels: "
                "DataLoader(TensorDataset(features, labels), batch_size=32, shuffle=True)."
            )
    check_whole(epochs=plan.epochs, log_step_freq=plan.log_step_freq)
    if plan.patience is not None:
        check_whole(patience=plan.patience)
    if plan.mode not in ("min", "max", None):
        raise UsageError(f'mode = {plan.mode!r}: should be "min" or "max".')
    if plan.monitor != "val_loss":
        return plan
    usual = "loss" if plan.val_data is None else first_loss(plan.val_data) or plan.monitor
    return FitPlan(**{**vars(plan), "monitor": usual})


def given_to_fit(names: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of fit that have one name in all styles, out of all its local names."""
    return {name: value for name, value in names.items() if name not in ("self", "args", "kwargs", "plot", "quiet")}


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


# Arguments of fit elsewhere (torchkeras, Keras, Lightning) -> what does it here.
_ELSEWHERE = {
    "wandb": 'pass run="runs/first", config={"track.wandb.project": "NAME"}.',
    "mixed_precision": 'pass precision="bf16" or "fp16".',
    "gradient_accumulation_steps": "pass accumulation=N.",
    "validation_data": "pass val_data=.",
    "x": "pass train_data=, a DataLoader of features and labels.",
    "y": "the labels come with the batches: DataLoader(TensorDataset(x, y), batch_size=32).",
    "shuffle": "it is the DataLoader's: DataLoader(dataset, batch_size=32, shuffle=True).",
    "validation_split": "split the dataset: torch.utils.data.random_split; pass val_data=.",
    "lr": "it is the optimizer's: compile(optimizer=torch.optim.Adam(net.parameters(), lr=...)).",
    "device": "a GPU is used where there is one; cpu=True trains on the CPU.",
    "steps_per_epoch": "pass epoch_steps=N.",
    "initial_epoch": 'pass run="runs/first": the same call then resumes.',
}


def _check_names(form: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses an argument that there is not, or one too few or given twice, with what does it here."""
    takes = inspect.signature(form)
    for name in kwargs:
        if name not in takes.parameters:
            near = nearest(name, [*takes.parameters, "plot", "quiet", "verbose", "callbacks", "run"])
            remedy = f" Instead, {_ELSEWHERE[name]}" if name in _ELSEWHERE else near
            raise UsageError(f"KerasModel.fit has no argument {name!r} in this calling form.{remedy}")
    try:
        takes.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(
            f"KerasModel.fit: {error}. Call fit(train_data, val_data, epochs=10), or fit(epochs, dl_train, dl_val)."
        ) from None


def shown(verbose: Any, plot: bool | None, quiet: bool | None) -> Any:
    """Returns `verbose` as the arguments `plot` and `quiet`, which others have, would have it.

    Raises:
        UsageError: one of them is neither True nor False, or both speak of what is to be shown otherwise.
    """
    given = {name: value for name, value in (("plot", plot), ("quiet", quiet)) if value is not None}
    check_switch(**given)
    if given and verbose is not True:
        raise UsageError(
            f"{next(iter(given))} = {next(iter(given.values()))} and verbose = {verbose!r}: pass only one."
        )
    if quiet:
        return False
    if plot is False and can_display():
        from dtrain.callbacks.progress.notebook import NotebookView

        return NotebookView(curves=False)
    return verbose


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
