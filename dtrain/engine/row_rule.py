"""Which dimension of a random tensor goes along the batch, by its shape alone: a rule for what is not known better."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

_FLATTENED = 2  # dimensions that a tensor with several rows to a sample has at least


@dataclass(frozen=True, slots=True)
class Part:
    """A rank's rows of a global batch.

    Attributes:
        first: where they begin.
        rows: how many there are; less than `total`.
        total: the rows of the whole batch.
        shapes: of tensors that are known not to be shaped after the batch, the net's parameters.
    """

    first: int
    rows: int
    total: int
    shapes: frozenset[tuple[int, ...]] = frozenset()


def by_shape(shape: tuple[int, ...], part: Part) -> int | None:
    """Returns the first one, also with several rows to a sample (tokens, heads), or, time first, the second one.

    None where none seems to go along the batch.
    """
    rows = part.rows
    if shape == (1,):
        return None  # `torch.rand(1)` is one number for all, also where the part has one sample
    several = shape[0] % rows == 0 and len(shape) >= _FLATTENED
    if len(shape) > 1 and shape[1] == rows and several:  # either may be meant
        known = known_layout()
        return known if known is not None else int(shape[0] != rows and shape[2:] not in {(), (rows,)})
    if shape[0] == rows:
        return 0
    if shape in part.shapes:
        return None
    if len(shape) > 1 and shape[1] == rows:
        return 1
    return 0 if several and shape[0] else None


def if_as_many(shape: tuple[int, ...], part: Part) -> int | None:
    """One for each row."""
    return 0 if shape[0] == part.rows else None


def if_several(shape: tuple[int, ...], part: Part) -> int | None:
    """As many for each row."""
    return 0 if shape[0] % part.rows == 0 else None


def known_layout() -> int | None:
    """Returns along which dimension the batch goes in the layer of torch's own that is being computed, if known."""
    frame, times = sys._getframe(2), 0
    while frame is not None and times < 40:
        code = frame.f_code
        if code in _time_first():
            return 1
        if code in _heads_first():
            return 0
        if code in _either():
            return 0 if frame.f_locals["self"].self_attn.batch_first else 1
        frame, times = frame.f_back, times + 1  # type: ignore[assignment]
    return None


@functools.cache
def _time_first() -> frozenset[Any]:
    """Recurrent layers, which turn what they are given over to it."""
    return frozenset(kind.forward.__code__ for kind in (nn.RNN, nn.GRU, nn.LSTM))


@functools.cache
def _heads_first() -> frozenset[Any]:
    return frozenset({nn.functional.multi_head_attention_forward.__code__})


@functools.cache
def _either() -> frozenset[Any]:
    kinds, names = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer), ("_sa_block", "_ff_block", "_mha_block")
    return frozenset(getattr(kind, name).__code__ for kind in kinds for name in names if hasattr(kind, name))
