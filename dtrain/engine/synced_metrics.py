"""torchmetrics objects over ranks: their states are gathered once, at the end of a pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dtrain.engine.list_states import Update, gathered_lists, lengths, unwrapped, wrapped
from dtrain.engine.whole_set import WholeSet
from dtrain.errors import StepError, UsageError

if TYPE_CHECKING:
    from dtrain.distributed.world import World
    from dtrain.engine.metrics import Observed

_ROUNDING = 1e-5  # of float32 on machines that are not alike


def is_torchmetric(thing: Any) -> bool:
    """Whether an object is a single torchmetrics metric, told without importing torchmetrics."""
    return any(kind.__module__ == "torchmetrics.metric" and kind.__name__ == "Metric" for kind in type(thing).__mro__)


def check_metrics(metrics: Any, where: str) -> dict[str, Any]:
    """Returns a mapping of names to torchmetrics metrics as a dict; functions become metrics of the whole set.

    Args:
        metrics: what the user gave; None counts as empty.
        where: who gave it, for the message.

    Raises:
        UsageError: it is something else.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise UsageError(
            f"{where}: {type(metrics).__name__} is not a dict of names to single torchmetrics metrics, as in "
            '{"auroc": torchmetrics.AUROC("binary")}. Of a MetricCollection, give dict(collection.items()).'
        )
    found: dict[str, Any] = {}
    for name, metric in metrics.items():
        plain = callable(metric) and not isinstance(metric, type) and not hasattr(metric, "compute")
        if not is_torchmetric(metric) and not plain:
            raise UsageError(
                f"{where}: {name!r} is a {type(metric).__name__}, neither a single torchmetrics metric nor a function "
                "of all samples' values. A mean over samples needs none: return it from the step."
            )
        found[name] = WholeSet(name, metric) if plain else metric
    return found


def ready(metrics: Mapping[str, Any], world: World) -> None:
    """Moves metrics to the rank's device and lets them gather in dtrain's way.

    torchmetrics' own gathering needs as many dimensions, and the same type, on every rank; a rank that had no
    sample has neither.

    Raises:
        UsageError: a metric was told not to look at the other ranks.
    """
    for name, metric in metrics.items():
        if isinstance(metric, WholeSet):
            continue
        if not metric.sync_on_compute or metric.dist_sync_on_step:
            raise UsageError(
                f"metric {name!r} was made with sync_on_compute=False or dist_sync_on_step=True; dtrain syncs it over "
                "the ranks once, at the end of a pass. Remove both arguments."
            )
        metric.to(world.device)
        metric.dist_sync_fn = lambda state, group=None: _gathered(state, world)


def _gathered(state: Tensor, world: World) -> list[Tensor]:
    parts = [part for part in world.gather_tensors(state) if part is not None]
    return [part for part in parts if part.numel()] or parts


def update(metric: Any, start: int, value: Observed, updates: list[Update]) -> None:
    """Updates a metric with what a step returned.

    Args:
        metric: a torchmetrics object.
        start: where the step's first sample is in the data's order.
        value: the arguments.
        updates: what is known of its updates so far, where it has lists that do not concatenate.
    """
    before = lengths(metric)
    metric.update(*value.arguments, **value.keywords)
    if before:
        updates.append((start, {name: length - before[name] for name, length in lengths(metric).items()}))


def compute_all(
    metrics: Mapping[str, Any], world: World, updates: Mapping[str, Sequence[Update]] | None = None
) -> dict[str, dict[str, float]]:
    """Computes metrics over the samples of all ranks.

    Args:
        metrics: by name.
        world: the ranks.
        updates: name -> this rank's updates, as from `update`.

    Returns:
        name -> columns and their values, equal on all ranks to the last bit.

    Raises:
        StepError: a metric's value is not one number, its state cannot be sent to other ranks, or the ranks come to
            different values of one.
    """
    whole = {name: metric for name, metric in metrics.items() if isinstance(metric, WholeSet)}
    found = {name: metric.compute(world) for name, metric in whole.items()}
    metrics = {name: metric for name, metric in metrics.items() if name not in whole}
    if not metrics:
        return found
    mine = {
        name: _number(name, _computed(name, metric, (updates or {}).get(name, ()), world))
        for name, metric in metrics.items()
    }
    if world.size == 1:
        return found | {name: {name: value} for name, value in mine.items()}
    told = world.gather_json(mine)
    for name in metrics:
        _check_equal(name, [values[name] for values in told])
    # Decisions (early stopping) hang on these, and ranks on unlike machines may round them differently.
    return found | {name: {name: float(told[0][name])} for name in metrics}


def _computed(name: str, metric: Any, updates: Sequence[Update], world: World) -> Any:
    if world.size == 1 or not lengths(metric):
        return metric.compute()
    with gathered_lists(name, metric, updates, world):
        return metric.compute()


def _check_equal(name: str, values: list[float]) -> None:
    """Looks whether the ranks came to one value, which they compute of the same gathered states.

    Raises:
        StepError: they did not; every rank raises it.
    """
    if all(_close(value, values[0]) for value in values):
        return
    raise StepError(
        f"metric {name!r} has different values on the ranks, although each is computed from all samples: "
        f"{', '.join(f'{value:.6g} on rank {rank}' for rank, value in enumerate(values))}. Does it keep data outside "
        "of its states (add_state), or depend on the order of samples?",
        on_all_ranks=True,
    )


def _close(one: float, two: float) -> bool:
    return math.isclose(one, two, rel_tol=_ROUNDING, abs_tol=_ROUNDING) or (math.isnan(one) and math.isnan(two))


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    raise StepError(
        f"metric {name!r} came to a {type(value).__name__}{shape}; a column of the history is one number. "
        'Let it average over classes, as in torchmetrics.F1Score(..., average="macro").'
    )


def metric_state(metric: Any) -> dict[str, Any]:
    """Returns what a metric was updated with so far."""
    if isinstance(metric, WholeSet):
        return {"entries": metric.state()}
    return {"updates": metric._update_count, "states": {n: wrapped(one) for n, one in metric.metric_state.items()}}


def load_metric_state(metric: Any, state: Mapping[str, Any]) -> None:
    """Lets a metric go on from what `metric_state` returned."""
    if isinstance(metric, WholeSet):
        metric.load(state["entries"])
        return
    for name, value in state["states"].items():
        setattr(metric, name, unwrapped(value, metric.device))  # of lists that do not concatenate, parts may be any
    metric._update_count = state["updates"]
    metric._computed = None
