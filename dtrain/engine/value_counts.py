"""Whether the means of several ranks go over equally many values for each sample.

Where they do not, as with batches that are padded to their longest sample, or with the mean over all nodes of some
graphs, the mean of the ranks' means is not that of one process. The first and the last rank compare one step's numbers,
past any collective: the last one says its before its backward pass, the first one looks in one of its next steps.
"""

from __future__ import annotations

import itertools
import json
import math

from dtrain.distributed.world import World

_NUMBERS = itertools.count()  # of those that a process makes, the same on all ranks
_MOST_LOOKS = 10
_MOST_LOOKS_FOR_FORMS = 10  # in as many steps, after each that a form was looked for in


class ToldForms:
    """What other ranks saw of their losses, for the first one to tell: a branch may be taken on some ranks only.

    They say it past any collective, and the first one looks in its next steps.

    Args:
        world: several ranks.
    """

    def __init__(self, world: World) -> None:
        self._key, self._is_first = f"dtrain/forms/{next(_NUMBERS)}", world.rank == 0
        self._left, self._said = 0, False

    def look(self) -> None:
        """A loss is looked at in this step, on other ranks as well."""
        self._left = _MOST_LOOKS_FOR_FORMS

    def say(self, what: str, remedy: str) -> None:
        """Keeps, on another rank, what its loss is."""
        if not self._is_first and not self._said:
            from torch.distributed.distributed_c10d import _get_default_store

            self._said = True
            _get_default_store().set(self._key, json.dumps([what, remedy]))

    def told(self) -> tuple[str, str] | None:
        """Returns, on the first rank, what another one has said."""
        if not self._is_first or not self._left:
            return None
        from torch.distributed.distributed_c10d import _get_default_store

        self._left, store = self._left - 1, _get_default_store()
        if not store.check([self._key]):
            return None
        what, remedy = json.loads(store.get(self._key))
        return what, remedy


class ValueCounts:
    """The numbers of one loss, on the first rank and on the last one.

    Args:
        world: several ranks.
    """

    def __init__(self, world: World) -> None:
        self._key = f"dtrain/values/{next(_NUMBERS)}"
        self._is_first, self._is_last = world.rank == 0, world.rank == world.size - 1
        self._own: str | None = None
        self._left = _MOST_LOOKS if self._is_first else 0

    def say(self, step: int, rows: int, counts: list[float]) -> None:
        """Keeps this rank's numbers; only the first ones of a run count.

        Args:
            step: where the step's batch begins, the same on all ranks.
            rows: samples of this rank's part.
            counts: values that each mean of its loss goes over.
        """
        if self._own is not None or not (self._is_first or self._is_last):
            return
        # As many means as samples are one for each of them, which may have its own number of values.
        self._own = json.dumps([step, rows, counts if len(counts) < rows else []])
        if self._is_last:
            from torch.distributed.distributed_c10d import _get_default_store

            _get_default_store().set(self._key, self._own)

    def differing(self) -> tuple[float, float] | None:
        """Returns, on the first rank and once, its values for each sample and the last rank's, if they differ.

        A mean over equally many values on both, of other numbers of samples, is one of weights.
        """
        if not self._left or self._own is None:
            return None
        from torch.distributed.distributed_c10d import _get_default_store

        self._left, store = self._left - 1, _get_default_store()
        if not store.check([self._key]):
            return None
        self._left = 0
        step, rows, counts = json.loads(self._own)
        other_step, other_rows, others = json.loads(store.get(self._key))
        if step != other_step or len(counts) != len(others):
            return None
        for count, other in zip(counts, others, strict=True):
            here, there = count / rows, other / other_rows
            if count != other and not math.isclose(here, there, rel_tol=1e-6):
                return here, there
        return None
