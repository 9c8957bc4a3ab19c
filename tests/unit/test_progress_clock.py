"""How long a run still takes, and how that is said: known answers, at times that the test gives."""

from __future__ import annotations

import pytest

from dtrain.callbacks.progress import PassFacts, RunFacts
from dtrain.callbacks.progress.clock import Clock, short_number, short_time


def facts(split: str, epoch: int, steps: int | None, *, epochs: int = 4, ranks: int = 1, **more: object) -> PassFacts:
    return PassFacts(split, epoch, steps, run=RunFacts(epochs, ranks), **more)


def a_pass(clock: Clock, one: PassFacts, begun: float, end: float, steps: int) -> None:
    clock.begin(one, begun)
    clock.look(steps, end)


def test_the_first_epoch_is_told_by_its_steps() -> None:
    clock = Clock()
    clock.begin(facts("train", 1, 100), 10.0)
    assert (clock.epoch_left(10.0), clock.run_left(10.0)) == (None, None)  # nothing is known yet
    clock.look(25, 15.0)
    assert clock.epoch_left(15.0) == pytest.approx(15.0)
    assert clock.run_left(15.0) == pytest.approx(15.0 + 3 * 20.0)
    assert clock.epoch_left(18.0) == pytest.approx(12.0)  # time goes on also while no step is done


def test_validation_and_what_else_an_epoch_takes_count_once_they_were_seen() -> None:
    clock = Clock()
    a_pass(clock, facts("train", 1, 100), 0.0, 20.0, 100)
    a_pass(clock, facts("valid", 1, 10), 20.0, 24.0, 10)
    clock.end_epoch(24.0)
    clock.begin(facts("train", 2, 100), 25.0)
    assert clock.epoch_left(26.0) == pytest.approx(19.0 + 4.0)  # as long as last time, until a step is seen
    clock.look(50, 35.0)
    assert clock.epoch_left(35.0) == pytest.approx(10.0 + 4.0)
    assert clock.run_left(35.0) == pytest.approx(14.0 + 2 * 24.0)
    clock.begin(facts("valid", 2, 10), 45.0)
    clock.look(5, 47.0)
    assert clock.epoch_left(47.0) == pytest.approx(2.0)
    clock.end_epoch(49.0)
    a_pass(clock, facts("train", 4, 100), 49.0, 59.0, 50)
    assert clock.run_left(59.0) == clock.epoch_left(59.0)  # the last one


def test_a_run_that_goes_on_within_an_epoch_counts_its_own_steps_alone() -> None:
    clock = Clock()
    samples = [900]
    clock.begin(facts("train", 2, 100, skipped=90, seconds=500.0, samples=lambda: samples[0], ranks=2), 0.0)
    assert clock.steps == 90  # what is shown before the first look
    samples[0] = 950
    clock.look(95, 10.0)
    assert clock.epoch_left(10.0) == pytest.approx(10.0)  # 5 steps at 2 s, not 5 at what 95 took
    assert clock.run_left(10.0) == pytest.approx(10.0 + 2 * 200.0)
    assert clock.samples_per_second == pytest.approx(10.0)  # 50 here, as many on the other rank, in 10 s
    clock.end_epoch(20.0)
    clock.begin(facts("train", 3, 100), 20.0)
    clock.look(10, 40.0)
    assert clock.run_left(40.0) == pytest.approx(180.0 + 200.0)  # half an epoch is no measure for a whole one


def test_a_loader_that_cannot_tell_is_as_long_as_last_time() -> None:
    clock = Clock()
    clock.begin(facts("train", 1, None), 0.0)
    clock.look(30, 3.0)
    assert (clock.total, clock.epoch_left(3.0), clock.run_left(3.0)) == (None, None, None)
    clock.look(40, 4.0)
    clock.end_epoch(4.0)
    clock.begin(facts("train", 2, None), 4.0)
    clock.look(10, 5.0)
    assert clock.total == 40
    assert clock.epoch_left(5.0) == pytest.approx(3.0)
    assert clock.run_left(5.0) == pytest.approx(3.0 + 2 * 4.0)
    clock.look(41, 8.1)
    assert (clock.total, clock.epoch_left(8.1)) == (None, None)  # it is longer: nothing is known again


def test_a_first_step_that_compiles_is_forgotten() -> None:
    clock = Clock()
    clock.begin(facts("train", 1, 1000, epochs=1), 0.0)
    clock.look(1, 60.0)
    assert clock.epoch_left(60.0) == pytest.approx(999 * 60.0)
    for step in range(2, 500):
        clock.look(step, 60.0 + 0.1 * step)
    assert clock.epoch_left(109.9) == pytest.approx(501 * 0.1, rel=0.05)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0:00"), (7, "0:07"), (725, "12:05"), (3599.6, "1:00:00"), (11045, "3:04:05"), (183840, "2d 03:04")],
)
def test_times(seconds: float, text: str) -> None:
    assert short_time(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.5312, "0.53"), (7.4, "7.4"), (81.4, "81"), (812.3, "812"), (9999, "9999"), (12345, "12.3k"), (4.05e6, "4.05M")],
)
def test_numbers(number: float, text: str) -> None:
    assert short_number(number) == text
