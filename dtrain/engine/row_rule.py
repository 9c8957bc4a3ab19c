"""Which dimension of a random tensor goes along the batch, by its shape alone: a rule for what is not known better."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.errors import StepError

_MOST_FRAMES = 40
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


def by_shape_of(like: Tensor | None, shape: tuple[int, ...], part: Part, weights: Iterable[Tensor]) -> int | None:
    """The same, where a parameter may have the shape: numbers like a parameter are the parameter's.

    Args:
        like: the tensor that the numbers are drawn for, as by `randn_like` and dropout; None where it isn't known.
        shape: of the numbers.
        part: of the batch.
        weights: the net's.

    Raises:
        StepError: they may be either.
    """
    like = _given_to_dropout() if like is None else like
    if like is not None and is_weight(like, weights):
        return None
    taken = by_shape(shape, part)
    if taken is not None and like is None and shape in part.shapes and known_layout() is None:
        raise StepError(
            f"same_draws: the step draws random numbers of shape {shape}, which are for a parameter of that shape or "
            f"for the {part.rows} samples that this rank has of the batch's {part.total}: dtrain cannot tell which. "
            "For the parameter, draw torch.randn_like(parameter); for the samples torch.randn_like(x), x being what it "
            f"is for, or in another shape, as in torch.randn({', '.join(map(str, shape))}, 1)[..., 0]. Or set "
            "train.same_draws=false (same_draws=False in Python): each rank then draws its own random numbers."
        )
    return taken


def is_weight(like: Any, weights: Iterable[Tensor]) -> bool:
    """Whether a tensor is a parameter, or what is in its memory, as `parameter.detach()` is."""
    if isinstance(like, nn.Parameter):
        return True
    if not isinstance(like, Tensor) or like.requires_grad or like.layout != torch.strided:
        return False
    same = (one for one in weights if (one.shape, one.dtype, one.device) == (like.shape, like.dtype, like.device))
    return any(like.is_set_to(one) for one in same)


def _given_to_dropout() -> Tensor | None:
    """Returns what the dropout of torch's own was called with that is being computed."""
    frame, times = sys._getframe(2), 0
    while frame is not None and times < _MOST_FRAMES:
        if frame.f_code in _dropouts():
            given = frame.f_locals.get("input", frame.f_locals.get("logits"))
            return given if isinstance(given, Tensor) else None
        frame, times = frame.f_back, times + 1  # type: ignore[assignment]
    return None


def if_as_many(shape: tuple[int, ...], part: Part) -> int | None:
    """One for each row."""
    return 0 if shape[0] == part.rows else None


def if_several(shape: tuple[int, ...], part: Part) -> int | None:
    """As many for each row."""
    return 0 if shape[0] % part.rows == 0 else None


def known_layout() -> int | None:
    """Returns along which dimension the batch goes in the layer of torch's own that is being computed, if known."""
    frame, times = sys._getframe(2), 0
    while frame is not None and times < _MOST_FRAMES:
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
def _dropouts() -> frozenset[Any]:
    kinds = ("alpha_dropout", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout")
    return frozenset(getattr(nn.functional, kind).__code__ for kind in (*kinds, "gumbel_softmax"))


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
