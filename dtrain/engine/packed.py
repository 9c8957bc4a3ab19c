"""What steps return for each sample, a row or an entry: copied, saved, and gathered over the ranks.

They are of the same kinds on one rank and on many, and in a resumed run: what cannot be sent or saved is refused at the
first batch. No pickle is involved: JSON, and one tensor of each type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dtrain.errors import StepError

if TYPE_CHECKING:
    from dtrain.distributed.world import World

Entry = tuple[int, int, Any]  # where its first sample is in the data's order, how many samples, and values

_CPU = torch.device("cpu")
_SIMPLE = (bool, int, float, str, type(None))
_NUMBERS, _TEXTS = "biufc", "U"  # kinds of arrays


def own_values(value: Any, whose: str) -> Any:
    """Returns a copy of nested values, as they would come from another rank.

    Args:
        value: tensors, arrays, numbers, texts, and lists, tuples and mappings of these.
        whose: they are, for messages.

    Raises:
        StepError: a value is of another kind.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray) and value.dtype.kind in _NUMBERS + _TEXTS:
        return value.copy()
    if isinstance(value, Mapping):
        return {own_values(key, whose): own_values(part, whose) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(own_values(part, whose) for part in value)
    if isinstance(value, (list, np.ndarray)):
        return [own_values(part, whose) for part in value]
    return _simple(value, whose)


def _simple(value: Any, whose: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _SIMPLE):
        return value
    raise StepError(
        f"{whose}: a step returned a {type(value).__name__} for it, which cannot be sent to other ranks or saved. "
        "Return tensors, arrays, numbers, texts, and lists, tuples and mappings of these."
    )


def pack_entries(entries: Sequence[Entry], whose: str) -> dict[str, Any]:
    """Returns entries as JSON and flat tensors, for a checkpoint."""
    packed = _Packed(whose)
    mine = [[start, count, packed.pack(values)] for start, count, values in entries]
    return {"entries": mine, "numbers": {kind: packed.flat(kind) for kind in packed.numbers}}


def unpack_entries(state: Mapping[str, Any]) -> list[Entry]:
    """Returns what was packed."""
    unpacked = _Unpacked(state["numbers"])
    return [(start, count, unpacked.unpack(values)) for start, count, values in state["entries"]]


def gather_entries(entries: Sequence[Entry], world: World, whose: str) -> list[Entry]:
    """Returns all ranks' entries, tensors on the CPU.

    Args:
        entries: where the first sample of each is, how many samples, and values: tensors, arrays, numbers, texts, and
            lists, tuples and mappings of these.
        world: the ranks.
        whose: they are, for messages.

    Raises:
        StepError: a value is of another kind.
    """
    packed = _Packed(whose)
    mine = [[start, count, packed.pack(values)] for start, count, values in entries]
    told = world.gather_json([mine, sorted(packed.numbers)])
    types = sorted({kind for _, kinds in told for kind in kinds})
    flat = {kind: world.gather_tensors(packed.flat(kind), _CPU) for kind in types}
    found = []
    for rank, (theirs, _) in enumerate(told):
        unpacked = _Unpacked({kind: parts[rank] for kind, parts in flat.items()})
        found += [(start, count, unpacked.unpack(values)) for start, count, values in theirs]
    return found


class _Packed:
    """Nested values as JSON, with the numbers of their tensors in a row, by type."""

    def __init__(self, whose: str) -> None:
        self._whose = whose
        self.numbers: dict[str, list[Tensor]] = {}

    def pack(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value)}
        if isinstance(value, np.ndarray) and value.dtype.kind in _NUMBERS + _TEXTS:
            return self._array(value)
        if isinstance(value, Mapping):
            return {"mapping": [[self.pack(key), self.pack(part)] for key, part in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [self.pack(part) for part in value]}
        if isinstance(value, (list, np.ndarray)):
            return [self.pack(part) for part in value]
        return _simple(value, self._whose)

    def _tensor(self, tensor: Tensor) -> list[Any]:
        kind = str(tensor.dtype).removeprefix("torch.")
        self.numbers.setdefault(kind, []).append(tensor.detach().to(_CPU).reshape(-1))
        return [kind, list(tensor.shape)]

    def _array(self, array: np.ndarray) -> dict[str, Any]:
        if array.dtype.kind in _TEXTS:
            return {"texts": [array.reshape(-1).tolist(), list(array.shape)]}
        return {"array": self._tensor(torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="))))}

    def flat(self, kind: str) -> Tensor | None:
        parts = self.numbers.get(kind)
        return None if parts is None else torch.cat(parts)


class _Unpacked:
    """Undoes `_Packed`, in the same order.

    Args:
        flat: a rank's numbers, by type.
    """

    def __init__(self, flat: Mapping[str, Tensor | None]) -> None:
        self._flat = flat
        self._used = dict.fromkeys(flat, 0)

    def unpack(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.unpack(part) for part in value]
        if not isinstance(value, dict):
            return value
        ((what, held),) = value.items()
        if what == "mapping":
            return {self.unpack(key): self.unpack(part) for key, part in held}
        if what == "tuple":
            return tuple(self.unpack(part) for part in held)
        if what == "texts":
            return np.array(held[0], dtype=str).reshape(held[1])
        tensor = self._next(*held)
        return tensor.numpy() if what == "array" else tensor

    def _next(self, kind: str, shape: list[int]) -> Tensor:
        whole, used = self._flat[kind], self._used[kind]
        assert whole is not None  # noqa: S101 - a rank that names a type has numbers of it
        count = int(np.prod(shape, dtype=np.int64))
        self._used[kind] = used + count
        return whole[used : used + count].reshape(shape)
