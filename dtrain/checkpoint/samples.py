"""Marks of the data, by which a run is known to be resumed on the data that it began with: of some samples, and of
what lies in memory as tensors, whole (`dtrain.checkpoint.tensor_marks`).

Numbers are compared within a thousandth: another processor or version of a library may decode an image, or resize it,
a little differently. What two readings with other random numbers give differently is left out. A mark does not show
what is in a sample: it is a norm, and sums with random signs.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtrain.checkpoint.tensor_marks import tensor_marks
from dtrain.config import Settings
from dtrain.config.calls import ACCEPT, is_call, way
from dtrain.data.loader_group import train_splits
from dtrain.data.reading import read_again, read_some
from dtrain.engine.loop import Engine
from dtrain.engine.valid_loaders import by_name, split_of
from dtrain.errors import UsageError

logger = logging.getLogger(__name__)

Mark = list[Any]

_COUNT = 32  # samples of each loader
_TENSORS = " tensors"  # follows the split's name
_SUMS = 3
_MOST_NAMED = 8
_MOST_VALUES = 1 << 16  # of a tensor, taken at equal distances
_CLOSE = 1e-3
_TIMES = 8  # that a sample which seems to have changed is read again


def data_marks(engine: Engine) -> dict[str, dict[str, Mark]]:
    """Returns the marks of the training and validation data.

    Returns:
        split -> index of a sample -> mark, and "SPLIT tensors" -> name -> mark.
    """
    found = {}
    for split, loader in _loaders(engine).items():
        found[split] = _marks(loader, engine.options.seed)
        found[f"{split}{_TENSORS}"] = _whole(loader)
    return found


def _whole(loader: Any) -> dict[str, Mark]:
    try:
        return tensor_marks(loader)
    except Exception as error:  # noqa: BLE001 - of a kind of tensor of the user's
        logger.info("the data is not compared whole when the run is resumed: %r", error)
        return {}


def _marks(loader: Any, seed: int) -> dict[str, Mark]:
    try:
        pairs = {i: [mark_of(sample) for sample in both] for i, both in read_some(loader, _COUNT, seed).items()}
    except Exception as error:  # noqa: BLE001 - of the user's objects, which a training step may never meet
        logger.info("the data is not compared when the run is resumed: %r", error)
        return {}
    return {index: one for index, (one, two) in pairs.items() if one and alike(one, two)}


def data_differences(there: Mapping[str, Any], here: Mapping[str, Any], engine: Engine) -> list[str]:
    """Returns, in words, what of the data is not what it was.

    Args:
        there: what `data_marks` returned as the run began.
        here: what it returns now.
        engine: whose loaders were read.
    """
    found = []
    for split, loader in _loaders(engine).items():
        marks, before = here.get(split, {}), there.get(split, {})
        other = [i for i, mark in marks.items() if i in before and not alike(mark, before[i])]
        changed = [index for index in other if _is_steady(loader, index, marks[index])]
        if changed:
            compared = sum(index in before for index in marks)
            shown = f"{len(changed)} of {compared} compared"
            found.append(f"{split} samples {_named(sorted(changed, key=int))} have other values ({shown})")
        found += _tensor_differences(split, there, here)
    return found


def _tensor_differences(split: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    marks, before = here.get(f"{split}{_TENSORS}", {}), there.get(f"{split}{_TENSORS}", {})
    other = [name for name, mark in marks.items() if name in before and not alike(mark, before[name])]
    return [f"{split} data: {_named(other)} has other values, somewhere"] if other else []


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMED]) + ", ..." * (len(names) > _MOST_NAMED)


def _loaders(engine: Engine) -> dict[str, Any]:
    return train_splits(engine.task.dl_train) | {
        split_of(name): loader for name, loader in by_name(engine.task.dl_valid).items()
    }


def _is_steady(loader: Any, index: str, mark: Mark) -> bool:
    """Whether a sample is the same at each reading, so that it is not chance that it is not what it was."""
    try:
        return all(alike(mark, mark_of(sample)) for sample in read_again(loader, index, _TIMES))
    except (TypeError, NotImplementedError):  # an iterable, which was read twice
        return True


def mark_of(sample: Any) -> Mark:
    """Returns a sample's mark; an empty one where it holds something that has none."""
    parts: Mark = []
    return parts if _add(sample, parts) else []


def _add(part: Any, parts: Mark) -> bool:
    if isinstance(part, Mapping):
        return all(_add(inner, parts) for inner in part.values())
    if isinstance(part, (list, tuple)):
        return all(_add(inner, parts) for inner in part)
    if hasattr(part, "tobytes") and hasattr(part, "getbands"):  # an image of PIL's
        part = np.asarray(part)
    if isinstance(part, (Tensor, np.ndarray, np.generic)):
        mark = _numbers(part)
        if mark is not None:
            parts.append(mark)
        return mark is not None
    if part is None or isinstance(part, (bool, int, str, bytes)):
        parts.append(_digest(repr(part).encode()))
        return True
    if isinstance(part, float):
        parts.append([part, part] if math.isfinite(part) else _digest(repr(part).encode()))
        return True
    return False


def _numbers(part: Any) -> Any:
    """The mark of a tensor or array; None where it has none."""
    tensor = (
        part if isinstance(part, Tensor) else torch.from_numpy(np.array(part)) if part.dtype.kind in "biuf" else None
    )
    if tensor is None or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        return None
    flat = tensor.detach().reshape(-1)
    flat = flat[:: max(1, flat.numel() // _MOST_VALUES)].cpu()
    shape = _digest(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
    if not (flat.is_floating_point() or flat.dtype == torch.uint8):
        values = torch.view_as_real(flat) if flat.is_complex() else flat
        return [shape, _digest(bytes(values.contiguous().view(torch.uint8).numpy()))]
    flat = torch.nan_to_num(flat.double())
    return [shape, float(flat.norm()), *(_signs(flat.numel()) @ flat).tolist()]


@functools.lru_cache(maxsize=8)
def _signs(count: int) -> Tensor:
    return torch.randint(0, 2, (_SUMS, count), generator=torch.Generator().manual_seed(0)).double() * 2 - 1


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def alike(one: Any, two: Any) -> bool:
    """Whether two marks are the same but for rounding."""
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        numbers = [value for value in one if isinstance(value, float)]
        if numbers:
            return all(_close(a, b, numbers[0]) for a, b in zip(one, two, strict=True))
        return all(alike(a, b) for a, b in zip(one, two, strict=True))
    return bool(one == two)


def _close(one: Any, two: Any, norm: float) -> bool:
    if isinstance(one, float) and isinstance(two, float):
        return abs(one - two) <= _CLOSE * abs(norm)
    return bool(one == two)


def check_data(there: Mapping[str, Any], here: Mapping[str, Any], engine: Engine, settings: Settings) -> list[str]:
    """Compares the data with that which a run began with.

    Returns:
        in words, what differs and was accepted.

    Raises:
        UsageError: it differs, and that was not accepted (`checkpoint.accept`).
    """
    differences = data_differences(there, here, engine)
    if differences and "data" not in settings.config.checkpoint.accept:
        raise UsageError(
            f"the data is not the data that the run started with: {'; '.join(differences)}. Restore it; or accept "
            f"the change by {'' if is_call(settings.config.recipe) else 'adding '}{way(settings, ACCEPT, 'data')}"
            f"{'' if is_call(settings.config.recipe) else ' to the command'}; or choose another "
            f"{way(settings, 'run.name')}. {way(settings, 'checkpoint.check_data', False)} disables this check."
        )
    for difference in differences:
        logger.warning("accepted: %s", difference)
    return differences
