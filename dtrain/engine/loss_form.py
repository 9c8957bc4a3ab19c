"""What shows in a loss's graph: whether it is a mean over the samples, as averaging the ranks' losses takes it to be.

::

    loss.mean(), cross_entropy(x, y), loss.sum() / len(x)       a mean: the ranks' average is one process's
    loss.sum(), 0.01 * loss.sum(), reduction="sum"              a sum: refused
    cross_entropy(x, y, weight=w), loss[mask].mean(),
    loss.mean() over what is padded to the longest sample,
    loss.sum() / mask.sum(), mse.sqrt(), 1 - dice               neither: a warning says so

Looked at once, and again when a batch of another size comes, since `loss.sum() / 100` is a mean of 100 samples only.
What mixes the samples before they are summed up: `dtrain.engine.sample_mixing`; ranks with means over different numbers
of values: `dtrain.engine.value_counts`.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from dtrain.data.partition import RankBatch
from dtrain.engine.loss_graph import (
    PASSED_ON,
    Divisor,
    constant_of,
    is_one,
    kind_of,
    nodes_below,
    picks,
    saved_of,
    shape_of,
    signed_of,
    values_of,
)
from dtrain.engine.loss_memory import LossMemory
from dtrain.engine.loss_words import (
    ALONE,
    AVERAGED,
    BETWEEN_SAMPLES,
    COUNT,
    DIFFERING,
    FOLLOWS,
    FUNCTIONS,
    GROUPED,
    GROUPING,
    LEAVE_OUT,
    MIXED,
    STATISTICS,
)
from dtrain.engine.metrics import Mean
from dtrain.engine.sample_mixing import SampleMixing
from dtrain.engine.value_counts import ToldForms, ValueCounts
from dtrain.errors import StepError

logger = logging.getLogger(__name__)

_Sizes = tuple[tuple[str, int], ...]  # the samples by loader

_MEAN, _SUM = 1, 2  # torch's reductions
_MOST_LOOKS = 2
_MOST_NOTED = 10  # steps whose outputs are noted, whether or not there is a loss to look at
_MOST_NODES = 1000  # of a graph that are looked at
_MOST_BELOW = 12
_NOTHING = contextlib.nullcontext()


class LossForm:
    """Looks at the losses of a run's first train step, and of the first one with a batch of another size.

    Args:
        module: the net.
        counts: has several ranks compare how many values their means go over.
        forms: has the first rank know what others saw.
        averaged: whether a loss is one of several that are averaged; nothing is looked at where it is not.
        warns: whether this rank warns.
        eager: whether the net is a whole one that is not compiled, whose outputs can be noted.
    """

    def __init__(  # noqa: PLR0913 - what a run says of its losses
        self,
        module: nn.Module,
        counts: ValueCounts | None = None,
        forms: ToldForms | None = None,
        *,
        averaged: bool,
        warns: bool,
        eager: bool = True,
    ) -> None:
        self._shapes = {tuple(parameter.shape) for parameter in module.parameters()} if averaged else set()
        self._warns = warns
        self._mixing = SampleMixing(module) if averaged and warns and eager else None
        self._counts, self._forms = counts, forms
        self._left, self._notes_left = _MOST_LOOKS if averaged else 0, _MOST_NOTED
        self._sizes: set[_Sizes] = set()
        self._again = _MOST_NOTED  # looks that may be taken once more, as they have left it open
        self._memories: dict[str, LossMemory] = {}  # by loader

    def look_at(self, loss: Any, rank_batch: RankBatch) -> None:
        """Looks at a loss that was returned with its graph, where that is due; see `look`."""
        if self._left and _sizes_of(rank_batch) not in self._sizes:
            self.look(loss, rank_batch.rows, step=rank_batch.whole_start, by_loader=rank_batch.row_counts)
            self._forget()

    def of_step(self, rank_batch: RankBatch) -> AbstractContextManager[None]:
        """While inside, a step is watched: what the net returns, and each loss, before `backward()` is called on it."""
        if self._counts is not None and self._warns and (differing := self._counts.differing()) is not None:
            self._warn(_Form(DIFFERING % differing, LEAVE_OUT))
        if self._forms is not None and self._warns and (told := self._forms.told()) is not None:
            self._warn(_Form(*told))
        return self._watching(rank_batch) if self._left and _sizes_of(rank_batch) not in self._sizes else _NOTHING

    def _forget(self) -> None:
        if self._mixing is not None:
            self._mixing.forget()

    @contextlib.contextmanager
    def _watching(self, rank_batch: RankBatch) -> Iterator[None]:
        own, mixing = torch.autograd.backward, self._mixing if self._warns and self._notes_left else None
        self._notes_left -= mixing is not None

        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            losses = (tensors,) if isinstance(tensors, (Tensor, GradientEdge)) else tuple(tensors)
            for one in losses:
                self.look(one, rank_batch.rows, step=rank_batch.whole_start, by_loader=rank_batch.row_counts)
            own(losses, *args, **kwargs)

        torch.autograd.backward = backward
        try:
            with _NOTHING if mixing is None else mixing.noting(rank_batch.batch, rank_batch.rows):
                yield
        finally:
            torch.autograd.backward = own
            if _sizes_of(rank_batch) in self._sizes:  # else the loss is returned with its graph, and looked at then
                self._forget()

    def look(self, loss: Any, rows: int, *, step: int = 0, by_loader: Mapping[str, int] | None = None) -> None:
        """Refuses a loss that is a sum over the samples, and warns of one that is no mean over them.

        Args:
            loss: with its graph, also as `dtrain.Mean`, whose total need be no mean; what else it is is let by.
            rows: samples that it was computed of.
            step: where the whole batch begins in the epoch.
            by_loader: the samples of each of several loaders, of which the loss has means or sums of its own.

        Raises:
            StepError: it is a sum.
        """
        total = loss.total if isinstance(loss, Mean) else loss
        if not isinstance(total, Tensor) or total.grad_fn is None or total.numel() != 1:
            return
        sizes: _Sizes = tuple((by_loader or {"": rows}).items())
        self._begin(sizes)
        walks = [_Walk(count, self._shapes, self._memories[name]) for name, count in sizes]
        found = None if total is not loss else _of_all([walk.of(total.grad_fn) for walk in walks])
        if self._counts is not None:
            self._counts.say(step, rows, walks[0].values)
        mixing = self._mixing if self._warns and len(sizes) == 1 else None
        if found is None and mixing is not None and mixing.found(total, rows):
            found = _Form(BETWEEN_SAMPLES, f"{MIXED} {ALONE}")
        if found is None:
            if any(walk.is_open for walk in walks):
                self._leave_open(sizes)
            return
        if found.is_sum:
            raise StepError(
                f"the loss is a sum over the batch's samples ({found.what}). {AVERAGED}, so the result would differ "
                "from that of a single process. Return the mean over the samples (times the "
                "batch size, as a constant, for steps as "
                "long as the sum's), or dtrain.Mean(total, count) where another count is right."
            )
        if self._warns:
            self._warn(found)
        elif self._forms is not None:
            self._forms.say(found.what, found.remedy)

    def _begin(self, sizes: _Sizes) -> None:
        new = [name for name, _ in sizes if name not in self._memories]
        self._left += _MOST_LOOKS if new and self._memories else 0  # loaders that take turns
        self._memories |= {name: LossMemory() for name in new}
        for name, rows in sizes:
            self._memories[name].begin(rows)
        if sizes in self._sizes:
            return
        self._sizes.add(sizes)
        self._left -= 1
        if self._forms is not None:
            self._forms.look()

    def _leave_open(self, sizes: _Sizes) -> None:
        """The next batch of so many samples is looked at, too."""
        if self._again:
            self._again -= 1
            self._left += 1
            self._sizes.discard(sizes)

    def _warn(self, found: _Form) -> None:
        self._warns = False
        logger.warning(
            "the loss is no mean over the batch's samples: %s. %s, so that gradients and history are not those of "
            "one process. %s",
            *(found.what, AVERAGED, found.remedy),
        )


@dataclass(frozen=True, slots=True)
class _Form:
    """What a loss is, where it is no mean over the samples."""

    what: str
    remedy: str = ""
    is_sum: bool = False


def _of_all(forms: list[_Form | None]) -> _Form | None:
    """Returns what a loss is, looked at for the samples of each loader: a sum for any, or no mean for any of them."""
    found = [form for form in forms if form is not None]
    return next((form for form in found if form.is_sum), found[0] if len(found) == len(forms) else None)


def _sizes_of(rank_batch: RankBatch) -> _Sizes:
    return tuple(rank_batch.row_counts.items())


class _Walk:
    """Goes from a loss down to where samples are reduced to one number, through what is linear in it.

    Attributes:
        values: how many each mean that was found goes over.
        is_open: whether another batch may show more: nothing was seen but a loss times 0, or a mask left nothing out.
    """

    def __init__(self, rows: int, shapes: set[tuple[int, ...]], memory: LossMemory) -> None:
        self.values: list[float] = []
        self.is_open = False
        self._rows, self._shapes, self._memory = rows, shapes, memory
        self._left = _MOST_NODES

    def of(self, root: Any) -> _Form | None:
        """Returns what the loss is; a sum first, None for what seems a mean."""
        found: list[_Form] = []
        nodes: list[tuple[Any, tuple[Divisor, ...], int]] = [(root, (), 0)]
        while nodes and self._left > 0:
            node, divisors, place = nodes.pop()
            self._left -= 1
            if node is None:
                continue
            kind = kind_of(node)
            place = hash((place, kind, len(nodes)))
            if kind in PASSED_ON:
                nodes += [(below, divisors, place) for below in nodes_below(node)]
            elif kind in {"Mul", "Div"} and (known := constant_of(node, kind)) is not None:
                zero = not known.value  # has gradients for the sake of them
                self.is_open |= zero and node is root
                if not zero:
                    nodes += [(below, (*divisors, known), place) for below in nodes_below(node)]
            elif kind in {"Mul", "Div"}:
                reducing = [below for below in nodes_below(node) if self._reduces(below)]
                divided_by = kind == "Div" and node.next_functions[1][0] in reducing
                if divided_by or len(reducing) > 1:
                    found.append(_Form("a ratio or product of several sums over the batch", MIXED))
                else:  # as of a loss and its learnt weight
                    nodes += [(below, divisors, place) for below in reducing]
            elif (form := self._form(node, kind, divisors, place)) is not None:
                found.append(form)
        return next((form for form in found if form.is_sum), found[0] if found else None)

    def _form(self, node: Any, kind: str, divisors: tuple[Divisor, ...], place: int) -> _Form | None:
        """What the end of the linear part is."""
        if kind in {"Sum", "Mean"} and self._is_of_groups(node):
            return _Form(GROUPED, MIXED)
        is_sum = (kind == "Sum" and self._is_over_rows(node, place)) or saved_of(node, "reduction") == _SUM
        form = self._sum(divisors) if is_sum else self._reduced(node, kind, place)
        if (form is None or not form.is_sum) and not any(divisor.computed for divisor in divisors):
            factor = 1 / math.prod(divisor.value for divisor in divisors)
            if self._memory.follows("factor", place, factor * self._rows if is_sum else factor):
                return _Form(FOLLOWS % (factor, self._rows), is_sum=True)
        return form

    def _reduced(self, node: Any, kind: str, place: int) -> _Form | None:
        """What it is, where it is no sum over the samples."""
        if kind in FUNCTIONS and is_one(node) and any(map(self._reduces, nodes_below(node))):
            return _Form(f"it is {FUNCTIONS[kind]} of a mean over them", MIXED)
        if kind in STATISTICS and is_one(node) and self._is_of_rows(shape_of(node)):
            return _Form(f"it is {STATISTICS[kind]} over them", MIXED)
        if kind.startswith("NllLoss") and saved_of(node, "reduction") == _MEAN:
            return self._likelihood(node, place)
        if kind == "Mean" or saved_of(node, "reduction") == _MEAN:
            return self._selection(node)
        return None

    def _sum(self, divisors: tuple[Divisor, ...]) -> _Form | None:
        if counting := [divisor.value for divisor in divisors if divisor.counts(self._rows)]:
            self.values.append(counting[0])
            return None
        computed = [divisor.value for divisor in divisors if divisor.computed]
        if computed:
            given = f"{computed[0]:g} where the batch has {self._rows} samples"
            return _Form(f"it is a sum divided by a number that the batch gives ({given}: tokens, positives?)", COUNT)
        said = [divisor.words for divisor in divisors if divisor.value != 1.0]
        return _Form(", ".join([".sum(), or reduction='sum'", *said]), is_sum=True)

    def _likelihood(self, node: Any, place: int) -> _Form | None:
        """Of `cross_entropy` and `nll_loss`."""
        scores, weight, target = (saved_of(node, name) for name in ("self", "weight", "target"))
        if isinstance(weight, Tensor) and bool((weight != weight.reshape(-1)[0]).any()):
            return _Form("classes have weights, by whose sum it is divided", COUNT)
        ignored = saved_of(node, "ignore_index")
        if isinstance(target, Tensor) and ignored is not None:
            ignored -= (ignored >= 1 << 63) << 64  # torch tells it without its sign
            if bool((target == ignored).any()):
                return _Form(f"labels of {ignored} are left out, and it is divided by the number of the others", COUNT)
        shape = () if scores is None else tuple(scores.shape)
        if shape == (self._rows, self._rows) and self._memory.follows("pairs", place, self._rows):
            return _Form("it compares each of them with all others of the batch", MIXED)
        return self._selection(node)

    def _reduces(self, node: Any) -> bool:
        """Whether samples are reduced to one number below, before anything else is made of them."""
        nodes, left = [node], _MOST_BELOW
        while nodes and left:
            node, left = nodes.pop(), left - 1
            if node is None:
                continue
            kind = kind_of(node)
            over = kind in {"Sum", "Mean"} and self._is_of_rows(shape_of(node))
            if over or saved_of(node, "reduction") in {_MEAN, _SUM}:
                return True
            if kind in PASSED_ON or kind in {"Mul", "Div"} or (kind in FUNCTIONS and is_one(node)):
                nodes += nodes_below(node)
        return False

    def _is_of_groups(self, node: Any) -> bool:
        """Whether what is summed up are sums over groups of the samples."""
        nodes, left = nodes_below(node), _MOST_BELOW
        while nodes and left:
            node, left = nodes.pop(), left - 1
            kind, index = kind_of(node), saved_of(node, "index")
            if kind in GROUPING and isinstance(index, Tensor) and index.shape[:1] == (self._rows,):
                return True
            if kind in PASSED_ON or kind in {"Mul", "Div"}:
                nodes += nodes_below(node)
        return False

    def _is_over_rows(self, node: Any, place: int) -> bool:
        """Whether a sum goes over the samples; not of a list's losses, nor where their number is fixed."""
        shape = shape_of(node)
        if self._memory.stays("length", place, shape[0] if shape else 0):
            return False
        dims = saved_of(node, "dim")
        if dims is not None and 0 not in [d % max(1, len(shape)) for d in map(signed_of, dims)]:
            return False
        below = [kind_of(one) for one in nodes_below(node)]
        if {"Stack", "Cat"} & set(below):
            return False
        if self._is_of_rows(shape):
            return True
        flat = len(shape) == 1 and below[:1] in (["View"], ["UnsafeView"], ["ReshapeAlias"])
        return flat and self._is_of_rows(shape_of(nodes_below(node)[0]))

    def _is_of_rows(self, shape: tuple[int, ...]) -> bool:
        return shape[:1] == (self._rows,) and shape not in self._shapes

    def _selection(self, node: Any) -> _Form | None:
        """Where a mean goes over values that a mask or indices picked, and not as many for each sample."""
        shape = shape_of(node)
        self.values.append(values_of(node))
        if not shape or not picks(node):
            return None
        if shape[0] % self._rows == 0 or self._rows in shape[:2]:
            self.is_open = True
            return None
        return _Form(f"it is the mean over {shape[0]} that are selected from {self._rows} samples", COUNT)
