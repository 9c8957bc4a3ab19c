"""List states of torchmetrics objects that are no rows to concatenate, as detection's boxes: gathered in data order.

torchmetrics gathers such a list element by element, so that ranks with unequal numbers of them would wait for ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dtrain.engine.packed import Entry, gather_entries

if TYPE_CHECKING:
    from dtrain.distributed.world import World

Update = tuple[int, dict[str, int]]  # where its first sample is in the data's order, and by how much each list grew


def list_states(metric: Any) -> dict[str, list[Any]]:
    """Returns a metric's list states that are not concatenated, by name."""
    return {
        name: getattr(metric, name)
        for name, default in metric._defaults.items()
        if isinstance(default, list) and getattr(metric._reductions[name], "__name__", "") != "dim_zero_cat"
    }


def lengths(metric: Any) -> dict[str, int]:
    """Returns the lengths of these, by name."""
    return {name: len(state) for name, state in list_states(metric).items()}


@contextlib.contextmanager
def gathered_lists(name: str, metric: Any, updates: Sequence[Update], world: World) -> Iterator[None]:
    """While inside, `metric.compute()` has these lists of all ranks.

    Args:
        name: the metric's.
        metric: it.
        updates: this rank's, in order.
        world: the ranks.
    """
    usual = metric._sync_dist

    def sync(*args: Any, **kwargs: Any) -> None:
        mine = list_states(metric)
        found = {state: _gathered(f"metric {name!r}", state, mine[state], updates, world) for state in mine}
        for state in found:
            setattr(metric, state, [])  # torchmetrics has nothing to gather then
        usual(*args, **kwargs)
        for state, values in found.items():
            reduction, device = metric._reductions[state], "cpu" if metric.compute_on_cpu else metric.device
            there = [unwrapped(value, device) for value in values]
            setattr(metric, state, there if reduction is None else reduction(there))

    metric._sync_dist = sync
    try:
        yield
    finally:
        del metric._sync_dist


def _gathered(whose: str, state: str, values: list[Any], updates: Sequence[Update], world: World) -> list[Any]:
    """Returns all ranks' values, in the data's order; rank by rank where it is not known what an update added."""
    grown = [(start, by[state]) for start, by in updates]
    if any(count < 0 for _, count in grown) or sum(count for _, count in grown) != len(values):
        grown = [(0, len(values))]
    entries: list[Entry] = []
    position = 0
    for start, count in grown:
        entries.append((start, count, [wrapped(value) for value in values[position : position + count]]))
        position += count
    everywhere = sorted(gather_entries(entries, world, whose), key=lambda entry: entry[0])
    return [value for _, _, part in everywhere for value in part]


def wrapped(value: Any) -> Any:
    """A value as it is sent: bytes, such as those of masks, as text."""
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    return type(value)(map(wrapped, value)) if type(value) in (list, tuple) else value


def unwrapped(value: Any, device: Any) -> Any:
    """Returns what was wrapped, its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict) and value.keys() == {"bytes"}:
        return bytes.fromhex(value["bytes"])
    return type(value)(unwrapped(part, device) for part in value) if type(value) in (list, tuple) else value
