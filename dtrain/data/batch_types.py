"""Batches of known types that are no stacked tensors: how many samples they hold, how they are cut, joined and made.

They are known by what they offer, so that no library is imported for them: PackedSequence, nested tensors, graphs in
the way of PyTorch Geometric and DGL, and TensorDicts.
"""

from __future__ import annotations

import copy
import sys
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence, pad_sequence


class UnclearError(Exception):
    """A batch of which the samples cannot be told, or which cannot be cut or joined; the message says why."""


@dataclass(frozen=True)
class Kind:
    """What is known of a type.

    Attributes:
        size: batch -> its number of samples.
        samples: batch -> its samples, each of them as `join` takes it.
        join: (one batch of the type, samples) -> a batch of these samples.
    """

    size: Callable[[Any], int]
    samples: Callable[[Any], list[Any]]
    join: Callable[[Any, list[Any]], Any]

    def cut(self, batch: Any, start: int, stop: int) -> Any:
        """Returns the batch of samples start to stop.

        Raises:
            UnclearError: that cannot be had of this one.
        """
        return self.join(batch, self.samples(batch)[start:stop])


def known_kind(part: Any) -> Kind | None:
    """Returns what is known of the type of a part of a batch; None where it is none of these."""
    if isinstance(part, Tensor):
        return _NESTED if part.is_nested else None
    if isinstance(part, PackedSequence):
        return _PACKED
    if isinstance(part, type):
        return None
    size = getattr(part, "batch_size", None)
    if isinstance(size, torch.Size):
        return _TENSOR_DICT if size else None
    if type(part).__module__.partition(".")[0] == "dgl" and hasattr(part, "batch_num_nodes"):
        return _DGL
    return _GRAPHS if not isinstance(part, Mapping) and hasattr(part, "num_graphs") else None


# --- packed sequences --------------------------------------------------------------------------------------


def _sequences(packed: PackedSequence) -> list[Tensor]:
    padded, lengths = pad_packed_sequence(packed, batch_first=True)
    return [row[:length] for row, length in zip(padded, lengths.tolist(), strict=True)]


def _pack(like: PackedSequence, sequences: list[Tensor]) -> PackedSequence:
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    padded = pad_sequence(sequences, batch_first=True)
    in_order = like.sorted_indices is None and bool((lengths[1:] <= lengths[:-1]).all())  # joined ones may not be
    return pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=in_order)


_PACKED = Kind(lambda packed: int(packed.batch_sizes[0]), _sequences, _pack)


# --- nested tensors ----------------------------------------------------------------------------------------


def _nest(like: Tensor, parts: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(parts, layout=like.layout)


_NESTED = Kind(lambda nested: int(nested.size(0)), lambda nested: list(nested.unbind()), _nest)


# --- graphs ------------------------------------------------------------------------------------------------


def _graphs(batch: Any) -> list[Any]:
    if not callable(getattr(batch, "to_data_list", None)):
        raise UnclearError("has no to_data_list()")
    return list(batch.to_data_list())


def _batch_graphs(like: Any, graphs: list[Any]) -> Any:
    # The class that has it, and not the one that PyTorch Geometric makes of it for a kind of graph.
    maker = next((one for one in type(like).__mro__ if "from_data_list" in vars(one)), None)
    if maker is None:
        raise UnclearError("has no from_data_list()")
    made = maker.from_data_list(graphs)  # type: ignore[attr-defined]
    lost = _keys(like) - _keys(made)
    if lost:
        raise UnclearError(f"has {', '.join(sorted(lost))}, which from_data_list() does not make anew")
    return made


def _keys(batch: Any) -> set[str]:
    keys = getattr(batch, "keys", None)
    return set(keys() if callable(keys) else keys or ())


_GRAPHS = Kind(lambda batch: int(batch.num_graphs), _graphs, _batch_graphs)
_DGL = Kind(
    lambda batch: int(batch.batch_size),
    lambda batch: list(sys.modules["dgl"].unbatch(batch)),
    lambda _, graphs: sys.modules["dgl"].batch(graphs),
)


# --- tensordict --------------------------------------------------------------------------------------------


def _stack(_: Any, rows: list[Any]) -> Any:
    return torch.cat(rows, 0)


_TENSOR_DICT = Kind(
    lambda batch: int(batch.batch_size[0]), lambda batch: [batch[n : n + 1] for n in range(batch.batch_size[0])], _stack
)


# --- what is made of parts ---------------------------------------------------------------------------------


def made_of(like: Any, parts: dict[Any, Any], encodings: Any) -> Any:
    """Returns an object of the same type with other parts."""
    if isinstance(like, UserDict):  # BatchEncoding and BatchFeature of transformers, too
        made = object.__new__(type(like))
        made.__dict__.update(like.__dict__)
        made.data = parts
        if encodings_of(like):
            made.__dict__["_encodings"] = encodings(encodings_of(like))
        return made
    if type(like) in (list, tuple, dict):
        return parts if type(like) is dict else type(like)(parts.values())
    if isinstance(like, tuple):
        return type(like)(*parts.values()) if hasattr(like, "_fields") else type(like)(parts.values())
    if isinstance(like, Mapping) and not isinstance(like, dict):
        try:
            return type(like)(parts)  # type: ignore[call-arg]
        except TypeError as error:
            raise UnclearError(f"a {type(like).__name__} cannot be made of its parts: {error}") from None
    return _copied(like, parts)


def _copied(like: Any, parts: dict[Any, Any]) -> Any:
    """A copy of a dict or list of a type of its own, or of a dataclass, also a frozen one."""
    made = copy.copy(like)
    for key, part in parts.items():
        if isinstance(like, (dict, list)):
            made[key] = part
        else:
            object.__setattr__(made, key, part)
    return made


def encodings_of(value: Any) -> Any:
    """What a BatchEncoding of a fast tokenizer keeps of each of its samples, a list, or None."""
    return getattr(value, "__dict__", {}).get("_encodings") or []


# --- what is said of parts ---------------------------------------------------------------------------------


def sort_of(value: Any) -> Any:
    """What samples of one kind have in common."""
    if isinstance(value, Mapping):
        return frozenset(value)
    if isinstance(value, (tuple, list)):
        return type(value), len(value)
    return type(value), getattr(value, "dtype", None), getattr(value, "ndim", None)


def shape_of(value: Any) -> str:
    """Returns a part's shape in words, or what else it is."""
    if isinstance(value, (list, tuple)) and value and all(hasattr(one, "shape") for one in value):
        shapes = [str(tuple(one.shape)) for one in value[:3]]
        return f"[{', '.join(shapes)}{', ...' * (len(value) > 3)}]"
    if isinstance(value, (list, tuple)):
        return f"({type(value).__name__} of {len(value)})"
    shape = None if isinstance(value, Tensor) and value.is_nested else getattr(value, "shape", None)
    return f"({type(value).__name__})" if shape is None else str(tuple(shape))


def is_same(one: Any, other: Any) -> bool:
    """Whether two batches share a part, or have equal ones that are made of unequal numbers."""
    if isinstance(one, tuple):
        return one == other and all(isinstance(number, (int, float)) for number in one)
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        return False
    if one.layout is torch.strided and len(one) > 1 and one.data_ptr() == other.data_ptr():
        return True
    if one.ndim != 1 or not one.is_floating_point() or not torch.equal(one, other):
        return False
    return len(set(one.tolist()) - {0.0, 1.0}) > 1
