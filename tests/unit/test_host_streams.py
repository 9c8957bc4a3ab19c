"""Python's and NumPy's generators while a step has common ones: seeded, looked at, and put back."""

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from dtrain.distributed.seeding import HostStreams


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    python, theirs, numbers = random.getstate(), np.random.get_bit_generator(), np.random.get_state()
    yield
    random.setstate(python)
    np.random.set_bit_generator(theirs)
    np.random.set_state(numbers)


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(np.random.randn())


def within(host: HostStreams, seed: int, function: Callable[[], object]) -> tuple[object, bool]:
    host.exchange(seed)
    return function(), host.put_back()


def test_a_seed_gives_the_same_numbers_and_what_comes_after_is_as_if_nothing_was_drawn() -> None:
    random.seed(3)
    np.random.seed(3)
    expected = [(*drawn(), np.random.randn())[:3] for _ in range(3)]
    random.seed(3)
    np.random.seed(3)
    host = HostStreams()
    first = [within(host, seed, drawn)[0] for seed in (7, 8, 7)]
    assert first[0] == first[2] != first[1]
    random.seed(7)
    np.random.seed(7)
    assert first[0] == drawn()
    random.seed(3)
    np.random.seed(3)
    found = []
    for seed in range(3):
        found.append((random.random(), float(np.random.rand()), float(np.random.randn())))
        np.random.randn()  # an exchange forgets the second number of a pair
        within(host, seed, drawn)
    assert found == expected


@pytest.mark.parametrize(
    ("function", "seen"),
    [
        (lambda: None, False),
        (random.random, True),
        (np.random.rand, True),
        (lambda: np.random.seed(1), True),
        (lambda: random.seed(1), True),
        (lambda: np.random.set_bit_generator(np.random.PCG64(1)), True),
        (lambda: np.random.default_rng(1).normal(), False),  # a generator of the user's own
        (lambda: random.Random(1).random(), False),
    ],
)
def test_what_draws_is_seen(function: Callable[[], object], seen: bool) -> None:
    assert within(HostStreams(), 5, function)[1] is seen


def test_a_global_generator_of_another_kind_is_kept() -> None:
    theirs = np.random.PCG64(1)
    np.random.set_bit_generator(theirs)
    within(HostStreams(), 5, np.random.rand)
    assert np.random.get_bit_generator() is theirs
    assert theirs.random_raw() == np.random.PCG64(1).random_raw()
