"""Whether the ranks still train the same net: they compare gradients and weights, after the first steps, then rarely.

::

    before an optimizer steps:   a checksum of the bits of each of its gradients, and of its settings
    after a due train step:      all these, those of the weights, and the number of optimizer steps, in one collective

Bits that differ are looked at again as numbers: what kernels and machines of different kinds compute may differ in the
last places. More than that is an error that names the parameter, however small the learning rate. It costs nothing in
the steps between, and the comparisons are made where all ranks come by, never within a user's step.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.distributed.dtensor import is_sharded
from dtrain.distributed.world import World
from dtrain.errors import StepError

_GROUPS = 64  # sums that stand for a gradient
_ULPS = 8
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FIRST_ALL = 4
_MOST_STEPS = 8  # of an optimizer that are looked at within a train step

_ALIKE = "Draw noise from a generator with the same seed on all ranks, and average other values over the ranks."
_LEFT_OUT = "Every rank must step the same optimizers the same number of times."
_SETTINGS = "Set the learning rate from values that are the same on all ranks: the step, the epoch, the history."


def is_due(step: int) -> bool:
    """Whether ranks compare after a train step: 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ... (1 is the first one)."""
    top = step & -step  # the largest power of two that divides it
    return step <= _FIRST_ALL or step == top or step == 3 * top


class Drift:
    """Finds ranks that drift apart.

    Args:
        world: several ranks.

    Attributes:
        steps: that optimizers have taken since the last comparison.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._armed = False
        self._seen: Counter[int] = Counter()  # id -> steps of an optimizer that were looked at since it was armed
        self._sums: dict[int, Tensor] = {}  # of the bits of gradients, by parameter
        self._groups: dict[int, Tensor] = {}
        self._settings: list[list[dict[str, float]]] = []
        self._taken = 0  # steps in all
        self.steps = 0

    def arm(self) -> None:
        """Has the next step of each optimizer looked at."""
        self._armed = True

    def before_step(self, optimizer: Optimizer, known: Mapping[int, int]) -> None:
        """An optimizer is about to step on the gradients that there are.

        Args:
            optimizer: it holds some of the parameters.
            known: id -> number of the parameters.
        """
        if not self._armed or self._seen[id(optimizer)] >= _MOST_STEPS:
            return
        self._seen[id(optimizer)] += 1
        self._settings.append([_settings(group) for group in optimizer.param_groups])
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                number = known.get(id(parameter))
                if number is not None and parameter.grad is not None and not is_sharded(parameter):
                    self._note(number, parameter.grad)

    def _note(self, number: int, gradient: Tensor) -> None:
        """Of several steps, what is kept is the sum of all, with different weights."""
        bits, groups = checksum(gradient), _grouped(gradient, self._world.sum_dtype)
        if number in self._sums:
            bits = bits + 31 * self._sums[number]
            before = self._groups[number]
            groups = groups + 1.7 * before if before.shape == groups.shape else groups
        self._sums[number], self._groups[number] = bits, groups

    def end_step(self) -> None:
        """A train step is over: once optimizers have stepped in one that was looked at, the next ones are not."""
        self._armed = self._armed and not self._seen

    def compare(
        self, names: list[str], parameters: list[nn.Parameter], arrived: Callable[[int], bool], at: str
    ) -> None:
        """Compares the ranks, on all of them; a collective.

        Args:
            names: of the parameters.
            parameters: the net's.
            arrived: whether backward ever brought a gradient to a parameter here.
            at: which step it is, for messages.

        Raises:
            StepError: they differ; every rank raises it.
        """
        device, count = self._world.device, len(parameters)
        self._taken += self.steps
        none = torch.zeros((), dtype=torch.int64, device=device)
        gradients = [self._sums.get(number, none) for number in range(count)]
        weights = [none if is_sharded(p) else checksum(p) for p in parameters]
        numbers = [zlib.crc32(repr(self._settings).encode()), self.steps, len(self._settings)]
        numbers += [int(number in self._sums) for number in range(count)]
        packed = torch.stack([part.to(device) for part in (*gradients, *weights)]) if count else none.reshape(1)[:0]
        packed = torch.cat([torch.tensor(numbers, dtype=torch.int64, device=device), packed])
        both = torch.stack([packed, ~packed])  # the largest of ~x is ~ of the smallest x
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        if bool((both[0] != ~both[1]).any()):
            self._explain((both[0] != ~both[1]).tolist(), names, parameters, arrived, at)
        self._seen.clear()
        self._sums, self._groups, self._settings = {}, {}, []
        self.steps = 0

    # --- once something differs; all ranks do the same ------------------------------------------------------

    def _explain(
        self,
        differs: list[bool],
        names: list[str],
        parameters: list[nn.Parameter],
        arrived: Callable[[int], bool],
        at: str,
    ) -> None:
        count = len(parameters)
        settings, steps, optimizers = differs[:3]
        there, gradients, weights = (differs[3 + part * count : 3 + (part + 1) * count] for part in range(3))
        if steps or optimizers:
            raise agreed(
                f"{at} the ranks' optimizers took different numbers of steps: {self._by_rank(self._taken)}. {_LEFT_OUT}"
            )
        self._compare_gradients([n for n in range(count) if there[n] or gradients[n]], names, parameters, arrived, at)
        if settings:
            rates = [group.get("lr") for optimizer in self._settings for group in optimizer]
            raise agreed(f"{at} the optimizers' settings differ: lr {self._by_rank(rates)}. {_SETTINGS}")
        for number in (n for n in range(count) if weights[n]):
            self._compare_weight(names[number], parameters[number], at)

    def _by_rank(self, mine: Any) -> str:
        told = self._world.gather_json(mine)
        return ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(told))

    def _compare_gradients(
        self,
        numbers: list[int],
        names: list[str],
        parameters: list[nn.Parameter],
        arrived: Callable[[int], bool],
        at: str,
    ) -> None:
        apart, by_hand = [], False
        for number in numbers:
            told = self._world.gather_json(number in self._sums)
            mine = self._groups.get(number)
            all_groups = self._world.gather_tensors(mine)
            by_hand |= not arrived(number)
            if not all(told) or not _close(all_groups, parameters[number].dtype):
                apart.append(names[number])
        if not apart:
            return
        by_hand = any(self._world.gather_json(by_hand))
        cause = (
            "It did not come from backward(): was p.grad assigned directly, as from torch.autograd.grad? dtrain "
            "averages only the gradients of loss.backward()."
            if by_hand
            else f"It was changed after backward() by values that differ per rank (noise, a norm). {_ALIKE}"
        )
        raise agreed(f"{at} {_named('gradient', apart)} differs between the ranks. {cause}")

    def _compare_weight(self, name: str, parameter: nn.Parameter, at: str) -> None:
        mine = parameter.detach()
        mine = torch.view_as_real(mine) if mine.is_complex() else mine
        exact = torch.nan_to_num(mine.to(self._world.sum_dtype)).contiguous()
        both = torch.stack([exact, -exact])
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        high, low = both[0], -both[1]
        size = torch.maximum(high.abs(), low.abs())
        # Each step rounds anew: what machines of different kinds round differently walks at random.
        ulps = _ULPS + math.sqrt(self._taken)
        room = ulps * torch.finfo(mine.dtype).eps * (size + size.square().mean().sqrt())
        if bool((high - low > room).any()):
            raise agreed(
                f"{at} the parameter {name} differs between the ranks (by up to {float((high - low).max()):.3g}), "
                "though its gradients do not. Was it, or its optimizer's state, changed by values that "
                f"differ per rank (noise, a mean)? {_ALIKE}"
            )


def checksum(tensor: Tensor) -> Tensor:
    """Returns a number that differs, but for rare chance, where some bit of a tensor does; an int64 of no dimension."""
    values = tensor.detach()
    if values.layout is not torch.strided:
        values = values.coalesce()
        return checksum(values.values()) + 31 * checksum(values.indices())
    values = torch.view_as_real(values) if values.is_complex() else values
    bits = values.contiguous().view(-1).view(_INTEGERS[values.element_size()])
    return bits.sum(dtype=torch.int64) + 31 * bits[::2].sum(dtype=torch.int64) + 17 * bits[bits.numel() // 2 :].sum()


def _grouped(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over parts of a gradient, and its norm: enough to tell the last places from a real difference."""
    values = gradient.detach()
    values = values.coalesce().values() if values.layout is not torch.strided else values
    values = (torch.view_as_real(values) if values.is_complex() else values).reshape(-1)
    groups = max(1, min(_GROUPS, values.numel()))
    even = values.numel() // groups * groups
    sums = values[:even].view(groups, -1).sum(dim=1, dtype=dtype)
    rest = values[even:].sum(dtype=dtype).reshape(1)
    return torch.cat([sums, rest, torch.linalg.vector_norm(values, dtype=dtype).reshape(1)])


def _close(all_groups: Iterable[Tensor | None], dtype: torch.dtype) -> bool:
    there = [torch.nan_to_num(part) for part in all_groups if part is not None]
    if len({part.shape for part in there}) > 1:
        return False  # sparse ones of different rows
    groups = torch.stack(there)
    spread = groups.amax(dim=0) - groups.amin(dim=0)
    room = _ULPS * torch.finfo(dtype).eps * (groups.abs().amax(dim=0) + groups[:, -1].amax())
    return bool((spread <= room).all())


def _settings(group: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a parameter group: learning rate, weight decay, ..."""
    kept = {}
    for name, value in group.items():
        if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
            kept[name] = float(value)
    return kept


def _named(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"the {what} of {names[0]}{more}"


def agreed(text: str) -> StepError:
    """Returns an error that every rank raises."""
    return StepError(text, on_all_ranks=True)
