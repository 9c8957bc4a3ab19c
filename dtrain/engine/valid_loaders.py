"""Several validation loaders: a mapping of names to loaders in place of one, with columns such as val_NAME_loss."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import DataLoader

from dtrain.data.loader_group import LoaderGroup, train_by_name
from dtrain.distributed.consistency import batches_alike, check_takes
from dtrain.errors import UsageError
from dtrain.rundir.columns import VALID, mode_of, sure_mode_of

LOADER_NAME = "loader_name"  # the parameter of a step that gets the name
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def by_name(dl_valid: Any) -> dict[str, Any]:
    """Returns the validation loaders by name; "" is the name of a sole one. None is none.

    Raises:
        UsageError: a name makes no good column name, or there is no loader where one should be.
    """
    if dl_valid is None:
        return {}
    if isinstance(dl_valid, (list, tuple)) and dl_valid and isinstance(dl_valid[0], DataLoader):
        raise UsageError(
            f"the validation loaders are a {type(dl_valid).__name__} of {len(dl_valid)}. Give each a name, which its "
            'columns begin with: {"easy": dl_easy, "hard": dl_hard}.'
        )
    if not isinstance(dl_valid, Mapping):
        return {"": dl_valid}
    if not dl_valid:
        raise UsageError("the mapping of validation loaders is empty. Without validation it should be None.")
    for name, loader in dl_valid.items():
        _check_name(name)
        if loader is None:
            raise UsageError(f"the validation loader {name!r} is None. Remove it from the mapping.")
    return dict(dl_valid)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise UsageError(
            f"{name!r} is the name of a validation loader, and begins the names of columns, as in {VALID}easy_loss: "
            "it should be made of letters, digits, '_', '-' and '.', and begin with a letter or digit."
        )
    if sure_mode_of(name) is not None or mode_of(name) == "min":
        raise UsageError(
            f"the validation loader's name {name!r} has a word of a metric, by which dtrain tells whether lower or "
            f"higher is better: of {VALID}{name}_... it could not. Choose another name, such as 'easy'."
        )


def split_of(name: str) -> str:
    """Returns what a validation loader is called in messages and checkpoints: "valid", or "valid.NAME"."""
    return f"valid.{name}" if name else "valid"


def column_of(name: str, value: str) -> str:
    """Returns what a value is called without "val_": its own name, or LOADER_NAME_VALUE."""
    return f"{name}_{value}" if name else value


def first_loss(dl_valid: Any) -> str | None:
    """Returns the column that is monitored by default: the first of several loaders' loss; None for a sole one."""
    if not isinstance(dl_valid, Mapping):
        return None
    return next((f"{VALID}{column_of(name, 'loss')}" for name in by_name(dl_valid)), None)


def named_step(step: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Returns a step that gets the loader's name, where it has a parameter for it; else the step itself."""
    try:
        signature = inspect.signature(step)
    except (TypeError, ValueError):  # a builtin or the like
        return step
    if not name or LOADER_NAME not in signature.parameters:
        return step

    @functools.wraps(step)
    def bound(*arguments: Any) -> Any:
        return step(*arguments, **{LOADER_NAME: name})

    left = [parameter for key, parameter in signature.parameters.items() if key != LOADER_NAME]
    bound.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
    return bound


def train_steps(step: Callable[..., Any], dl_train: Any) -> dict[str, Callable[..., Any]]:
    """Returns the train step by the name of the loader that a batch is of, where several take turns; "" is no name."""
    names = train_by_name(dl_train) if isinstance(dl_train, LoaderGroup) and dl_train.combine == "alternate" else ()
    return {"": step} | {name: named_step(step, name) for name in names}


def check_valid_takes(step: Callable[..., Any] | None, dl_train: Any, dl_valid: Any, batch: Any) -> None:
    """Checks that a valid step can be called with a training batch, where a validation loader's are known to be alike.

    Raises:
        StepError: its parameters do not fit the batch's parts.
    """
    for name, loader in by_name(dl_valid).items():
        if step is not None and batches_alike(dl_train, loader):
            check_takes(named_step(step, name), batch, "valid")
