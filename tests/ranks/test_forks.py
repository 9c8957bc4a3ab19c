"""Processes that a rank forks right behind a collective, as a DataLoader's workers are, begin to run.

DTRAIN_TEST_SWEEP=full pytest tests/ranks/test_forks.py    # thousands of forks; without dtrain/distributed/forks.py some hang
"""

from __future__ import annotations

import os
import signal
import time

import pytest
from helpers.ranks import run_ranks
from helpers.sweep import FULL

from dtrain.distributed.forks import needs_care
from dtrain.distributed.world import World

FORKS = 5000 if FULL else 100


def fork_behind_collectives(world: World, forks: int) -> int:
    """One rank: how many of its children never came to run."""
    hung = 0
    for number in range(forks):
        world.gather_json(number)
        child = os.fork()
        if child == 0:
            os._exit(0)
        if not _ended(child, 60.0):
            hung += 1
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return hung


def _ended(child: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


@pytest.mark.timeout(3600 if FULL else 300)
def test_none_hangs() -> None:
    assert run_ranks(fork_behind_collectives, 3, timeout=3600 if FULL else 240, forks=FORKS) == [0, 0, 0]


@pytest.mark.parametrize(
    ("version", "care"),
    [
        ((3, 10, 14), True),
        ((3, 10, 15), False),
        ((3, 11, 0), True),
        ((3, 11, 9), True),
        ((3, 11, 10), False),
        ((3, 12, 0), False),
    ],
)
def test_only_pythons_that_need_it_wait(version: tuple[int, int, int], care: bool) -> None:
    assert needs_care(version) is care
