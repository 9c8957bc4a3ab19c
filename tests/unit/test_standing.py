"""Whom a rank waits for, and for how long: as long as another one may still come, and no longer."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from dtrain.distributed import standing
from dtrain.distributed.standing import STANDING, words_of

WORLD: Any = SimpleNamespace(device=torch.device("cpu"))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> HashStore:
    """This process is rank 0 of two, in its third train step."""
    found = HashStore()
    monkeypatch.setattr(standing, "_get_default_store", lambda: found)
    monkeypatch.setattr(STANDING, "_facts", {"gradients": ("1/0", 2, 2, False)})
    return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that passes by waiting alone; `after` is called once `at` seconds are over."""
    fake = SimpleNamespace(now=0.0, at=float("inf"), after=None)

    def sleep(seconds: float) -> None:
        fake.now += seconds
        if fake.now >= fake.at:
            fake.after()

    monkeypatch.setattr(standing, "time", SimpleNamespace(monotonic=lambda: fake.now, sleep=sleep))
    return fake


def test_a_rank_that_comes_late_is_waited_for(store: HashStore, clock: SimpleNamespace) -> None:
    clock.at, clock.after = 400.0, lambda: store.set("x/1", "unfreezes")
    store.set("dtrain/standing/1", json.dumps({"gradients": ["1/0", 2, 2, False]}))  # it fetches its batch
    assert words_of(WORLD, "x/", [1], b"unfreezes") == ({1: b"unfreezes"}, [])
    assert clock.now >= 400


def test_one_that_says_something_else_is_not(store: HashStore, clock: SimpleNamespace) -> None:
    store.set("x/2", "leaves DDP")
    assert words_of(WORLD, "x/", [1, 2], b"unfreezes") == ({}, [2])
    assert clock.now == 0


@pytest.mark.parametrize(
    ("stands", "past"),
    [
        (["1/0", 2, 3, True], True),  # in an average that this rank has not come to
        (["1/0", 3, 3, False], True),  # a train step further
        (["1/0", 2, 2, True], False),  # in one that this rank has come to
        (["1/0", 2, 3, False], False),
        (["0/9", 9, 9, True], False),  # of another training, or before all have met
    ],
)
def test_one_is_waited_for_in_vain_where_it_waits_for_this_rank(
    store: HashStore, clock: SimpleNamespace, stands: list[Any], past: bool
) -> None:
    store.set("dtrain/standing/1", json.dumps({"gradients": stands}))
    assert words_of(WORLD, "x/", [1], b"unfreezes") == ({}, [1])
    assert (clock.now < 2) is past
    assert past or clock.now > 1000, "as long as a collective"
