"""Where each rank stands, told to the others once it stands still, so that a rank knows whom it waits for in vain.

Ranks that do what the others may not do (another optimizer step, unfreezing, leaving DDP) wait for the others' word in
the store, past any collective that these may be in. How long does not say whether it comes: a batch may take minutes.
What says it is where the others are::

    rank 0:  unfreezes  -> waits for rank 1's word                          -> rank 1 waits in an average of this
    rank 1:  backward   -> waits in the average -> stands still, says so    -> step, and so will never say it

Steps pay nothing for it: a thread looks once a second, and only a rank that has not moved since says where it is.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from dtrain.distributed.world import World, step_limit

_LOOK_SECONDS = 1.0
_PASS_SECONDS = 30.0  # in a pass of DDP's, in which a rank may also be computing
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.25
_Facts = dict[str, tuple[str, int, int, bool]]


class Standing:
    """This process's part."""

    def __init__(self) -> None:
        self._facts: _Facts = {}
        self._told: _Facts = {}
        self._computes: dict[str, bool] = {}
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def note(  # noqa: PLR0913 - one line of what is told
        self, kind: str, which: str, steps: int, joined: int = 0, *, inside: bool = False, computes: bool = False
    ) -> None:
        """Notes where this rank is; costs next to nothing.

        Args:
            kind: of what counts.
            which: of its kind, the same on all ranks; another one takes its place.
            steps: train steps that it has ended.
            joined: the collectives that it has come to.
            inside: whether it is in the last of them, which ends once all ranks have come to it.
            computes: whether it may compute there for a while before it waits.
        """
        self._facts[kind], self._computes[kind] = (which, steps, joined, inside), computes
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="dtrain-standing", daemon=True)
            self._thread.start()
            atexit.register(self._end)

    def is_past(self, rank: int) -> bool:
        """Whether another rank has gone on to where this one has not come, and so will not come to where this one is.

        Raises:
            RuntimeError: the store is gone.
        """
        store = _get_default_store()
        if not store.check([_key(rank)]):
            return False
        theirs = json.loads(store.get(_key(rank)))
        for kind, (which, steps, joined, _) in self._facts.items():
            there, ended, come, inside = theirs.get(kind, ("", 0, 0, False))
            if there == which and (ended > steps or (inside and come > joined)):
                return True
        return False

    def _run(self) -> None:
        before: _Facts = {}
        since = time.monotonic()
        while not self._over.wait(_LOOK_SECONDS):
            now, computes = self._facts.copy(), any(self._computes.values())
            if now != before:
                before, since = now, time.monotonic()
            elif now != self._told and time.monotonic() - since >= (_PASS_SECONDS if computes else 0.0):
                self._tell(now)

    def _tell(self, now: _Facts) -> None:
        with contextlib.suppress(RuntimeError, ValueError):  # there is no store any more
            _get_default_store().set(_key(dist.get_rank()), json.dumps(now))
            self._told = now

    def _end(self) -> None:
        self._over.set()
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._thread.join(_LOOK_SECONDS)


STANDING = Standing()


class Whereabouts:
    """One averaging's part in where a rank stands.

    Args:
        number: of it, the same on all ranks.

    Attributes:
        number: as it was given.
        inside: whether this rank is in an average of all ranks.
        meetings: how many times all ranks have come to the same.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.meetings = self._steps = self._joined = 0
        self.inside = False

    def enter(self, *, computes: bool = False) -> None:
        """This rank comes to an average of all ranks.

        Args:
            computes: whether it may compute for a while before it waits for them.
        """
        self._joined += 1
        self._note(inside=True, computes=computes)

    def leave(self) -> None:
        """It has got the average."""
        self._note()

    def retract(self) -> None:
        """It does not bring what the average that it is in waits for."""
        self._joined -= self.inside
        self._note()

    def end_step(self) -> None:
        """A train step is over."""
        self._steps += 1
        self._note()

    def meet(self) -> None:
        """All ranks have come to the same; what they have joined is counted anew, since it may have been unequal."""
        self.meetings += 1
        self._joined = 0
        self._note()

    def _note(self, *, inside: bool = False, computes: bool = False) -> None:
        self.inside = inside
        which = f"{self.number}/{self.meetings}"
        STANDING.note("gradients", which, self._steps, self._joined, inside=inside, computes=computes)


def words_of(
    world: World, key: str, ranks: Sequence[int], wanted: bytes | None = None, unless: str | None = None
) -> tuple[dict[int, bytes], list[int]]:
    """Waits for what other ranks say, as long as a collective may wait for them.

    Args:
        world: several ranks.
        key: in the store; each rank says its word under this and its number.
        ranks: they.
        wanted: what they are to say; None for anything.
        unless: a key under which a rank says that it will not say it any more.

    Returns:
        rank -> its word, and the ranks that have not said it: as soon as one has said something else, or stands where
        it cannot come to say it.
    """
    store: Any = _get_default_store()
    found: dict[int, bytes] = {}
    pause, end = _FIRST_PAUSE, time.monotonic() + step_limit(world.device).total_seconds()
    while waiting := [rank for rank in ranks if rank not in found]:
        for rank in waiting:
            try:
                # Asked first, since the word may come meanwhile.
                past = pause >= _LONGEST_PAUSE and STANDING.is_past(rank)
                past = past or (unless is not None and store.check([f"{unless}{rank}"]))
                word = store.get(f"{key}{rank}") if store.check([f"{key}{rank}"]) else None
            except RuntimeError:  # the store has gone with its rank
                return found, waiting
            if word is None and not past:
                continue
            if word is None or wanted not in (None, word):
                return found, [rank]
            found[rank] = word
        if len(found) == len(ranks):
            break
        if time.monotonic() > end:
            return found, [rank for rank in ranks if rank not in found]
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return found, []


def _key(rank: int) -> str:
    return f"dtrain/standing/{rank}"
