"""Tells a hang from slow work.

A rank stands still when its heartbeat does not move and neither it, its threads nor its DataLoader workers use CPU
time, read or write; a rank that works on without moving is given ten times as long, at least a minute. Who stands
still is asked for its stack: a rank that waits for the others in a collective is no culprit, as long as one of them
still works.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dtrain.launch.monitor.heartbeat import DONE, SCRIPT, Beat, read_beat
from dtrain.launch.monitor.processes import Activity, activity
from dtrain.launch.monitor.stack_dump import (
    Frame,
    ask_for_stacks,
    at_debugger,
    busy_worker,
    main_stack,
    waits_for_others,
)

_SPINNING = 10  # times the limit, for a rank that works without moving
_SPINNING_LEAST = 60.0  # seconds: on a busy machine the imports alone may take that long
_CONFIRM_SECONDS = 0.3
# What a sleeping process uses all the same: threads that poll, log lines. Less than this is no work.
_IDLE_SHARE = 0.01  # of one core
_IDLE_SECONDS = 0.05
_IDLE_BYTES, _IDLE_BYTES_PER_SECOND = 16384, 2048.0
_ASLEEP_SECONDS = 5.0  # between two looks, which are 0.05 s apart
_FOR_EVER = 24 * 86400.0  # as many milliseconds as an int of 32 bits holds, should anything count in those


@dataclass(frozen=True)
class Hang:
    """A run that stands still.

    Attributes:
        rank: the one that holds up the others, as far as can be told.
        seconds: how long it has stood still.
        why: what a person shall read of each rank.
        frames: where the rank is, innermost first; empty where it does not respond.
        stacks: rank -> what it answered.
    """

    rank: int
    seconds: float
    why: dict[int, str]
    frames: list[Frame]
    stacks: dict[int, str]


class _Pulse:
    """What was seen of one rank: when its heartbeat moved last, and when there was any sign of work."""

    def __init__(self, now: float) -> None:
        self.moved = self.worked = now
        self.beat = Beat()
        self._base = Activity()
        self.known = False
        self.stopped = False

    def note(self, beat: Beat, used: Activity | None, now: float) -> None:
        if beat.count != self.beat.count:
            self.moved = now
        works = used is None or self._works(used, now)  # what is not known counts as work
        if beat.count != self.beat.count or works:
            self.worked, self._base = now, used or Activity()
        self.beat, self.known, self.stopped = beat, used is not None, used is not None and used.stopped

    def _works(self, used: Activity, now: float) -> bool:
        idle = max(_IDLE_SECONDS, _IDLE_SHARE * (now - self.worked))
        return (
            used.stuck_in_kernel
            or abs(used.seconds - self._base.seconds) > idle
            or abs(used.moved - self._base.moved) > _IDLE_BYTES + _IDLE_BYTES_PER_SECOND * (now - self.worked)
        )

    def watched(self) -> bool:
        return self.beat.count > 0 and self.beat.phase != DONE


def outlasting(limit: float) -> float:
    """Returns how many seconds something must wait so as to leave it to the watch to end a hang, and to tell of it.

    Args:
        limit: seconds that a rank may stand still; 0 is for ever.
    """
    return min(_FOR_EVER, 2 * _longest(limit)) if limit else _FOR_EVER


def _longest(limit: float) -> float:
    return max(_SPINNING * limit, _SPINNING_LEAST)


class HangWatch:
    """Watches the heartbeats of local ranks.

    Args:
        folder: of the reports.
        limit: seconds that a rank may stand still; 0 watches nothing.
        clock: seconds, monotonic.
        alone: whether these are all ranks of the job. Else they may all wait for one elsewhere that works, and are
            given as long as one that works here.
    """

    def __init__(
        self, folder: Path, limit: float, clock: Callable[[], float] = time.monotonic, *, alone: bool = True
    ) -> None:
        self._folder = folder
        self._limit = limit
        self._alone = alone
        self._clock = clock
        self._pulses: dict[int, _Pulse] = {}
        self._pause = min(10.0, max(0.1, limit / 20))
        self._next = self._last = clock()

    def check(self, pids: Mapping[int, int]) -> Hang | None:
        """Returns the hang, if there is one; cheap where it is called often.

        Args:
            pids: rank -> process id of the ranks that still run.
        """
        now = self._clock()
        asleep, self._last = now - self._last > _ASLEEP_SECONDS, now
        if asleep:  # all were, by Ctrl-Z say: nobody has stood still
            self._pulses.clear()
        if not self._limit or now < self._next:
            return None
        self._next = now + self._pause
        for rank, pid in pids.items():
            pulse = self._pulses.setdefault(rank, _Pulse(now))
            pulse.note(read_beat(self._folder, rank), activity(pid), now)
        watched = {rank: self._pulses[rank] for rank in pids if self._pulses[rank].watched()}
        if not any(self._too_long(pulse, now) for pulse in watched.values()):
            return None
        found = self._judge(watched, pids, now)
        if found is None:
            self._next = now + max(self._pause, self._limit / 4)  # they wait for one that works: ask seldom
        return found

    def _too_long(self, pulse: _Pulse, now: float) -> bool:
        return now - pulse.worked > self._limit or self._far_too_long(pulse, now)

    def _far_too_long(self, pulse: _Pulse, now: float) -> bool:
        if pulse.beat.phase == SCRIPT and now - pulse.worked < self._limit:
            return False
        return now - pulse.moved > _longest(self._limit)

    def _judge(self, watched: Mapping[int, _Pulse], pids: Mapping[int, int], now: float) -> Hang | None:
        stacks = ask_for_stacks(self._folder, {rank: pids[rank] for rank in watched})
        # To ask takes time. Who has left a collective meanwhile, since the slow one came, is no culprit.
        time.sleep(_CONFIRM_SECONDS)
        if any(read_beat(self._folder, rank).count != pulse.beat.count for rank, pulse in watched.items()):
            return None
        frames = {rank: main_stack(text) for rank, text in stacks.items()}
        if any(map(at_debugger, frames.values())):
            return None
        waiting = {rank for rank in watched if waits_for_others(frames[rank])}
        still = {rank for rank, pulse in watched.items() if self._too_long(pulse, now)}
        culprits = still - waiting
        if not culprits and still != set(watched):
            return None
        if not culprits and not self._alone and not all(self._far_too_long(pulse, now) for pulse in watched.values()):
            return None
        # All wait for all (each in another collective): the one that is furthest behind is named.
        suspects = culprits or still
        rank = min(suspects, key=lambda one: (watched[one].moved, one))
        at = {one: busy_worker(stacks[one]) or found for one, found in frames.items()}
        why = {one: _words(pulse, at[one], one in waiting, now) for one, pulse in watched.items()}
        return Hang(rank, now - watched[rank].moved, why, at[rank], stacks)


class ExitWatch:
    """Watches ranks that have left their last word, until they exit.

    Args:
        limit: seconds that a rank which ended well may stand still before it exits, or be at work ten times as long; 0
            is for ever.
        failed: the same for one that failed, whose end the others wait for.
        clock: seconds, monotonic.
        used: returns what a process has used so far.
    """

    def __init__(
        self,
        limit: float,
        failed: float,
        clock: Callable[[], float] = time.monotonic,
        used: Callable[[int], Activity | None] = activity,
    ) -> None:
        self._used = used
        self._limits = {True: limit, False: failed}
        self._clock = clock
        self._pulses: dict[int, _Pulse] = {}
        self._next = 0.0

    def overdue(self, pids: Mapping[int, int], well: Mapping[int, bool]) -> list[int]:
        """Returns the ranks that should have exited by now; cheap where it is called often.

        Args:
            pids: rank -> process id, of those that have left their last word and still run.
            well: rank -> whether it ended well.
        """
        now = self._clock()
        if not pids or now < self._next:
            return []
        self._next = now + min([1.0, *(limit / 20 for limit in self._limits.values() if limit)])
        for rank, pid in pids.items():
            self._pulses.setdefault(rank, _Pulse(now)).note(Beat(), self._used(pid), now)
        return [rank for rank in pids if self._is_overdue(self._pulses[rank], self._limits[well[rank]], now)]

    def _is_overdue(self, pulse: _Pulse, limit: float, now: float) -> bool:
        return limit > 0 and (now - pulse.worked > limit or now - pulse.moved > _SPINNING * limit)


def _words(pulse: _Pulse, frames: list[Frame], waits: bool, now: float) -> str:
    """What one rank was doing, for a person."""
    since = f"in {pulse.beat} for {now - pulse.moved:.0f} s"
    if pulse.stopped:
        return f"{since}: the process is stopped (SIGSTOP, or a debugger)"
    if not frames:
        return f"{since}: it does not respond"
    if waits:
        return f"{since}: it is waiting for the other ranks, in {frames[0].name}()"
    return f"{since}: it is in {frames[0]}"
