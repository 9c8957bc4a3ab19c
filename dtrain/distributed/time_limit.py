"""A time limit that all ranks see as passed after one and the same step, without a collective at each."""

from __future__ import annotations

import time

from dtrain.distributed.world import World


class AgreedClock:
    """Rank 0's clock, asked by all ranks together: after 1 step, then whenever half of the time left may be over.

    So it is asked about as often as the time can be halved until it is as short as a step.

    Args:
        seconds: the limit.
        world: the ranks; all of them ask at the same steps.
    """

    def __init__(self, seconds: float, world: World) -> None:
        self._seconds = seconds
        self._world = world
        self._began = time.monotonic()
        self._at = 0  # the step at which it began
        self._next = 0

    def due(self, step: int) -> bool:
        """Whether the limit has passed.

        Args:
            step: counts up, equal on all ranks.
        """
        if step < self._next:
            return False
        passed = self._world.all_reduce([time.monotonic() - self._began if self._world.is_main else 0.0])[0]
        if passed >= self._seconds:
            return True
        pace = max(passed, 1e-6) / max(step - self._at, 1)
        self._next = step + max(1, int((self._seconds - passed) / pace / 2))
        return False

    def restart(self, step: int) -> None:
        """Begins anew."""
        self._began, self._at, self._next = time.monotonic(), step, step + 1
