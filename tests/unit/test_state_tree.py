"""States taken apart to JSON and tensors, and put together again; nothing else is ever made of them."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file

from dtrain.checkpoint.tensors import DTYPES, pieces
from dtrain.checkpoint.tree import flatten, unflatten
from dtrain.errors import CheckpointError


def tensor_of(dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    count = int(np.prod(shape))
    data = torch.arange(count * dtype.itemsize, dtype=torch.int64).mul(37).remainder(251).to(torch.uint8)
    if dtype is torch.bool:
        return (data % 2).bool().reshape(shape)
    return data.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


SHAPES = st.lists(st.integers(0, 3), max_size=3)
TENSORS = st.builds(tensor_of, st.sampled_from(list(DTYPES)), SHAPES)
ARRAYS = st.builds(
    lambda kind, n: np.arange(n).astype(kind), st.sampled_from(["u1", "<i8", ">i4", "f4", "f8", "?"]), st.integers(0, 4)
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.complex_numbers(allow_nan=False),
    st.sampled_from([torch.float32, torch.bfloat16, torch.Size([2, 3])]),
)
KEYS = st.one_of(
    st.integers(), st.text(max_size=3), st.booleans(), st.none(), st.tuples(st.integers(), st.text(max_size=2))
)
TREES = st.recursive(
    st.one_of(SCALARS, TENSORS, ARRAYS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict),
        st.sets(st.integers(), max_size=3),
        st.frozensets(st.text(max_size=2), max_size=3),
    ),
    max_leaves=12,
)


def same(one: Any, two: Any) -> bool:
    """Equal to the last bit, types included."""
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(a, b) for a, b in zip(one.values(), two.values(), strict=True))
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return bits(one) == bits(two)


def bits(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, load_bytes(value)
    if isinstance(value, np.ndarray):
        return value.dtype.newbyteorder("="), value.tolist()
    # Of a float, all its digits; and nan is nan.
    return value if isinstance(value, (set, frozenset)) else repr(value)


def load_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def through_disk(value: Any) -> Any:
    structure, tensors = flatten(value, "state")
    data = b"".join(pieces({name: tensor.contiguous() for name, tensor in tensors.items()}))
    return unflatten(json.loads(json.dumps(structure)), load(data))


@settings(max_examples=300, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
@given(value=TREES)
def test_what_is_taken_apart_comes_back_equal(value: Any) -> None:
    assert same(value, through_disk(value))


def test_an_optimizers_state_comes_back_equal() -> None:
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(2))]
    for kind in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.LBFGS):
        optimizer = kind(parameters, lr=0.1)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(lambda: torch.zeros(())) if kind is torch.optim.LBFGS else optimizer.step()
        assert same(optimizer.state_dict(), through_disk(optimizer.state_dict())), kind


def test_one_dict_with_1_and_text_1_as_keys() -> None:
    value = {1: torch.ones(1), "1": torch.zeros(1), "a/b": torch.ones(2), "a": {"b": torch.zeros(2)}}
    assert same(value, through_disk(value))


class Foreign:
    pass


@pytest.mark.parametrize(
    "value", [Foreign(), lambda: 0, Foreign, np.array([Foreign()]), np.array(["a"]), torch.zeros(2).to_sparse()]
)
def test_what_cannot_be_held_is_named(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"state/outer/1 is a .* a checkpoint cannot contain"):
        flatten({"outer": [1, value]}, "state")


@pytest.mark.parametrize(
    "structure",
    [
        [1],
        {"list": 1},
        {"dict": [[1]]},
        {"dict": [[{"list": []}, 1]]},
        {"tensor": "nobody"},
        {"dtype": "load"},
        {"dtype": "nn"},
        {"size": ["a"]},
        {"__reduce__": ["os.system", "true"]},
        {"list": [], "tuple": []},
        {},
        {"complex": [1, 2, 3]},
        {"bytes": "xx"},
    ],
)
def test_a_structure_that_is_none_is_refused(structure: Any) -> None:
    with pytest.raises(CheckpointError):
        unflatten(structure, {})


@settings(max_examples=100, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
@given(tensors=st.dictionaries(st.text(min_size=1, max_size=4), TENSORS, max_size=5))
def test_the_formats_own_library_reads_what_is_written(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop("__metadata__", None)
    loaded = load(b"".join(pieces(tensors)))
    assert loaded.keys() == tensors.keys()
    assert all(same(tensors[name], loaded[name]) for name in tensors)


def test_pieces_of_a_large_tensor(tmp_path: Path) -> None:
    tensor = torch.arange(9_000_000, dtype=torch.float32)
    parts = list(pieces({"a": tensor, "b": torch.ones(3, dtype=torch.int8)}))
    assert len(parts) > 3, "no piece is larger than 16 MiB"
    (tmp_path / "t").write_bytes(b"".join(parts))
    assert torch.equal(load_file(tmp_path / "t")["a"], tensor)
