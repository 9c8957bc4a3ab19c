"""Batches of any nesting, drawn at random, and whether two are equal."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from helpers.batch_kinds import Encoding, Graph, Graphs


class Pair(collections.namedtuple("Pair", ["one", "two"])):
    """A tuple with names."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A frozen one, whose parts a copy must get all the same."""

    x: Any
    name: str = "whole"


class Ordered(collections.OrderedDict):
    """A dict of the user's own type."""


def numbers(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def packed(generator: torch.Generator, n: int) -> PackedSequence:
    lengths = torch.randint(1, 5, (n,), generator=generator).tolist()
    return pack_sequence([numbers(generator, length, 2) for length in lengths], enforce_sorted=False)


def graphs(generator: torch.Generator, n: int) -> Graphs:
    sizes = torch.randint(1, 6, (n,), generator=generator).tolist()
    made = [
        Graph(numbers(generator, size, 3), torch.randint(0, size, (2, size + 1), generator=generator)) for size in sizes
    ]
    return Graphs.from_data_list(made)


def images(generator: torch.Generator, n: int) -> list[Tensor]:
    return [numbers(generator, 3, 4 + i % 3, 5 + i % 2) for i in range(n)]


def targets(generator: torch.Generator, n: int) -> list[dict[str, Tensor]]:
    counts = torch.randint(0, 4, (n,), generator=generator).tolist()
    return [{"boxes": numbers(generator, k, 4), "labels": torch.arange(k)} for k in counts]


LEAVES: dict[str, Any] = {
    "rows": lambda g, n: numbers(g, n, 2),
    "vector": numbers,
    "array": lambda g, n: numbers(g, n, 3).numpy(),
    "texts": lambda g, n: [f"text {i}" for i in range(n)],
    "images": images,
    "targets": targets,
    "image tuple": lambda g, n: tuple(images(g, n)),
    "packed": packed,
    "graphs": graphs,
    "nested": lambda g, n: torch.nested.nested_tensor(
        [numbers(g, 1 + i % 3, 2) for i in range(n)], layout=torch.jagged
    ),
    "sparse": lambda g, n: numbers(g, n, 4).relu().to_sparse(),
    "number": lambda g, n: 0.5,
    "0-d": lambda g, n: torch.tensor(2.0),
    "nothing": lambda g, n: None,
    "text": lambda g, n: "whole",
}
NODES: dict[str, Any] = {
    "tuple": tuple,
    "dict": lambda parts: {f"part {i}": part for i, part in enumerate(parts)},
    "own dict": lambda parts: Ordered((str(i), part) for i, part in enumerate(parts)),
    "named tuple": lambda parts: Pair(parts[0], parts[-1]),
    "dataclass": lambda parts: Sample(parts[0]),
    "encoding": lambda parts: Encoding({f"part {i}": part for i, part in enumerate(parts)}),
}
FORMS = st.recursive(
    st.sampled_from(sorted(LEAVES)),
    lambda inner: st.tuples(st.sampled_from(sorted(NODES)), st.lists(inner, min_size=1, max_size=3)),
    max_leaves=6,
)


def built(form: Any, generator: torch.Generator, n: int) -> Any:
    if isinstance(form, str):
        return LEAVES[form](generator, n)
    return NODES[form[0]]([built(part, generator, n) for part in form[1]])


def equal(one: Any, other: Any) -> bool:  # noqa: PLR0911 - one for each type
    """Whether two batches have the same types and values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, PackedSequence):
        return all(a is b is None or torch.equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, Tensor):
        if one.is_nested:
            return all(torch.equal(a, b) for a, b in zip(one.unbind(), other.unbind(), strict=True))
        dense = (one.to_dense(), other.to_dense()) if one.is_sparse else (one, other)
        return dense[0].shape == dense[1].shape and torch.equal(*dense)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, (Graphs, Sample, Graph)):
        return equal(vars(one), vars(other))
    if isinstance(one, collections.abc.Mapping):
        own = [{k: v for k, v in vars(each).items() if k != "data"} for each in (one, other) if hasattr(each, "data")]
        same = not own or equal(*own)
        return same and list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


IMAGES = images(torch.Generator().manual_seed(0), 10)
