"""The ranks arrive: each leaves its facts at rank 0's store before any collective, so that who is missing can be named.

The process group itself would wait for half an hour and then name nobody. Rank 0 reads each rank's facts once and
compares them; N ranks need about 10 N requests to the store, however many they are::

    rank 0:     begins a round, by a random word: the store of a restarted torchrun still holds what was there before
    each rank:  sees the round, and leaves its facts there
    rank 0:     compares them with its own, until all have come or the time is over
                leaves a verdict for each rank that has come
    each rank:  waits for its verdict; where it is a refusal, it reads the facts that differ, and raises the same

What the agents of torchrun count themselves (TORCHELASTIC_RESTART_COUNT) differs between them once a node has joined
or left, so it tells no round from another.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from dtrain.distributed.handshake import RankInfo, SignedEntries, check_identities, place_on_host
from dtrain.distributed.port_file import agreed_port
from dtrain.distributed.store import OpenStore, open_store
from dtrain.errors import WorldError
from dtrain.launch.env.job import DEFAULT_TIMEOUT, TIMEOUT
from dtrain.launch.env.rank_env import RankFacts
from dtrain.launch.nodes.secret import RanksKey, take_ranks_key

_ROUND = "round"
_ROUND_FORM = "[0-9a-f]{32}"
_POLL_SECONDS = 0.02
_POLL_SECONDS_OF_A_RANK = 0.0002  # of each rank of the job, so that all together ask some thousand times a second
_SPARE_SECONDS = 5.0  # for the verdict, after rank 0's time is over
_FOREIGN = 64  # entries of others that are looked at besides
_AT_ONCE = 512  # entries in one request
_SHOWN = 64  # so many entries are compared again by each rank where one differs


def time_limit() -> timedelta:
    """Returns how long ranks wait for one another before the first step.

    Raises:
        WorldError: DTRAIN_RDZV_TIMEOUT is not a number of seconds.
    """
    text = os.environ.get(TIMEOUT, str(DEFAULT_TIMEOUT))
    try:
        return timedelta(seconds=max(1.0, float(text)))
    except ValueError:
        raise WorldError(f"{TIMEOUT}={text!r} is not a number of seconds.") from None


def rendezvous(facts: RankFacts, said: RankInfo) -> tuple[OpenStore, RankFacts]:
    """Meets all ranks and compares what they say of themselves.

    Args:
        facts: this rank's facts.
        said: what it says of itself; see `handshake.rank_info`.

    Returns:
        the store, which is to be kept until the process group is up, which uses the same server; and the facts, with
        the place among the ranks of this host where the launcher has not told it.

    Raises:
        WorldError: ranks did not come in time, or do not fit together; every rank that came raises it.
    """
    limit, key = time_limit(), take_ranks_key()
    with agreed_port(facts.rank, limit):
        return _meet(facts, said, limit, key)


def _meet(facts: RankFacts, said: RankInfo, limit: timedelta, key: RanksKey) -> tuple[OpenStore, RankFacts]:
    opened = open_store(facts, limit, key)
    store = PrefixStore(f"dtrain/{SignedEntries(said, key.value, '').folder}", opened.store)
    deadline = time.monotonic() + limit.total_seconds()
    try:
        if facts.rank == 0:
            one: Leader | Follower = Leader(store, said, key.value, facts)
        else:
            one = Follower(store, said, key.value, facts)
            deadline += _SPARE_SECONDS
        pause = max(_POLL_SECONDS, facts.size * _POLL_SECONDS_OF_A_RANK) if facts.rank else _POLL_SECONDS
        while not one.look():
            if time.monotonic() > deadline:
                one.give_up(limit)
            time.sleep(pause)
    except dist.DistError as error:
        raise WorldError(f"rank 0 exited while the ranks were connecting: {error}") from None
    if opened.for_group is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The agents keep one store over restarts: what an earlier process group has left there is not for this one.
        opened = replace(opened, for_group=PrefixStore(f"dtrain/{one.round}", opened.store))
    return opened, one.placed


@dataclass(frozen=True)
class _Late:
    """Who is missing when the time is over."""

    missing: Sequence[int]
    hosts: Sequence[str]
    foreign: int

    def error(self, facts: RankFacts, limit: timedelta) -> WorldError:
        others = ""
        if self.foreign:
            others = f" {self.foreign} connected that do not belong to this job: stop that job, or choose another port."
        return WorldError(
            f"rank {', '.join(map(str, self.missing))} of {facts.size} did not connect within "
            f"{limit.total_seconds():g} s; the others did ({', '.join(self.hosts)}).{others} Check "
            f"their output, or allow more time: --rdzv-timeout, or {TIMEOUT}.",
            on_all_ranks=True,
        )


class Leader:
    """Rank 0's part.

    Args:
        store: where all meet.
        said: what rank 0 says of itself.
        key: that of the job's ranks.
        facts: rank 0's.

    Attributes:
        round: the word that tells this start of the job from any other.
        placed: the facts, with the place on this host once all have come.
    """

    def __init__(self, store: Store, said: RankInfo, key: bytes, facts: RankFacts) -> None:
        self.round = secrets.token_hex(16)
        self.placed = facts
        self._top, self._key = store, key
        self._store, self._facts = PrefixStore(self.round, store), facts
        self._entries = SignedEntries(said, key, self.round)
        self._mine = said
        self._said: dict[int, RankInfo] = {}  # number of the entry -> what it says
        self._ranks: dict[int, int] = {}  # rank -> number of its entry
        self._devices: set[str] = set()
        self._pending: list[int] = []
        self._seen = self._foreign = 0
        self._store.set(_entry(self._store.add("count", 1)), self._entries.text())
        store.set(_ROUND, self.round)

    def look(self) -> bool:
        """Reads what has come; returns whether all ranks are here, and each has its verdict.

        Raises:
            WorldError: one does not fit; all that came learn of it.
        """
        current = self._top.get(_ROUND).decode(errors="replace")
        if current != self.round:
            self._check_other_leader(current)
            self._top.set(_ROUND, self.round)  # it was none of this job's; ranks that come would wait in it in vain
        # Nothing that is in the store is waited for or believed by itself: whoever reaches the port can write there.
        count = min(self._store.add("count", 0), self._facts.size + _FOREIGN)
        self._pending += range(self._seen + 1, count + 1)
        self._seen = count
        for numbers in _in_pieces(self._written()):
            for number, raw in zip(numbers, self._store.multi_get([_entry(one) for one in numbers]), strict=True):
                self._take(number, raw)
        if len(self._ranks) < self._facts.size:
            return False
        places = place_on_host(list(self._said.values()))
        self._tell({number: {"ok": places[one["rank"]]} for number, one in self._said.items()})
        self.placed = _placed(self._facts, *places[0])
        return True

    def give_up(self, limit: timedelta) -> None:
        """The time is over.

        Raises:
            WorldError: always; it names who is missing, also to those that came.
        """
        missing = [rank for rank in range(self._facts.size) if rank not in self._ranks]
        hosts = list(dict.fromkeys(one["host"] for one in self._said.values()))
        late = _Late(missing, hosts, self._foreign)
        self._refuse({"late": [missing, hosts, self._foreign]})
        raise late.error(self._facts, limit)

    def _check_other_leader(self, current: str) -> None:
        """Another process has begun a round meanwhile: each of the two learns that both are rank 0.

        Raises:
            WorldError: it belongs to this job.
        """
        if not re.fullmatch(_ROUND_FORM, current):
            return
        theirs, entries = PrefixStore(current, self._top), SignedEntries(self._mine, self._key, current)
        # A rank 0 leaves its entry before it names its round; in a stranger's round may be that of a rank that joined.
        one = entries.read(theirs.get(_entry(1))) if theirs.check([_entry(1)]) else None
        if one is not None and one["rank"] == self._mine["rank"]:
            theirs.set(_entry(theirs.add("count", 1)), entries.text())
            check_identities([one, self._mine])

    def _written(self) -> list[int]:
        """Returns the numbers of entries that can be read now; others have been announced and are on their way."""
        if not self._pending:
            return []
        if self._store.check([_entry(one) for one in self._pending]):
            found, self._pending = self._pending, []
            return found
        found = [one for one in self._pending if self._store.check([_entry(one)])]
        self._pending = [one for one in self._pending if one not in found]
        return found

    def _take(self, number: int, raw: bytes) -> None:
        one = self._entries.read(raw)
        if one is None:
            self._foreign += 1
            return
        self._said[number] = one
        device = one["device"] and f"{one['device']} of {one['host']}"
        if one["same"] == self._mine["same"] and one["rank"] not in self._ranks and device not in self._devices:
            self._ranks[one["rank"]] = number
            self._devices |= {device} if device else set()
            return
        try:
            check_identities(list(self._said.values()))
        except WorldError:
            self._refuse({"look": self._telling(number)})
            raise

    def _telling(self, number: int) -> list[int]:
        """Returns the entries that show what is wrong: all, or of very many those that matter."""
        if len(self._said) <= _SHOWN:
            return list(self._said)
        odd = self._said[number]
        twins = [n for n, one in self._said.items() if one["rank"] == odd["rank"] or one["device"] == odd["device"]]
        return sorted({min(self._said), number, *twins[:2]})

    def _refuse(self, verdict: dict[str, Any]) -> None:
        """Leaves word for all that came, and stays until they have seen it, for some seconds at most."""
        try:
            self._tell(dict.fromkeys(self._said, verdict))
            deadline = time.monotonic() + _SPARE_SECONDS
            while self._store.add("seen", 0) < len(self._said) - 1 and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
        except dist.DistError:  # it has gone; the reason is raised all the same
            pass

    def _tell(self, verdicts: dict[int, dict[str, Any]]) -> None:
        for numbers in _in_pieces(list(verdicts)):
            keys = [_verdict(number) for number in numbers]
            texts = [self._entries.signed(_for(number, verdicts[number])) for number in numbers]
            self._store.multi_set(keys, texts)  # type: ignore[attr-defined]  # which the stubs do not know


class Follower:
    """Any other rank's part.

    Args:
        store: where all meet.
        said: what this rank says of itself.
        key: that of the job's ranks.
        facts: this rank's.

    Attributes:
        round: as for `Leader`; empty before rank 0 has come.
        placed: as for `Leader`.
    """

    def __init__(self, store: Store, said: RankInfo, key: bytes, facts: RankFacts) -> None:
        self.round = ""
        self.placed = facts
        self._top, self._said, self._key, self._facts = store, said, key, facts
        self._store: Store = store
        self._entries = SignedEntries(said, key, "")
        self._joined: dict[str, int] = {}  # round -> number of the entry there
        self._number = 0

    def look(self) -> bool:
        """Leaves this rank's facts as soon as rank 0 is there; returns whether all is well with all ranks.

        Raises:
            WorldError: it is not.
        """
        if not self._top.check([_ROUND]):
            return False
        current = self._top.get(_ROUND).decode(errors="replace")
        if current != self.round and re.fullmatch(_ROUND_FORM, current):
            self._join(current)
        if not self.round or not self._store.check([_verdict(self._number)]):
            return False
        text = self._entries.opened(self._store.get(_verdict(self._number)))
        verdict = None if text is None else _read(text, self._number)
        if verdict is None:
            return False
        if "ok" in verdict:
            self.placed = _placed(self._facts, *verdict["ok"])
            return True
        self._store.add("seen", 1)
        raise self._refusal(verdict)

    def give_up(self, limit: timedelta) -> None:
        """The time is over, and rank 0 has not said so.

        Raises:
            WorldError: always.
        """
        raise _Late([0], [self._said["host"]], 0).error(self._facts, limit)

    def _join(self, current: str) -> None:
        self.round, self._store = current, PrefixStore(current, self._top)
        self._entries = SignedEntries(self._said, self._key, current)
        if current not in self._joined:  # where it was before, and a stranger's round came between
            self._joined[current] = self._store.add("count", 1)
            self._store.set(_entry(self._joined[current]), self._entries.text())
        self._number = self._joined[current]

    def _refusal(self, verdict: dict[str, Any]) -> WorldError:
        if "late" in verdict:
            return _Late(*verdict["late"]).error(self._facts, time_limit())
        raws = self._store.multi_get([_entry(number) for number in verdict["look"]])
        found = [one for raw in raws if (one := self._entries.read(raw)) is not None]
        try:
            check_identities(found)
        except WorldError as error:
            return error
        return WorldError("the ranks do not fit together: see rank 0's output.", on_all_ranks=True)


def _entry(number: int) -> str:
    return f"entry/{number}"


def _verdict(number: int) -> str:
    return f"verdict/{number}"


def _for(number: int, verdict: dict[str, Any]) -> str:
    """A verdict names whom it is for, so that none can be read as another one's."""
    return json.dumps({"for": number, **verdict})


def _read(text: str, number: int) -> dict[str, Any] | None:
    found = json.loads(text)
    return found if isinstance(found, dict) and found.get("for") == number else None


def _in_pieces(numbers: Sequence[int]) -> Iterable[Sequence[int]]:
    return (numbers[start : start + _AT_ONCE] for start in range(0, len(numbers), _AT_ONCE))


def _placed(facts: RankFacts, local_rank: int, local_size: int) -> RankFacts:
    return replace(facts, local_rank=local_rank, local_size=local_size) if facts.local_unknown else facts
