"""The search for the largest batch and the estimate of its memory, without a net."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.tools.find.search import BatchTrial, estimate, largest


@given(limit=st.integers(0, 5000), start=st.integers(1, 600), most=st.integers(1, 4000))
def test_the_largest_that_fits_is_found_to_within_a_sixteenth(limit: int, start: int, most: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    found = largest(fits, start, most)
    best = min(limit, most)
    assert found <= best and best - found <= max(0, found // 16)
    assert found == 0 or found in tried, "what is told was tried"
    assert len(tried) == len(set(tried)) and all(1 <= batch <= most for batch in tried)
    assert len(tried) < 30


def test_it_doubles_and_then_bisects() -> None:
    tried: list[int] = []
    assert largest(lambda batch: tried.append(batch) or batch <= 100, 16, 1000) == 100  # type: ignore[func-returns-value]
    assert tried == [16, 32, 64, 128, 96, 112, 104, 100]


MIB = 1 << 20


def test_the_estimate_is_the_slope_of_the_largest_batches() -> None:
    """The small ones lie on a floor, as a program's own memory does."""
    sizes = [8, 16, 32, 64, 128, 256]
    tries = [
        BatchTrial(n, True, "", max(400 * MIB, 300 * MIB + 2 * MIB * n), 1.0, 10 * MIB, 10 * MIB, 20 * MIB)
        for n in sizes
    ]
    found = estimate([*tries, BatchTrial(512, False, "out of memory", 900 * MIB)])
    assert found is not None and found.per_sample is not None and found.rest is not None
    assert found.per_sample == pytest.approx(2 * MIB, rel=0.1)
    assert found.rest == pytest.approx((300 - 40) * MIB, rel=0.1)
    assert (found.parameters, found.gradients, found.optimizer) == (10 * MIB, 10 * MIB, 20 * MIB)


def test_there_is_no_slope_of_one_batch_or_of_a_floor() -> None:
    one = BatchTrial(8, True, "", 5 * MIB)
    for tries in ([one], [one, BatchTrial(16, True, "", 5 * MIB)]):
        found = estimate(tries)
        assert found is not None and found.per_sample is None and found.rest is None
    assert estimate([BatchTrial(8, False, "out of memory", 5 * MIB)]) is None
