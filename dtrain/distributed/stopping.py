"""Stopping on request: all ranks after one and the same step, without a collective for it at any step.

A thread of each rank watches rank 0's store; the training thread only compares an int with another at each step::

    somebody is asked to stop (a signal, the file STOP):   its thread writes "asked" into the store
    each rank's thread sees it:                            sets its own limit, the step after the present one, which
                                                           the training thread will not pass without an answer;
                                                           writes it into the store
    rank 0's thread, once all limits are there:            writes the largest as the answer
    each rank's thread:                                    moves its limit there
    each training thread:                                  goes on to that step, and stops

No rank has passed its own limit, so none has passed the largest: however far apart the ranks are (a CPU that sends
steps ahead to its GPU is some steps ahead of the others), they stop after the same step. A rank that has taken its
last step says so by a limit without end, and all end as they would have without the request.

Steps are counted as places where all ranks come by in the same order: after each optimizer step, and after each epoch.
In validation ranks may take different numbers of steps; there each leaves as soon as it knows of the request, and the
reduction at its end tells all of them whether one did.
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from dtrain.distributed.world import World
from dtrain.errors import StopRequested
from dtrain.launch.signals.stop_request import StopRequest

logger = logging.getLogger(__name__)

_HERE_SECONDS = 0.2  # between looks at what a supervisor passes on, and whether signals still come here
_LOOK_SECONDS = 0.5  # between looks at the store
_FILE_SECONDS = 1.0  # between looks for the file
_POLL_SECONDS = 0.02  # while the ranks agree
_AGREE_SECONDS = 60.0  # a rank whose thread does not come by for so long holds a lock, or is gone
_NEVER = sys.maxsize


class Stopping:
    """One rank's part in stopping; a context manager around the training.

    Args:
        world: the ranks.
        request: what this process hears.
        file: where it lies, training is to stop; rank 0 looks for it.
        is_over: whether training has come to its end, at the place where it would stop: then it just ends.

    Attributes:
        asked: whether some rank was asked to stop, as far as this one knows.
    """

    def __init__(
        self,
        world: World,
        request: StopRequest,
        file: Path | None = None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        self.asked = False
        self._world = world
        self._request = request
        self._file = file if world.is_main else None
        self._is_over = is_over
        self._next_look = self._next_share = 0.0
        self._ticks = 0  # places that the training thread has come by
        self._limit = _NEVER  # the next one that it waits at
        self._end = _NEVER  # the agreed one
        self._closed = False
        self._by: str | None = None  # what all ranks call the request by
        # A client of its own: in the process group's, a thread that waits would hold up all others.
        self._store: Store | None = None
        if world.size > 1:
            self._store = PrefixStore("dtrain/stop", _get_default_store().clone())  # type: ignore[attr-defined]
            self._store.set_timeout(timedelta(seconds=_AGREE_SECONDS))
        self._thread = threading.Thread(target=self._watch, name="dtrain-stopping", daemon=True)

    # --- the training thread --------------------------------------------------------------------------

    def __enter__(self) -> Stopping:
        self._request.look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets the thread end; where training failed, it is not waited for, since other ranks may be gone."""
        self._closed = True
        self._request.wake()
        if kind is None or issubclass(kind, StopRequested):
            self._thread.join()

    def step(self) -> None:
        """The training thread has come by the next place.

        Raises:
            StopRequested: all ranks end here.
        """
        self._ticks += 1
        if self._ticks >= self._limit and self._ends_here():
            raise StopRequested(self.why())

    def why(self) -> str:
        """Returns words such as "on request (SIGTERM)"."""
        by = self._by or self._request.by or self._share(None)
        return "on request" if by is None else f"on request ({by})"

    def _ends_here(self) -> bool:
        while self._ticks >= self._limit and self._ticks != self._end:
            time.sleep(_POLL_SECONDS / 4)
        return self._ticks == self._end and not self._is_over()

    # --- the watching thread --------------------------------------------------------------------------

    def _watch(self) -> None:
        self._request.unblock_signals()
        try:
            for attempt in itertools.count():
                by = self._wait_for_request(attempt)
                if by is None or self._settle(by, attempt):
                    return
        except dist.DistError as error:  # the store has gone with rank 0, which all will notice by themselves
            logger.debug("stop requests are no longer watched: %s", error)
        finally:
            self._limit = self._end  # the training thread waits for nobody that is not there

    def _wait_for_request(self, attempt: int) -> str | None:
        """Returns what asked to stop, here or on another rank; None once training has ended."""
        while not self._closed:
            self._check_stop_file()
            by = self._exchange_periodically()
            if by is not None:
                self._request.ask(by)
                return by
            self._request.wait(_HERE_SECONDS)
            self._request.look()
        if self._store is not None:
            self._store.set(f"{attempt}/limit/{self._world.rank}", str(_NEVER))
            self._store.compare_set(f"{attempt}/answer", "", str(_NEVER))
        return None

    def _exchange_periodically(self) -> str | None:
        """Shares a request of this rank's at once, and looks for one of another's where it is time to."""
        now = time.monotonic()
        if self._request.by is None and now < self._next_share:
            return None
        self._next_share = now + _LOOK_SECONDS
        return self._share(self._request.by)

    def _check_stop_file(self) -> None:
        now = time.monotonic()
        if self._file is not None and now >= self._next_look:
            self._next_look = now + _FILE_SECONDS
            if self._file.exists():
                self._request.ask(str(self._file))

    def _share(self, by: str | None) -> str | None:
        """Tells the others of a request, or learns of theirs; the first one holds."""
        if self._store is None:
            return by
        if by is not None:
            return str(self._store.compare_set("asked", "", by).decode())
        return self._store.get("asked").decode() if self._store.check(["asked"]) else None

    def _settle(self, by: str, attempt: int) -> bool:
        """Agrees with the other ranks on the last step; returns whether they did."""
        self.asked, self._by = True, by
        limit = self._hold()
        end: int | None = limit if self._store is None else self._agree(self._store, limit, attempt)
        if end is None:
            self._limit = _NEVER  # go on; once more, from the beginning
            self._request.wait(_LOOK_SECONDS)
            return False
        self._end = end
        self._limit = end
        return True

    def _hold(self) -> int:
        """Sets a limit that the training thread has not passed, and returns it."""
        while True:
            self._limit = limit = self._ticks + 1
            # It counts first and then looks at its limit: what it has counted after this, it will wait at.
            if self._ticks < limit:
                return limit

    def _agree(self, store: Store, limit: int, attempt: int) -> int | None:
        """Returns the largest limit of all ranks; None where one of them does not say its own in time."""
        answer = f"{attempt}/answer"
        store.set(f"{attempt}/limit/{self._world.rank}", str(limit))
        deadline = time.monotonic() + _AGREE_SECONDS
        if self._world.is_main:
            limits = [f"{attempt}/limit/{rank}" for rank in range(self._world.size)]
            if _appear(store, limits, deadline):
                store.compare_set(answer, "", str(max(int(value) for value in store.multi_get(limits))))
        else:
            _appear(store, [answer], deadline + _AGREE_SECONDS)
        found = store.compare_set(answer, "", "none").decode()  # the first word holds, for all ranks
        return None if found == "none" else int(found)


def check_not_asked(world: World, request: StopRequest) -> None:
    """Compares the ranks' requests before there is anything to save; a collective.

    Raises:
        StopRequested: some rank was asked to stop already; all raise it.
    """
    request.look()
    by = next((by for by in world.gather_json(request.by) if by is not None), None)
    if by is not None:
        raise StopRequested(f"stopped on request ({by}), before the first step; nothing to save")


def _appear(store: Store, keys: list[str], deadline: float) -> bool:
    """Waits for keys; returns whether all are there in time."""
    while not store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
