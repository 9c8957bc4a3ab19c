"""A batch as a tree of its parts, from which its number of samples and the way to cut it are read.

What a part says of the number of samples:

- a tensor or array: its first dimension;
- a known type (`dtrain.data.batch_types`): what that type says;
- a mapping, a tuple, a dataclass: what its parts say, which must agree;
- a list or tuple of tensors, mappings or tuples within a batch: one sample each, or parts that must agree. What else is
  in the batch decides; where that leaves both open, mappings, and tensors of unequal shapes, are samples;
- a list or tuple of texts, numbers or objects of one unknown type: nothing. It is cut where it is as long as the batch;
- texts, numbers, 0-d tensors: nothing. They are kept whole. So is an object of another type, which cannot be cut.
"""
# ruff: noqa: D102 - what the methods do stands at those of Node

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtrain.data.batch_types import Kind, UnclearError, encodings_of, known_kind, made_of, shape_of, sort_of

_PLAIN = (str, bytes, bool, int, float, complex, type(None), Path, torch.dtype, torch.device, torch.Size, slice, range)


class Node:
    """A part of a batch that is kept whole.

    Args:
        value: the part.
        path: where it is, such as "batch[0]['image']".
    """

    def __init__(self, value: Any, path: str) -> None:
        self.value = value
        self.path = path

    def sizes(self) -> frozenset[int] | None:
        """Returns the numbers of samples that the batch may have by this part; None where it says nothing."""
        return None

    def preferred(self) -> frozenset[int] | None:
        """Returns those of `sizes` that are likely where nothing else decides."""
        return self.sizes()

    def resolve(self, size: int) -> None:
        """Fixes how the part is read in a batch of so many samples."""

    def cut(self, start: int, stop: int) -> Any:
        """Returns the part for samples start to stop.

        Raises:
            UnclearError: it cannot be cut.
        """
        return self.value

    def join(self, nodes: list[Any]) -> Any:
        """Returns the parts of several batches as one; the nodes are of this one's place, itself the first.

        Raises:
            UnclearError: they cannot be joined.
        """
        return self.value

    def nodes(self) -> Iterator[Node]:
        """Yields this part and the parts of it."""
        yield self

    def shown(self) -> str:
        """Returns the part in words, such as "batch[0] (4, 3)"."""
        return f"{self.path} {shape_of(self.value)}"


class Opaque(Node):
    """A part of an unknown type."""

    def cut(self, start: int, stop: int) -> Any:
        raise UnclearError(f"{self.shown()} is of a type unknown to dtrain")

    def join(self, nodes: list[Any]) -> Any:
        return self.cut(0, 0)


class Rows(Node):
    """A tensor or array; its first dimension is the samples."""

    def __init__(self, value: Any, path: str) -> None:
        super().__init__(value, path)
        self.length = int(value.shape[0])
        self.size: int | None = None
        self.constant = False  # whether it was found to be no samples', such as class weights

    def sizes(self) -> frozenset[int] | None:
        return None if self.constant else frozenset((self.length,))

    def resolve(self, size: int) -> None:
        self.size = size

    def cut(self, start: int, stop: int) -> Any:
        if self.constant:
            return self.value
        if self.length != self.size:
            raise UnclearError(f"the first dimension of {self.shown()} is not the batch's {self.size} samples")
        if isinstance(self.value, Tensor) and self.value.layout is not torch.strided:
            return self.value.index_select(0, torch.arange(start, stop, device=self.value.device))
        return self.value[start:stop]

    def join(self, nodes: list[Any]) -> Any:
        values = [node.value for node in nodes]
        if any(node.length != node.size or value.shape[1:] != self.value.shape[1:] for node, value in _zip(nodes)):
            raise UnclearError(f"{', '.join(node.shown() for node in nodes)} do not join along their first dimension")
        if isinstance(self.value, Tensor):
            return torch.cat(values)
        if isinstance(self.value, np.ndarray):
            return np.concatenate(values)
        raise UnclearError(f"{self.shown()} is of a type that dtrain cannot join")


class Known(Node):
    """A part of a known type."""

    def __init__(self, value: Any, path: str, kind: Kind) -> None:
        super().__init__(value, path)
        self.kind = kind
        self.size: int | None = None

    def sizes(self) -> frozenset[int]:
        return frozenset((self.kind.size(self.value),))

    def resolve(self, size: int) -> None:
        self.size = size

    def cut(self, start: int, stop: int) -> Any:
        self._check()
        try:
            return self.kind.cut(self.value, start, stop)
        except UnclearError as error:
            raise UnclearError(f"{self.shown()} {error}") from None

    def join(self, nodes: list[Any]) -> Any:
        for node in nodes:
            node._check()
        try:
            return self.kind.join(self.value, [one for node in nodes for one in self.kind.samples(node.value)])
        except UnclearError as error:
            raise UnclearError(f"{self.shown()} {error}") from None

    def _check(self) -> None:
        if self.kind.size(self.value) != self.size:
            raise UnclearError(f"{self.shown()} has {self.kind.size(self.value)} samples, and the batch {self.size}")


class Scalars(Node):
    """A list or tuple of texts, numbers and the like, which is cut where it is as long as the batch."""

    size: int | None = None
    whole = False  # whether it was longer or shorter than an earlier batch
    doubtful = False  # whether it was as long as an earlier batch, and is not as long as this one

    def resolve(self, size: int) -> None:
        self.size = size

    @property
    def is_cut(self) -> bool:
        """Whether its items are the samples'."""
        return len(self.value) == self.size and not self.whole

    def cut(self, start: int, stop: int) -> Any:
        if self.doubtful:
            raise UnclearError(f"{self.shown()} was as long as an earlier batch and is not as long as this one")
        return self.value[start:stop] if self.is_cut else self.value

    def join(self, nodes: list[Any]) -> Any:
        return _chained(nodes) if all(node.is_cut for node in nodes) else self.value


class Struct(Node):
    """A part that is made of parts.

    Args:
        value: the part.
        path: where it is.
        children: its parts.
    """

    doubtful = False  # whether it may be a list of samples after all

    def __init__(self, value: Any, path: str, children: dict[Any, Node]) -> None:
        super().__init__(value, path)
        self.children = children

    def sizes(self) -> frozenset[int] | None:
        return _agreed(child.sizes() for child in self.children.values())

    def preferred(self) -> frozenset[int] | None:
        return _agreed(child.preferred() for child in self.children.values())

    def resolve(self, size: int) -> None:
        for child in self.children.values():
            child.resolve(size)

    def cut(self, start: int, stop: int) -> Any:
        self._check()
        return self._rebuilt({key: child.cut(start, stop) for key, child in self.children.items()}, start, stop)

    def _check(self) -> None:
        if self.doubtful:
            raise UnclearError(f"{self.shown()} is a list of samples or of parts. Yield a tuple where it is parts")

    def join(self, nodes: list[Any]) -> Any:
        self._check()
        if any(node.children.keys() != self.children.keys() for node in nodes):
            raise UnclearError(f"{self.path} has other parts in one batch than in another")
        parts = {key: child.join([node.children[key] for node in nodes]) for key, child in self.children.items()}
        return made_of(self.value, parts, lambda encodings: [one for node in nodes for one in encodings_of(node.value)])

    def nodes(self) -> Iterator[Node]:
        yield self
        for child in self.children.values():
            yield from child.nodes()

    def _rebuilt(self, parts: dict[Any, Any], start: int, stop: int) -> Any:
        return made_of(self.value, parts, lambda encodings: encodings[start:stop])


class Sequence(Struct):
    """A list or tuple that is samples or parts.

    Attributes:
        samples: whether it is samples, one each; None where it is not known.
        likely: whether that is what it looks like, and nothing in the batch says it.
    """

    samples: bool | None = None
    likely = False

    def sizes(self) -> frozenset[int] | None:
        length = frozenset((len(self.value),))
        if self.samples is not None:
            return length if self.samples else super().sizes()
        parts = super().sizes()
        if parts and not self.of_one_sort():
            return parts  # features and labels, say: as samples they would be alike
        return None if parts is None else length | parts

    def preferred(self) -> frozenset[int] | None:
        if self.samples is not None or super().sizes() is None:
            return self.sizes()
        if self.looks_like_samples():
            return frozenset((len(self.value),))
        return self.sizes() if self.of_one_sort() else super().preferred() or self.sizes()

    def of_one_sort(self) -> bool:
        """Whether its items have what samples have in common: type, keys or length, number of dimensions."""
        return len({sort_of(one) for one in self.value}) == 1

    def looks_like_samples(self) -> bool:
        """Whether its items are mappings or tuples of one form, or tensors of one sort and unequal shapes."""
        tensors = isinstance(self.value[0], (Tensor, np.ndarray))
        return self.of_one_sort() and not (tensors and len({tuple(one.shape) for one in self.value}) == 1)

    def common_length(self) -> int | None:
        """Returns the number of samples that it would have as parts, where there is just one."""
        sizes = super().sizes()
        return next(iter(sizes)) if sizes is not None and len(sizes) == 1 else None

    def resolve(self, size: int) -> None:
        if self.samples is None:
            parts = super().sizes()
            possible = len(self.value) == size, parts is not None and size in parts
            if possible[0] != possible[1] or parts is None:  # of scalars alone, it is as a list of scalars
                self.samples = possible[0]
            elif possible[0] and self.looks_like_samples():
                self.samples = self.likely = True
        if not self.samples:
            super().resolve(size)

    def cut(self, start: int, stop: int) -> Any:
        if self.samples:
            return self.value[start:stop]
        return super().cut(start, stop)

    def join(self, nodes: list[Any]) -> Any:
        for node in nodes:
            node._check()
        return _chained(nodes) if self.samples else super().join(nodes)

    def nodes(self) -> Iterator[Node]:
        if self.samples:
            yield self
        else:
            yield from super().nodes()

    def _check(self) -> None:
        if self.samples is None:
            raise UnclearError(f"{self.shown()} is a list of samples, or of parts that have the samples in their rows")


def tree_of(
    value: Any, path: str = "batch", *, collated: bool = False, known: Mapping[str, bool] | None = None
) -> Node:
    """Returns a part of a batch as a tree.

    Args:
        value: the part.
        path: where it is.
        collated: whether torch's default_collate made it, of which a list or tuple is never samples.
        known: path -> whether the list or tuple there is samples.
    """
    known = known or {}
    kind = None if type(value) is Tensor and not value.is_nested else known_kind(value)
    if kind is not None:
        return Known(value, path, kind)
    if isinstance(getattr(value, "shape", None), tuple) and not isinstance(value, (Mapping, list, tuple)):
        return Rows(value, path) if len(value.shape) > 0 else Node(value, path)
    parts = _parts_of(value, path)
    if parts is None:
        return Node(value, path) if isinstance(value, (*_PLAIN, np.generic)) else Opaque(value, path)
    listed = isinstance(value, (list, tuple)) and not hasattr(value, "_fields")
    if listed and (all(map(_is_scalar, value)) or _are_objects(value)):
        return Scalars(value, path)
    children = {key: tree_of(part, where, collated=collated, known=known) for key, (part, where) in parts.items()}
    if not listed or collated or not all(_may_be_sample(part) for part, _ in parts.values()):
        return Struct(value, path, children)
    node = Sequence(value, path, children)
    node.samples = known.get(path)
    return node


def struct_of(node: Sequence) -> Struct:
    """Returns a list or tuple as one of parts."""
    return Struct(node.value, node.path, node.children)


def _parts_of(value: Any, path: str) -> dict[Any, tuple[Any, str]] | None:
    """Returns the parts of what is made of parts, each with its place; None for what is not."""
    if isinstance(value, Mapping):
        return {key: (value[key], f"{path}[{key!r}]") for key in value}
    if isinstance(value, torch.Size):
        return None
    if isinstance(value, (list, tuple)):
        return {index: (part, f"{path}[{index}]") for index, part in enumerate(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        return {name: (getattr(value, name), f"{path}.{name}") for name in names}
    return None


def _agreed(told: Iterator[frozenset[int] | None]) -> frozenset[int] | None:
    sets = [sizes for sizes in told if sizes is not None]
    return frozenset.intersection(*sets) if sets else None


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (*_PLAIN, np.generic)) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0)


def _are_objects(values: Any) -> bool:
    """Whether there are several objects of one unknown type, such as images of Pillow's, or graphs."""
    known = (Tensor, np.ndarray, Mapping, list, tuple)
    return (
        len(values) > 0
        and len({type(value) for value in values}) == 1
        and not isinstance(values[0], known)
        and not hasattr(values[0], "shape")
        and not dataclasses.is_dataclass(values[0])
        and known_kind(values[0]) is None
    )


def _may_be_sample(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0
    return isinstance(value, (Mapping, tuple, list)) and len(value) > 0 and known_kind(value) is None


def _chained(nodes: list[Any]) -> Any:
    items = [item for node in nodes for item in node.value]
    like = nodes[0].value
    return items if type(like) is list else type(like)(items)


def _zip(nodes: list[Any]) -> Iterator[tuple[Any, Any]]:
    return ((node, node.value) for node in nodes)
