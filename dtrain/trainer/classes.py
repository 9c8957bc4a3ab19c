"""Predictions of a net that tells classes apart: each sample's label and the classes' probabilities.

A recipe names the classes with `build_classes()`; `dtrain predict` then writes them beside each other.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain.errors import RecipeError, StepError

BUILDER = "build_classes"
_LOGITS, _PROBABILITIES = "logits", "probabilities"
_SUM = 1e-3  # rows of probabilities add up to 1 within this; in bfloat16 they may miss it by more
_FORMS = f'Return {{"{_LOGITS}": ...}} or {{"{_PROBABILITIES}": ...}} from predict_step, with a column per class'


def classes_of(build: Any, path: Path, dl_train: Any) -> list[str] | None:
    """Returns the names of the classes, in the order of the net's outputs; None where a recipe says nothing of them.

    Args:
        build: the recipe's `build_classes`, or None. It takes nothing, or the training loader.
        path: of the recipe.
        dl_train: the training loader.

    Raises:
        RecipeError: it is no such function, or returns something else than two or more different names.
    """
    if build is None:
        return None
    if not callable(build):
        raise RecipeError(f"{path}: {BUILDER} is {build!r}, not a function. Write def {BUILDER}(): return [...].")
    needed = [p for p in inspect.signature(build).parameters.values() if p.default is p.empty and p.kind < 2]
    if len(needed) > 1:
        raise RecipeError(
            f"{path}: {BUILDER} takes nothing, or the training loader: {BUILDER}() or {BUILDER}(dl_train)."
        )
    built = build(dl_train) if needed else build()
    if isinstance(built, (str, bytes, Mapping)) or not hasattr(built, "__iter__"):
        raise RecipeError(f"{path}: {BUILDER} returned {built!r}. Return a list of names, one per class.")
    names = [str(name) for name in built]
    if len(names) < 2 or len(set(names)) < len(names):
        raise RecipeError(f"{path}: {BUILDER} returned {names}: needs two or more names, each once.")
    return names


def with_labels(predictions: Any, classes: list[str], *, ending: str) -> Any:
    """Returns what is written of a classifier's predictions.

    Args:
        predictions: a tensor (samples, classes) of logits, as nets return it; or a mapping with such a tensor as
            `logits` or `probabilities`, whose other parts are written after them.
        classes: their names.
        ending: of the file; ".npy" holds the probabilities alone.

    Returns:
        a list with a mapping for each sample: `label` (None where the net returned NaN), `probability` (of that
        label), and `probability_NAME` of each class; or the probabilities, (samples, classes).

    Raises:
        StepError: the predictions have another form, or are no probabilities.
    """
    probabilities, rest = _probabilities(predictions, classes)
    if ending == ".npy":
        return probabilities
    best = probabilities.argmax(dim=1).tolist()
    rows = probabilities.tolist()
    columns = [f"probability_{one}" for one in classes]
    return [
        {
            "label": classes[index] if math.isfinite(row[index]) else None,  # of NaN there is no highest
            "probability": row[index],
            **dict(zip(columns, row, strict=True)),
            **{key: part[number] for key, part in rest.items()},
        }
        for number, (index, row) in enumerate(zip(best, rows, strict=True))
    ]


def _probabilities(predictions: Any, classes: list[str]) -> tuple[Tensor, dict[str, Any]]:
    """Returns the probabilities in float32, and the other parts of a mapping."""
    given, rest, found = _LOGITS, {}, predictions
    if isinstance(predictions, Mapping):
        there = [key for key in (_LOGITS, _PROBABILITIES) if key in predictions]
        if len(there) != 1:
            raise StepError(f"{_said(classes)}, but predict_step returned {', '.join(predictions)}. {_FORMS}.")
        given = there[0]
        found = predictions[given]
        rest = {key: part for key, part in predictions.items() if key != given}
    if not isinstance(found, Tensor) or found.ndim != 2 or found.shape[1] != len(classes):
        shape = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        binary = " Of one output, z: torch.stack([torch.zeros_like(z), z], 1) are the logits." * (len(classes) == 2)
        raise StepError(f"{_said(classes)}, but the predictions are {shape}. {_FORMS}.{binary}")
    values = found.float()
    adds_up = bool((values >= 0).all()) and bool(((values.sum(dim=1) - 1).abs() < _SUM).all())
    if given == _PROBABILITIES and bool(((values < 0) | (values > 1 + _SUM)).any()):
        raise StepError(f'predict_step returned "{_PROBABILITIES}" below 0 or above 1. {_FORMS}.')
    if found is predictions and adds_up:
        raise StepError(
            f"{_said(classes)}, and each row of the predictions adds up to 1, so they look like probabilities, of "
            f"which the softmax would be wrong. {_FORMS}."
        )
    return (torch.softmax(values, dim=1) if given == _LOGITS else values), rest


def _said(classes: list[str]) -> str:
    return f"{BUILDER} names {len(classes)} classes"
