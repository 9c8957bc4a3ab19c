"""Whether all ranks have taken as many optimizer steps, where the steps call their optimizers themselves.

The counts are compared after train steps whose numbers are the same on all ranks: after the 1st, 2nd, 4th, 8th and so
on, and where one of them may come to what is done together after so many optimizer steps: a validation within an
epoch, a checkpoint, the end of training. There, ranks with different counts would wait for each other for ever. A rank
whose train steps take more optimizer steps than before may come there earlier; it then waits for the others, until one
of them has gone past.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

from dtrain.distributed.standing import STANDING
from dtrain.distributed.world import World
from dtrain.engine.position import TrainPosition
from dtrain.errors import StepError
from dtrain.model.gradients.agreement import wait_for_all

logger = logging.getLogger(__name__)

_NUMBERS = itertools.count(1)  # of those that a process makes, the same on all ranks

_ALIKE = (
    "Every rank must take the same number of steps, or weights diverge: whether to step must not depend on a rank's "
    "own batch. Return the loss (dtrain.Mean(0 * total, 0) leaves a batch out), "
    "and leave backward, step and zero_grad to "
    "dtrain."
)


class AgreedSteps:
    """One rank's part in comparing; every rank has one.

    Args:
        world: the ranks.
        place: where the run is.
        last: after so many optimizer steps training ends; None where it does not.
        every: after each multiple of one of these, all ranks do something together; None for nothing.

    Attributes:
        every: the same for all that is done so; more may be added.
    """

    def __init__(self, world: World, place: TrainPosition, last: int | None = None, *every: int | None) -> None:
        self.every = [one for one in every if one is not None]
        self._last = last
        self._world = world
        self._place = place
        self._done = 0
        self._number = next(_NUMBERS)
        self._note()
        self._grown = self._next = 1
        self._most = 1  # optimizer steps of one train step so far
        self._more = False  # whether one took more of them than at the last comparison was known

    def after(self) -> None:
        """A train step is over.

        Raises:
            StepError: the counts differ; every rank raises it, or the one that has come alone to what is done together.
        """
        self._done += 1
        self._more = self._more or self._place.taken > self._most
        self._most = max(self._most, self._place.taken)
        if self._done < self._next:
            if self._more and self._is_there():  # earlier than the next comparison was to be
                self._meet()
            self._note()
            return
        self._more = False
        told = self._world.gather_json([self._place.updates, self._most])
        self._note()
        check_counts([updates for updates, _ in told])
        self._most = max(most for _, most in told)
        while self._grown <= self._done:
            self._grown *= 2
        self._next = min([self._grown, *(self._done - (-left // self._most) for left in self._left())])

    def _note(self) -> None:
        """Has a rank that waits in a train step know that this one is past it."""
        if self._world.size > 1:
            STANDING.note("steps", str(self._number), self._done)

    def _is_there(self) -> bool:
        """Whether the last train step has come to what all ranks do together."""
        place = self._place
        ended = self._last is not None and place.updates >= self._last
        return ended or any(place.passed(every) for every in self.every)

    def _meet(self) -> None:
        """Waits for the other ranks past any collective that they may be in, since they may be elsewhere."""
        updates = self._place.updates
        missing = wait_for_all(self._world, (f"steps-{self._number}", self._done), f"{updates} optimizer steps")
        if missing:
            raise StepError(
                f"the ranks have taken different numbers of optimizer steps: rank {self._world.rank} took {updates} in "
                f"{self._done} train steps, and {', '.join(f'rank {rank}' for rank in missing)} did not. {_ALIKE}"
            )

    def warn_unreached_limits(self, epochs: int, planned: int | None) -> None:
        """Warns where the last epoch came before the last optimizer step, since some batches had none.

        Args:
            epochs: how many there were to be.
            planned: the optimizer steps of all of them, with one for each batch.
        """
        ended = self._last is None or planned is None or self._place.updates >= planned
        if ended or self._place.epoch < epochs or not self._world.is_main:
            return
        logger.warning(
            "training ended after epoch %s with %s of train.max_steps=%s optimizer steps, since some batches had none. "
            "Increase train.epochs.",
            epochs,
            self._place.updates,
            self._last,
        )

    def _left(self) -> list[int]:
        updates = self._place.updates
        left = [every - updates % every for every in self.every]
        return left if self._last is None else [*left, max(1, self._last - updates)]


def check_counts(counts: Sequence[int]) -> None:
    """Compares the ranks' counts of optimizer steps.

    Raises:
        StepError: they differ.
    """
    if len(set(counts)) == 1:
        return
    raise StepError(
        "the ranks have taken different numbers of optimizer steps: "
        f"{', '.join(f'{count} on rank {rank}' for rank, count in enumerate(counts))}. {_ALIKE}",
        on_all_ranks=True,
    )
