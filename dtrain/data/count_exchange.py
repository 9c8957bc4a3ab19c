"""What ranks that read their own streams tell each other: how many samples each has next, and, for one that has none,
a batch to take part with.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.data.collate import Collated
from dtrain.distributed.world import World
from dtrain.errors import UsageError

_SIMPLE = (bool, int, float, str, type(None))


class CountExchange:
    """Each rank's next number of samples, by an all-reduce of a number a rank that is begun a batch ahead.

    Args:
        world: the ranks.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        # On the CPU, whatever the nets are on: to read numbers from a GPU would wait for all that it was sent.
        on_cpu = world.size == 1 or world.device.type == "cpu"
        self._group = None if on_cpu else dist.new_group(backend="gloo")
        self._begun: tuple[Any, Tensor]

    def begin(self, count: int | None) -> None:
        """Sends this rank's number of samples, None where it is done."""
        numbers = torch.zeros(self._world.size, dtype=torch.int64)
        numbers[self._world.rank] = 0 if count is None else count + 1
        work = None
        if self._world.size > 1:
            work = dist.all_reduce(numbers, group=self._group, async_op=True)
        self._begun = work, numbers

    def end(self) -> list[int | None]:
        """Returns what all ranks have sent, once they have."""
        work, numbers = self._begun
        if work is not None:
            work.wait()
        return [None if number == 0 else number - 1 for number in numbers.tolist()]

    def shared(self, batch: Any, counts: list[int | None], split: str) -> tuple[Any, int]:
        """Returns this rank's batch, or that of the first rank with one, and its number of samples.

        Args:
            batch: this rank's.
            counts: what `end` returned; where all have a batch, nothing is sent.
            split: the loader's name.

        Raises:
            UsageError: the batch cannot be sent; all ranks raise it.
        """
        own = counts[self._world.rank]
        if None not in counts:
            return batch, own or 0
        source = next(rank for rank, count in enumerate(counts) if count)
        sent = share_batch(self._world, batch, source, split)
        return (sent, counts[source] or 0) if own is None else (batch, own)


def share_batch(world: World, batch: Any, source: int, split: str) -> Any:
    """Returns one rank's batch on all of them; no pickle is involved.

    Args:
        world: the ranks.
        batch: the batch; of the others it does not matter.
        source: whose.
        split: the loader's name.

    Raises:
        UsageError: it is made of more than tensors, arrays, numbers and texts in lists, tuples and dicts; all ranks
            raise it.
    """
    tensors: list[Tensor] = []
    form: Any = None
    if world.rank == source:
        form = _form(batch.batch if type(batch) is Collated else batch, tensors)
    form, count = world.gather_json([form, len(tensors)])[source]
    kind = _unknown(form)
    if kind is not None:
        raise UsageError(
            f"a rank's part of the {split} stream is empty, and a batch of another rank, with weight 0, cannot be sent "
            f"to it: there is a {kind} in it. Use no more ranks than there are parts, or have the loader yield "
            "tensors, in tuples, lists or dicts.",
            on_all_ranks=True,
        )
    sent = [world.gather_tensors(tensors[n] if world.rank == source else None)[source] for n in range(count)]
    return _made(form, sent)


def _form(value: Any, tensors: list[Tensor]) -> Any:
    """A batch as JSON; its tensors are put into a list."""
    if type(value) is Tensor and value.layout is torch.strided and not value.is_nested:
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if type(value) is np.ndarray and value.dtype.kind in "biuf":
        tensors.append(torch.from_numpy(np.array(value)))
        return {"array": len(tensors) - 1}
    if type(value) is dict:
        return {"dict": [[_form(key, tensors), _form(part, tensors)] for key, part in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_form(part, tensors) for part in value]}
    return value if type(value) in _SIMPLE else {"unknown": type(value).__name__}


def _unknown(form: Any) -> str | None:
    if isinstance(form, list):
        return next((kind for part in form if (kind := _unknown(part)) is not None), None)
    if not isinstance(form, dict):
        return None
    return str(form["unknown"]) if "unknown" in form else _unknown([p for p in form.values() if isinstance(p, list)])


def _made(form: Any, tensors: list[Any]) -> Any:
    if not isinstance(form, dict):
        return form
    ((kind, inner),) = form.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "array":
        return tensors[inner].cpu().numpy()
    if kind == "dict":
        return {_made(key, tensors): _made(part, tensors) for key, part in inner}
    parts = [_made(part, tensors) for part in inner]
    return tuple(parts) if kind == "tuple" else parts
