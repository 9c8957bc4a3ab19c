"""Proves that N ranks compute what one process computes, on the user's own recipe, or says where they part."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from dtrain.rundir.columns import TIMES

_NOISE = 0.01  # of an element, by which its gradient differs where it is all rounding


@dataclass(frozen=True)
class FirstDifference:
    """Where the ranks part from one process first.

    Attributes:
        where: step and thing, in words.
        alone: its value on one rank.
        together: its value on N ranks.
        cause: what it is likely to come from, and the remedy.
    """

    where: str
    alone: str
    together: str
    cause: str


@dataclass(frozen=True)
class TracedRun:
    """What a traced run left: a record a rank, and gradients and weights of each optimizer step."""

    ranks: list[dict[str, Any]]
    tensors: list[dict[str, np.ndarray]]

    @classmethod
    def read(cls, folder: Path) -> TracedRun:
        """Reads the files of `dtrain.tools.check.trace`."""
        count = len(list(folder.glob("rank-*.json")))
        ranks = [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(count)]
        steps = len(list(folder.glob("step-*.safetensors")))
        return cls(ranks, [load_file(folder / f"step-{step}.safetensors") for step in range(1, steps + 1)])

    def rows(self, step: int) -> list[int]:
        """Fingerprints of all samples of a step, over the ranks, sorted."""
        return sorted(row for rank in self.ranks for row in rank["steps"][step]["rows"])

    def padded(self, step: int, other: TracedRun) -> bool:
        """Whether a step has the same samples in another run by their indices, in tensors of other shapes."""
        indices, shapes = (
            [[rank["steps"][step][kind] for rank in run.ranks] for run in (self, other)]
            for kind in ("indices", "shapes")
        )
        one, many = (sorted(index for rank in run for index in rank) for run in indices)
        widths = [{json.dumps(shape) for shape in run if shape is not None} for run in shapes]
        return bool(one) and one == many and widths[0] != widths[1]

    def means(self, step: int) -> dict[str, float]:
        """The values of a step, over the ranks."""
        values = [rank["steps"][step]["values"] for rank in self.ranks]
        names = list(values[0])
        sums = {name: [sum(v[name][part] for v in values) for part in (0, 1)] for name in names}
        return {name: total / count if count else float("nan") for name, (total, count) in sums.items()}


def compare(alone: TracedRun, together: TracedRun, tolerance: float) -> FirstDifference | None:
    """Compares a run on one rank with a run on N, each optimizer step of which began with the former's weights.

    Args:
        alone: the reference: one rank, on the same global batches.
        together: the run on N ranks.
        tolerance: the relative difference that rounding may make.

    Returns:
        the first difference in the order of time, or None.
    """
    first = {rank["initial"] for rank in together.ranks}
    if len(first) > 1:
        return FirstDifference(
            "before step 1: the initial weights of the ranks",
            "one net",
            f"{len(first)} different models on {len(together.ranks)} ranks",
            "a rank-dependent seed: the recipe seeds its random numbers by rank, time or process ID. dtrain seeds "
            "all ranks alike before importing the recipe; do not seed by rank.",
        )
    counts = len(alone.ranks[0]["steps"]), len(together.ranks[0]["steps"])
    compared = 0
    for step in range(min(counts)):
        found = _compare_step(alone, together, step, tolerance)
        taken = alone.ranks[0]["steps"][step]["taken"]  # with one optimizer or several, at each batch or not
        for number in range(compared, taken):
            found = found or _compare_tensors(alone, together, number, tolerance)
        compared = taken
        if found is not None:
            return found
    if counts[0] != counts[1]:
        return FirstDifference(
            "the number of steps", str(counts[0]), str(counts[1]), "drop_last, or a loader that shards by rank."
        )
    return _compare_tensors(alone, together, len(alone.tensors) - 1, tolerance) or _compare_history(
        alone, together, tolerance
    )


def _compare_step(alone: TracedRun, together: TracedRun, step: int, tolerance: float) -> FirstDifference | None:
    one, many = alone.rows(step), together.rows(step)
    padded = one != many and alone.padded(step, together)
    if one != many and not padded:
        common = len(set(one) & set(many))
        cause = (
            "drop_last, or a sampler that shards by rank."
            if len(one) != len(many)
            else "a shuffle outside the sampler, or random augmentation: both use the rank's own random generator. "
            "Shuffle in the sampler; seed augmentations by sample."
        )
        told = f"{common} of its samples are the same" if len(one) == len(many) else f"{len(many)} samples"
        return FirstDifference(f"step {step + 1}: the samples", f"{len(one)} samples", told, cause)
    values = alone.means(step), together.means(step)
    for name, mean in values[0].items():
        if _apart(mean, values[1][name], tolerance):
            cause = _cause(alone, name, mean, values[1][name], len(together.ranks), padded=padded)
            return FirstDifference(f"step {step + 1}: {name}", f"{mean:.9g}", f"{values[1][name]:.9g}", cause)
    return None


def _cause(  # noqa: PLR0913 - keyword-only after the two values
    alone: TracedRun, name: str, one: float, many: float, ranks: int, *, padded: bool = False
) -> str:
    record = alone.ranks[0]
    if record["batchnorm"]:
        return (
            "BatchNorm: its statistics are computed per rank. train.sync_batchnorm=true computes them over all ranks."
        )
    if record["dropout"]:
        return (
            "dropout: with train.same_draws=false, train.compile, or train.combine=min or max_cycle, each rank draws "
            "its own masks. Remove these settings, "
            "or set dropout to 0 for this check."
        )
    if padded:
        return (
            "padding: a batch is padded to its longest sample, so a rank's part has another number of values for each "
            "sample. Return dtrain.Mean(total, count) of what is no padding. Or random augmentation: seed it by sample."
        )
    if name == "loss" and one and abs(many / one * ranks - 1) < 0.5:
        return (
            "a summed loss: it grows with the batch size, so a rank's loss is about 1/N of the whole. Return the "
            "mean (reduction='mean'), or dtrain.Mean(total, count)."
        )
    if name != "loss":
        return (
            "a metric that isn't an average over samples (AUROC, F1, RMSE, ...): averaging it over ranks is wrong. "
            "Return its sum and count as dtrain.Mean, or use a torchmetrics object."
        )
    return (
        "unknown: something in the step depends on how the batch is split, such as random numbers that are not drawn "
        "per sample."
    )


def _compare_tensors(alone: TracedRun, together: TracedRun, step: int, tolerance: float) -> FirstDifference | None:
    if step < 0 or step >= min(len(alone.tensors), len(together.tensors)):
        return None
    if len({rank["checksums"][step] for rank in together.ranks}) > 1:
        return FirstDifference(
            f"optimizer step {step + 1}: the weights of the ranks",
            "one net",
            f"different models on {len(together.ranks)} ranks",
            "an optimizer step that uses the rank's own random generator, or weights changed by values that "
            "differ per rank.",
        )
    one, many = alone.tensors[step], together.tensors[step]
    whole = {kind: _norm(*(t for k, t in one.items() if k.startswith(kind))) for kind in ("gradient/", "weight/")}
    for key, tensor in sorted(one.items()):
        kind, _, name = key.partition("/")
        if key not in many:
            return FirstDifference(
                f"optimizer step {step + 1}: the {kind} of {name}", "there", "missing", "unused on N ranks."
            )
        # Norms, since one element alone may be far off: Adam makes a whole step of a gradient that is all rounding.
        differs = tensor.astype(np.float64) - many[key]
        if kind == "weight":
            differs = differs * _is_no_rounding(one.get(f"gradient/{name}"), many.get(f"gradient/{name}"))
        scale, apart = _norm(tensor), _norm(differs)
        # What is zero but for rounding (the gradient of a bias before BatchNorm) is compared with the whole net's.
        if apart > tolerance * max(scale, 0.01 * whole[f"{kind}/"], 1e-6):
            return FirstDifference(
                f"optimizer step {step + 1}: the {kind} of {name}",
                f"norm {scale:.6g}",
                f"off by {apart:.3g} in the norm",
                "the losses are equal but the gradients are not: the backward pass depends on how the batch is "
                "split (gradient clipping or scaling in the step, or a loss weight that depends on the batch size).",
            )
    return None


def _is_no_rounding(one: np.ndarray | None, many: np.ndarray | None) -> np.ndarray | float:
    """Tells, of each element of a gradient that is equal as a whole, whether it is more than rounding; 1 for yes."""
    if one is None or many is None or one.shape != many.shape:
        return 1.0
    return np.asarray(np.abs(one - many) <= _NOISE * np.maximum(np.abs(one), np.abs(many)), dtype=np.float64)


def _norm(*tensors: np.ndarray) -> float:
    return math.sqrt(sum(float(np.square(tensor.astype(np.float64)).sum()) for tensor in tensors))


def _compare_history(alone: TracedRun, together: TracedRun, tolerance: float) -> FirstDifference | None:
    one, many = alone.ranks[0]["history"][0], together.ranks[0]["history"][0]
    for name, value in one.items():
        if name not in TIMES and _apart(value, many.get(name, float("nan")), tolerance):
            base = "loss" if name.endswith("_loss") else name.removeprefix("val_")  # also of several loaders
            cause = _cause(alone, base, value, many.get(name, float("nan")), len(together.ranks))
            return FirstDifference(f"the history's {name}", f"{value:.9g}", f"{many.get(name)}", cause)
    return None


def _apart(one: float, many: float, tolerance: float) -> bool:
    if math.isnan(one) or math.isnan(many):
        return math.isnan(one) != math.isnan(many)
    return abs(one - many) > tolerance * max(abs(one), abs(many), 1e-6)
