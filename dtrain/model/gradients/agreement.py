"""How ranks agree, in one small collective, on what there is to average and on who is done with a train step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from dtrain.distributed.standing import Whereabouts, words_of
from dtrain.distributed.world import World
from dtrain.errors import StepError
from dtrain.model.gradients.drift import agreed

PASS = 0
DONE = 1
NO_BACKWARD = (
    "Run one on every rank in every train step: of loss = model(x).sum() * 0 where a rank has nothing to learn from, "
    "or return dtrain.Mean(0 * model(x).sum(), 0)."
)


@dataclass
class AgreedGradients:
    """What all ranks told each other.

    Attributes:
        dense: numbers of the parameters with a gradient to be averaged on some rank.
        sparse: of those with sparse gradients alone.
        more: whether some rank has not ended its train step.
        unequal: whether some have, and cannot wait for the others.
        misfit: whether some rank's step is none that DDP is right for.
        all_idle: whether no rank got a gradient.
    """

    dense: list[int] = field(default_factory=list)
    sparse: list[int] = field(default_factory=list)
    more: bool = False
    unequal: bool = False
    misfit: bool = False
    all_idle: bool = True


class GradientAgreement:
    """Has all ranks tell each other where they are, in a collective of two bytes a parameter.

    Args:
        world: several ranks.
        count: of the parameters, the same on all ranks.
        at: where this rank stands, for those that wait for it elsewhere.

    Attributes:
        last: what was told the last time.
    """

    def __init__(self, world: World, count: int, at: Whereabouts) -> None:
        self._world, self._at = world, at
        self._count = count
        self.last = AgreedGradients()

    def hold(
        self, kind: int, marks: tuple[list[int], list[int]], *, strict: bool, misfit: bool, idle: bool
    ) -> AgreedGradients:
        """Meets the other ranks, wherever each is in its train step.

        Args:
            kind: PASS after a backward pass, DONE at the end of the train step.
            marks: numbers of the parameters with dense and with sparse gradients that are to be averaged.
            strict: whether this rank, being done, cannot wait for the others' backward passes.
            misfit: whether DDP would not be right for its step.
            idle: whether it got no gradient in the step.
        """
        flags = bytes([kind == PASS, kind == DONE and strict, misfit, idle, not idle])
        packed = bytearray(2 * self._count + len(flags))
        packed[2 * self._count :] = flags
        for part, numbers in enumerate(marks):
            for number in numbers:
                packed[part * self._count + number] = 1
        moved = torch.frombuffer(packed, dtype=torch.uint8).to(self._world.device)
        self._at.enter()
        dist.all_reduce(moved, op=dist.ReduceOp.MAX)
        self.last = self._read(bytes(moved.tolist()))
        self._at.leave()
        return self.last

    def _read(self, told: bytes) -> AgreedGradients:
        dense, sparse = told[: self._count], told[self._count : 2 * self._count]
        more, strict, misfit, idle, busy = map(bool, told[2 * self._count :])
        return AgreedGradients(
            dense=[number for number, mark in enumerate(dense) if mark],
            sparse=[number for number, mark in enumerate(sparse) if mark and not dense[number]],
            more=more,
            unequal=more and strict,
            misfit=misfit or (idle and busy),
            all_idle=not busy,
        )


def unequal_passes(world: World, step: int, kind: int) -> StepError:
    """Returns the error for ranks that run different numbers of backward passes; a collective.

    Args:
        world: the ranks.
        step: the number of the train step.
        kind: where this rank is in it, PASS or DONE.
    """
    by_rank = world.gather_json("ended the step" if kind == DONE else "runs a backward pass")
    ranks = ", ".join(f"rank {rank} {what}" for rank, what in enumerate(by_rank))
    return agreed(f"in train step {step} the ranks run different numbers of backward passes: {ranks}. {NO_BACKWARD}")


def demand_all(  # noqa: PLR0913, PLR0917 - called at one place with all of them
    world: World, at: Whereabouts, step: int, what: str, remedy: str, mark: bytes
) -> None:
    """Waits until all ranks have come to the same in a train step.

    Args:
        world: several ranks.
        at: where this rank stands.
        step: the number of the train step.
        what: this rank does, in words.
        remedy: what helps where others do not.
        mark: more that is to be the same.

    Raises:
        StepError: some did not come.
    """
    at.retract()
    missing = wait_for_all(world, (at.number, at.meetings), f"{step - 1}: {what} {mark.hex()}")
    if missing:
        others = ", ".join(map(str, missing))
        raise StepError(
            f"in train step {step} rank {world.rank} {what}, and on other ranks ({others}) it did not, so "
            f"gradients cannot be averaged. {remedy}"
        )
    at.meet()


def wait_for_all(world: World, number: tuple[object, int], what: str) -> list[int]:
    """Waits until all ranks have come to the same, past any collective that some of them may be in.

    Args:
        world: several ranks.
        number: of who waits in this process, and how many times that was before, by which the ranks find each other.
        what: where this rank is; only ranks that say the same meet.

    Returns:
        the ranks that did not come: where one has said something else, or stands where it cannot come, that one.
    """
    key, word = f"dtrain/waits/{number[0]}/{number[1]}/", what.encode()
    _get_default_store().set(f"{key}{world.rank}", what)
    return words_of(world, key, [rank for rank in range(world.size) if rank != world.rank], word)[1]
