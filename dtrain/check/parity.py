"""Proves that N ranks compute what one process computes, on the user's own recipe, or says where they part."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from dtrain.columns import TIMES


@dataclass(frozen=True)
class Parting:
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
class Record:
    """What a traced run left: a record a rank, and gradients and weights of each optimizer step."""

    ranks: list[dict[str, Any]]
    tensors: list[dict[str, np.ndarray]]

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Reads the files of `dtrain.check.trace`."""
        count = len(list(folder.glob("rank-*.json")))
        ranks = [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(count)]
        steps = len(list(folder.glob("step-*.safetensors")))
        return cls(ranks, [load_file(folder / f"step-{step}.safetensors") for step in range(1, steps + 1)])

    def rows(self, step: int) -> list[int]:
        """Fingerprints of all samples of a step, over the ranks, sorted."""
        return sorted(row for rank in self.ranks for row in rank["steps"][step]["rows"])

    def means(self, step: int) -> dict[str, float]:
        """The values of a step, over the ranks."""
        values = [rank["steps"][step]["values"] for rank in self.ranks]
        names = list(values[0])
        sums = {name: [sum(v[name][part] for v in values) for part in (0, 1)] for name in names}
        return {name: total / count if count else float("nan") for name, (total, count) in sums.items()}


def compare(alone: Record, together: Record, accumulation: int, tolerance: float) -> Parting | None:
    """Compares a run on one rank with a run on N, each optimizer step of which began with the former's weights.

    Args:
        alone: the reference: one rank, on the same global batches.
        together: the run on N ranks.
        accumulation: train steps to an optimizer step.
        tolerance: the relative difference that rounding may make.

    Returns:
        the first difference in the order of time, or None.
    """
    first = {rank["initial"] for rank in together.ranks}
    if len(first) > 1:
        return Parting(
            "before step 1: the weights that the ranks were built with",
            "one net",
            f"{len(first)} different nets on {len(together.ranks)} ranks",
            "a rank-dependent seed: the recipe seeds or draws differently on each rank (from RANK, the time or the "
            "process id?). dtrain seeds all ranks alike before the recipe is imported; leave that to it.",
        )
    counts = len(alone.ranks[0]["steps"]), len(together.ranks[0]["steps"])
    for step in range(min(counts)):
        found = _compare_step(alone, together, step, tolerance)
        if found is None and (step + 1) % accumulation == 0:
            found = _compare_tensors(alone, together, (step + 1) // accumulation - 1, tolerance)
        if found is not None:
            return found
    if counts[0] != counts[1]:
        return Parting(
            "the number of steps", str(counts[0]), str(counts[1]), "drop_last, or a loader that knows ranks."
        )
    return _compare_tensors(alone, together, len(alone.tensors) - 1, tolerance) or _compare_history(
        alone, together, tolerance
    )


def _compare_step(alone: Record, together: Record, step: int, tolerance: float) -> Parting | None:
    one, many = alone.rows(step), together.rows(step)
    if one != many:
        common = len(set(one) & set(many))
        cause = (
            "drop_last, or a sampler that knows ranks."
            if len(one) != len(many)
            else "a shuffle outside the sampler, or random augmentation of each sample: both draw from the rank's own "
            "random stream. Shuffle in the sampler; draw augmentations from a seed of the sample's own."
        )
        told = f"{common} of its samples are the same" if len(one) == len(many) else f"{len(many)} samples"
        return Parting(f"step {step + 1}: the samples", f"{len(one)} samples", told, cause)
    values = alone.means(step), together.means(step)
    for name, mean in values[0].items():
        if _apart(mean, values[1][name], tolerance):
            cause = _cause(alone, name, mean, values[1][name], len(together.ranks))
            return Parting(f"step {step + 1}: {name}", f"{mean:.9g}", f"{values[1][name]:.9g}", cause)
    return None


def _cause(alone: Record, name: str, one: float, many: float, ranks: int) -> str:
    record = alone.ranks[0]
    if record["batchnorm"]:
        return (
            "BatchNorm: its statistics are those of each rank's part of the batch. "
            "train.sync_batchnorm=true takes them over all ranks."
        )
    if record["dropout"]:
        return (
            "dropout: with train.same_draws=false or train.compile, each rank draws its own masks. Leave these out, or "
            "set dropout to 0 for this check."
        )
    if name == "loss" and one and abs(many / one * ranks - 1) < 0.5:
        return (
            "a summed loss: it grows with the batch, so that its sum over a rank's part is about 1/N of the whole. "
            "Return the mean (reduction='mean'), or dtrain.Mean(total, count)."
        )
    if name != "loss":
        return (
            "a metric that is no mean over samples (AUROC, F1, a root of a mean, ...): means of parts are not the "
            "whole's. Return its sum and count as dtrain.Mean."
        )
    return (
        "unknown: something in the step depends on how the batch is split, such as random numbers that are not drawn "
        "sample by sample."
    )


def _compare_tensors(alone: Record, together: Record, step: int, tolerance: float) -> Parting | None:
    if step < 0 or step >= min(len(alone.tensors), len(together.tensors)):
        return None
    if len({rank["checksums"][step] for rank in together.ranks}) > 1:
        return Parting(
            f"optimizer step {step + 1}: the weights of the ranks",
            "one net",
            f"different nets on {len(together.ranks)} ranks",
            "an optimizer step that draws from the rank's own random stream, or weights changed by values that "
            "differ per rank.",
        )
    one, many = alone.tensors[step], together.tensors[step]
    whole = {kind: _norm(*(t for k, t in one.items() if k.startswith(kind))) for kind in ("gradient/", "weight/")}
    for key, tensor in sorted(one.items()):
        kind, _, name = key.partition("/")
        if key not in many:
            return Parting(f"optimizer step {step + 1}: the {kind} of {name}", "there", "missing", "unused on N ranks.")
        # Norms, since one element alone may be far off: Adam makes a whole step of a gradient that is all rounding.
        scale, apart = _norm(tensor), _norm(tensor.astype(np.float64) - many[key])
        # What is zero but for rounding (the gradient of a bias before BatchNorm) is compared with the whole net's.
        if apart > tolerance * max(scale, 0.01 * whole[f"{kind}/"], 1e-6):
            return Parting(
                f"optimizer step {step + 1}: the {kind} of {name}",
                f"norm {scale:.6g}",
                f"off by {apart:.3g} in the norm",
                "the loss is equal and its gradient is not: the backward pass depends on how the batch is split "
                "(gradient clipping or scaling in the step, a loss weight that knows the batch size?).",
            )
    return None


def _norm(*tensors: np.ndarray) -> float:
    return math.sqrt(sum(float(np.square(tensor.astype(np.float64)).sum()) for tensor in tensors))


def _compare_history(alone: Record, together: Record, tolerance: float) -> Parting | None:
    one, many = alone.ranks[0]["history"][0], together.ranks[0]["history"][0]
    for name, value in one.items():
        if name not in TIMES and _apart(value, many.get(name, float("nan")), tolerance):
            cause = _cause(alone, name.removeprefix("val_"), value, many.get(name, float("nan")), len(together.ranks))
            return Parting(f"the history's {name}", f"{value:.9g}", f"{many.get(name)}", cause)
    return None


def _apart(one: float, many: float, tolerance: float) -> bool:
    if math.isnan(one) or math.isnan(many):
        return math.isnan(one) != math.isnan(many)
    return abs(one - many) > tolerance * max(abs(one), abs(many), 1e-6)
