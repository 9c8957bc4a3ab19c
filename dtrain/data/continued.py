"""A loader that goes on from one epoch to the next, where an epoch is so many optimizer steps.

::

    epochs     |   1   |   2   |   3   |   4   |      of train.epoch_steps optimizer steps each
    passes     |     1     |     2     |     3        over the loader; each has its own order and its `set_epoch`

An epoch's end is no end of a pass: the iterator stays where it is, through the validation, and in a checkpoint the pass
and how much of it was taken take the place of the epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from dtrain.data.loader import ShardedLoader, do_nothing
from dtrain.data.partition import RankBatch, ShardSpec
from dtrain.data.sources import Sources, parts_of
from dtrain.distributed.seeding import load_random_state, random_state
from dtrain.errors import DataError, StepError, UsageError


class ContinuedLoader(ShardedLoader):
    """One rank's view of a loader that goes on over the ends of epochs.

    Args:
        loader, how, seed, split: as for `ShardedLoader`.
        steps: optimizer steps of an epoch.
        updates: returns the optimizer steps that were taken so far.
        device: whose random stream is left as it is where a resumed pass is read again up to where it was.
        read: further arguments of `ShardedLoader`.

    Attributes:
        number: the pass over the loader that runs, from 1.
        taken: the rank's shares of it that were taken.
    """

    def __init__(  # noqa: PLR0913 - keyword-only after what is dealt, and how
        self,
        loader: Any,
        how: ShardSpec,
        seed: int,
        split: str,
        *,
        steps: int,
        updates: Callable[[], int],
        device: torch.device,
        **read: Any,
    ) -> None:
        super().__init__(loader, how, seed, split, **read)
        self.number, self.taken = 1, 0
        self._epoch_steps = steps
        self._group = how.group
        self._updates = updates
        self._device = device
        self._entered = False
        self._running: Iterator[RankBatch] | None = None

    @property
    def position(self) -> tuple[int, int]:
        """The pass that runs, and the rank's shares of it that were taken."""
        return self.number, self.taken

    def resume(self, position: Any) -> None:
        """Goes on from a saved `position`; the next iteration begins there."""
        self.number, self.taken = position

    def enter(self, epoch: int) -> None:
        """An epoch begins, which is a new pass for the first one only."""
        if not self._entered:
            self._entered = True
            super().enter(self.number)

    def pass_of(self, epoch: int) -> int:
        """Returns the pass that runs."""
        return self.number

    def ends(self, epoch: int, step: int, updates: int) -> bool:
        """Whether an epoch is over: after its optimizer steps, and one train step at least."""
        return step > 0 and updates >= epoch * self._epoch_steps

    def expected(self, epoch: int, skip: int, updates: int, most: int | None) -> int | None:
        """Returns the rank's shares of an epoch, with one optimizer step for each group of them."""
        last = epoch * self._epoch_steps
        left = max(0, (last if most is None else min(last, most)) - updates)
        whole, size = super().steps(), self._group
        if not whole:
            return skip + left * size
        here = max(0, whole - self.taken)
        groups = -(-here // size)
        if left <= groups:
            return skip + min(left * size, here)
        passes, rest = divmod(left - groups, -(-whole // size))
        return skip + here + passes * whole + min(rest * size, whole)

    def steps_of_epochs(self, epochs: int) -> list[int] | None:
        """Returns the shares of each epoch, if each optimizer step had a whole group of them."""
        return [self._epoch_steps * self._group] * epochs

    def iter_batches(self, epoch: int, skip: int = 0, ready: Callable[[], None] = do_nothing) -> Iterator[RankBatch]:
        """Returns the one iterator of the run, which goes on where the last epoch has left it.

        Raises:
            DataError: the loader, an iterator of the user's, is used up.
            StepError: a whole pass had no optimizer step, so that the epoch would never end.
        """
        if self._running is None:
            self._running = self._passes()
        return self._running

    def close(self) -> None:
        """Ends the iterator, and with it the workers of the pass that runs."""
        if self._running is not None:
            self._running.close()  # type: ignore[attr-defined]

    def _passes(self) -> Iterator[RankBatch]:
        while True:
            self.enter(0)
            before, updates = self.taken, self._updates()
            ready = self._unmoved() if before else do_nothing
            for rank_batch in super().iter_batches(self.number, before, ready):
                self.taken += 1
                yield rank_batch
            if self.taken == 0:
                if self.number == 1:
                    return  # an empty loader, of which is told as of any
                raise DataError(
                    f"the {self._split} loader is exhausted after {self.number - 1} pass{'es' * (self.number > 2)} and "
                    f"{updates} optimizer steps, and the run has more: it is an iterator or a generator. Use a "
                    "DataLoader, or an object whose __iter__ starts over.",
                    on_all_ranks=True,
                )
            if before == 0 and updates == self._updates():
                raise StepError(
                    "a whole pass over the training data had no optimizer step, so an epoch of "
                    f"{self._epoch_steps} optimizer steps (train.epoch_steps) would never end.",
                    on_all_ranks=True,
                )
            self.number, self.taken, self._entered, self.varied = self.number + 1, 0, False, False
            self.on_pass(self.number)

    def _unmoved(self) -> Callable[[], None]:
        """Returns what puts random streams and datasets to where they are now, after what was read is read again."""
        random, datasets = random_state(self._device), self.sources.states(datasets=True)

        def put_back() -> None:
            load_random_state(random, self._device)
            self.sources.load(datasets)

        return put_back


def refuse_shared(train: Sources, valid: Sources) -> None:
    """Whether a train loader may go on over the validation that comes between, and be resumed after it.

    Raises:
        UsageError: a part of both loaders is told of epochs, or has a state or a random generator.
    """
    others = {id(part) for part in (*parts_of(valid.loader).values(), *valid.stateful().values())}
    told = {name: part for name, part in parts_of(train.loader).items() if callable(getattr(part, "set_epoch", None))}
    for name, part in {**told, **train.stateful()}.items():
        if id(part) in others:
            raise UsageError(
                f"train.epoch_steps: dl_train{name and f'.{name}'} ({type(part).__name__}) belongs to a validation "
                "loader, too, which changes it in the midst of a pass over the training data. Give each loader its "
                "own.",
                on_all_ranks=True,
            )
