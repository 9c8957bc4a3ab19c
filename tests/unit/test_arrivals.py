"""Ranks arrive at rank 0's store: simulated ones, in one thread, over a store that counts what it is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from dtrain.distributed.rendezvous import Follower, Leader
from dtrain.errors import WorldError
from dtrain.launch.env.rank_env import RankFacts

KEY = b"k" * 32
LIMIT = timedelta(seconds=7)


class Counted(dist.Store):
    """A store in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, bytes] = {}
        self.requests = 0

    def set(self, key: str, value: str | bytes) -> None:
        self.requests += 1
        self.values[key] = value.encode() if isinstance(value, str) else bytes(value)

    def get(self, key: str) -> bytes:
        self.requests += 1
        return self.values[key]

    def add(self, key: str, value: int) -> int:
        self.requests += 1
        now = int(self.values.get(key, b"0")) + value
        self.values[key] = str(now).encode()
        return now

    def check(self, keys: list[str]) -> bool:
        self.requests += 1
        return all(key in self.values for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.requests += 1
        return [self.values[key] for key in keys]

    def multi_set(self, keys: list[str], values: list[bytes]) -> None:
        self.requests += 1
        self.values.update(zip(keys, map(bytes, values), strict=True))


@dataclass
class Arrivals:
    """All ranks of a job, as objects."""

    size: int
    same: Callable[[int], dict[str, str]] = lambda rank: {"config lr": "'0.1'"}
    host_of: Callable[[int], str] = lambda rank: f"n{rank // 8}"
    store: Counted = field(default_factory=Counted)
    unknown: bool = False

    def facts(self, rank: int) -> RankFacts:
        return RankFacts(rank, self.size, 0, 1, launched=True, local_unknown=self.unknown)

    def said(self, rank: int) -> dict[str, Any]:
        return {"rank": rank, "host": self.host_of(rank), "pid": 1, "device": None, "same": self.same(rank)}

    def first(self) -> Leader:
        return Leader(self.store, self.said(0), KEY, self.facts(0))

    def other(self, rank: int) -> Follower:
        return Follower(self.store, self.said(rank), KEY, self.facts(rank))


def looks(one: Leader | Follower) -> bool | str:
    try:
        return one.look()
    except WorldError as error:
        assert error.on_all_ranks
        return str(error)


def test_4096_ranks_arrive_with_some_requests_each() -> None:
    asked = []
    for size in (64, 4096):
        ranks = Arrivals(size)
        first, others = ranks.first(), [ranks.other(rank) for rank in range(1, size)]
        assert [one.look() for one in others] == [False] * (size - 1)
        assert first.look()
        assert all(one.look() for one in others)
        asked.append(ranks.store.requests / size)
    assert max(asked) < 15, "requests a rank, however many ranks there are"


def test_who_comes_before_rank_0_waits_for_it() -> None:
    ranks = Arrivals(3)
    one = ranks.other(1)
    assert not one.look()
    first, two = ranks.first(), ranks.other(2)
    assert [one.look(), first.look(), two.look(), one.look()] == [False, False, False, False]
    assert [first.look(), one.look(), two.look()] == [True, True, True]


@pytest.mark.parametrize("size", [3, 300])
def test_a_difference_is_raised_by_all_in_their_own_words(size: int) -> None:
    ranks = Arrivals(size, same=lambda rank: {"config lr": "'0.2'" if rank == 2 else "'0.1'"})
    first, others = ranks.first(), [ranks.other(rank) for rank in range(1, size)]
    assert not any(one.look() for one in others)
    ranks.store.values[f"{first.round}/seen"] = str(size).encode()  # nobody is waited for
    text = looks(first)
    assert isinstance(text, str)
    assert text.startswith("config lr is not the same on all ranks: '0.1' on rank 0")
    assert "another one on rank 2 (n0)" in text
    odd = looks(others[1])
    assert isinstance(odd, str)
    assert "another one on rank 0" in odd
    assert "'0.2' on rank 2" in odd
    assert "another one on rank 2" in str(looks(others[0]))
    assert not any(b"0.1" in value or b"0.2" in value for value in ranks.store.values.values()), "shown to nobody"


def test_two_of_one_rank_are_refused() -> None:
    ranks = Arrivals(3)
    first, one, twin = ranks.first(), ranks.other(1), ranks.other(1)
    assert not one.look()
    assert not twin.look()
    ranks.store.values[f"{first.round}/seen"] = b"9"
    for each in (first, one, twin):
        assert "are both rank 1" in str(looks(each))


def test_who_is_missing_is_named_to_all_that_came() -> None:
    ranks = Arrivals(4)
    first, one = ranks.first(), ranks.other(2)
    assert not one.look()
    assert not first.look()
    ranks.store.values[f"{first.round}/seen"] = b"9"
    with pytest.raises(WorldError, match=r"^rank 1, 3 of 4 did not connect within 7 s; the others did \(n0\)"):
        first.give_up(LIMIT)
    assert str(looks(one)).startswith("rank 1, 3 of 4 did not connect within ")


def test_without_rank_0_a_rank_says_so() -> None:
    with pytest.raises(WorldError, match=r"^rank 0 of 4 did not connect within 7 s"):
        Arrivals(4).other(2).give_up(LIMIT)


def test_what_strangers_write_is_neither_waited_for_nor_believed() -> None:
    ranks = Arrivals(2)
    first, one = ranks.first(), ranks.other(1)
    stranger = PrefixStore(first.round, ranks.store)
    stranger.add("count", 1)  # announced, and never written
    stranger.set(f"entry/{stranger.add('count', 1)}", "x" * 64 + '{"rank": 1}')
    assert not one.look()
    stranger.set("verdict/4", "x" * 64 + '{"for": 4, "ok": [0, 1]}')
    assert not one.look(), "no verdict of rank 0's"
    assert first.look()
    stranger.set("verdict/4", b"")
    first._tell({4: {"ok": [0, 1]}})
    assert one.look()


def test_a_restart_in_a_store_that_is_still_there_is_a_round_of_its_own() -> None:
    """As torchrun's agents restart their ranks, with fewer nodes."""
    before = Arrivals(3)
    first, others = before.first(), [before.other(1), before.other(2)]
    assert [one.look() for one in (*others, first, *others)] == [False, False, True, True, True]
    now = Arrivals(2, store=before.store)
    early = now.other(1)
    assert not early.look(), "the verdict of the round before is not for it"
    again = now.first()
    assert again.round != first.round
    assert [early.look(), again.look(), early.look()] == [False, True, True]


def test_places_on_hosts_are_known_once_all_have_come() -> None:
    """PyTorchJob gives no LOCAL_RANK: two pods of one host, two of another, in no order."""
    ranks = Arrivals(4, host_of=lambda rank: "ab"[rank % 2], unknown=True)
    first, others = ranks.first(), [ranks.other(rank) for rank in (1, 2, 3)]
    for one in (*others, first, *others):
        one.look()
    found = [(one.placed.local_rank, one.placed.local_size) for one in (first, *others)]
    assert found == [(0, 2), (0, 2), (1, 2), (1, 2)]


def test_a_verdict_for_another_rank_is_no_verdict() -> None:
    ranks = Arrivals(3)
    first, one, two = ranks.first(), ranks.other(1), ranks.other(2)
    assert [one.look(), two.look()] == [False, False]
    first._tell({2: {"ok": [0, 1]}})
    ranks.store.values[f"{first.round}/verdict/3"] = ranks.store.values[f"{first.round}/verdict/2"]
    assert [one.look(), two.look()] == [True, False]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("foreign", ["f" * 32, "no round at all", ""])
def test_a_round_of_a_stranger_keeps_nobody_away_and_fills_no_store(foreign: str, before: bool) -> None:
    ranks = Arrivals(3)
    first, one, two = ranks.first(), ranks.other(1), ranks.other(2)
    if before:
        assert not one.look()
    ranks.store.values["round"] = foreign.encode()
    assert not one.look(), "which has joined it, where it looks like one"
    assert not first.look()
    assert not one.look(), "and leaves it"
    for _ in range(3):  # a stranger that insists
        ranks.store.values["round"] = foreign.encode()
        held = len(ranks.store.values)
        assert not first.look()
        assert len(ranks.store.values) == held
    assert [two.look(), first.look(), one.look(), two.look()] == [False, True, True, True]


def test_two_that_are_both_rank_0_learn_it_and_leave_one_entry() -> None:
    ranks = Arrivals(2)
    first = ranks.first()
    second = ranks.first()
    held = len(ranks.store.values)
    assert "are both rank 0" in str(looks(first))
    assert len(ranks.store.values) == held + 1
    ranks.store.values[f"{second.round}/seen"] = b"9"
    assert "are both rank 0" in str(looks(second))
