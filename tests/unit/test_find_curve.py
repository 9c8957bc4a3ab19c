"""The curve of the learning-rate range test alone: how it is smoothed, where it ends, what it suggests."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dtrain.cli.find import _print_next
from dtrain.config import load_settings
from dtrain.tools.find.curve import SMOOTHING, Curve, Suggestion, _variance, growing
from dtrain.tools.find.lr import RangeTestResult


def curve_of(losses: list[float], steps: int = 100) -> Curve:
    curve = Curve(growing(1e-6, 1.0, steps))
    for loss in losses:
        if not curve.add(loss):
            break
    return curve


def test_the_smoothing_has_no_bias_to_zero() -> None:
    assert curve_of([3.0] * 20).smoothed == pytest.approx([3.0] * 20)
    losses = np.random.RandomState(0).rand(30) + 1
    weights = SMOOTHING ** np.arange(29, -1, -1)
    assert curve_of(list(losses)).smoothed[-1] == pytest.approx(float(weights @ losses / weights.sum()))


def test_steepest_and_lowest_are_found_by_their_rules() -> None:
    """Against NumPy's difference over a tenth of the steps; the loss steps down, with some noise, and then up again."""
    at = np.arange(100)
    losses = 2 - 1 / (1 + np.exp(-(at - 50) / 4)) + np.exp((at - 88) / 2) + 0.1 * np.random.RandomState(2).randn(100)
    curve = curve_of(list(losses))
    found = curve.suggestion()
    assert found is not None
    smoothed = np.array(curve.smoothed)
    lowest = int(smoothed[10:].argmin()) + 10
    at = np.arange(len(smoothed))
    low, high = np.maximum(at - 5, 0), np.minimum(at + 5, len(smoothed) - 1)
    slopes = (smoothed[high] - smoothed[low]) / (high - low)
    steepest = int(slopes[10 : lowest + 1].argmin()) + 10
    assert curve.rates.index(found.steepest) == steepest
    assert steepest != int(np.gradient(smoothed)[10 : lowest + 1].argmin()) + 10, "that of two steps is the noise's"
    assert (found.lowest, found.tenth) == (curve.rates[lowest], curve.rates[lowest] / 10)
    assert found.loss == smoothed[lowest]


@pytest.mark.parametrize("shift", [0.0, -50.0])
def test_a_loss_that_grows_or_is_not_finite_ends_it(shift: float) -> None:
    """Also where it is below 0, of which 4 times is less."""
    grown = curve_of([10.0 + shift] * 60 + [1000.0] * 20)
    assert 60 < len(grown.losses) < 80 and "4 times its best" in grown.ended
    broken = curve_of([2.0 + shift] * 40 + [math.nan])
    assert broken.ended == "the loss is no longer finite" and len(broken.points()[0]) == 40
    assert curve_of([2.0 + shift] * 100).ended == ""


def test_no_rate_is_suggested_where_the_loss_does_not_come_down() -> None:
    noise = list(2.0 + 0.2 * np.random.RandomState(1).randn(100))
    for losses in ([2.0] * 100, noise, [2.0] * 20 + [9.0] * 80, [math.inf], [2.0] * 5):
        assert curve_of(losses).suggestion() is None
    falling = [value - max(0, at - 40) / 40 for at, value in enumerate(noise)]
    assert curve_of(falling).suggestion() is not None


@pytest.mark.parametrize("steps", [12, 29, 30])
def test_few_steps_come_with_a_word_of_caution(steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = RangeTestResult(Curve(growing(1e-4, 1.0, steps)), "lr")
    _print_next(found, Suggestion(0.1, 0.1, 1.0, 1.0), load_settings("digits", [], {}), [], [])
    told = capsys.readouterr()
    assert "next: dtrain train lr=0.1" in told.out
    assert told.err == (
        f"note: with {steps} steps this may be chance; use --steps 100 (the default) or more\n" if steps < 30 else ""
    )


def test_a_noisy_curve_has_its_lr_from_where_it_falls_and_noise_has_none() -> None:
    """A loss of 2 comes down by a half between lr 1e-3 and 1e-1, and then explodes."""
    at, careful, noise = np.arange(100), [], []
    falls = 1 / (1 + np.exp(-(at - 66) / 4)) - np.exp((at - 88) / 2)
    for seed in range(100):
        scatter = 0.25 * np.random.RandomState(seed).randn(100)
        falling = curve_of(list(2 - falls + scatter)).suggestion()
        assert falling is not None and falling.agree, seed
        assert min(falling.steepest, falling.tenth) == falling.careful
        careful.append(falling.careful)
        noise.append(curve_of(list(2 + scatter)).suggestion())
    assert min(careful) > 1e-3 and max(careful) < 1e-1
    assert sum(one is not None for one in noise) <= 3


def test_more_steps_are_smoothed_over_as_much_of_the_rates() -> None:
    """And the noise that is left of it, against NumPy: the sum of the squared weights."""
    losses = np.random.RandomState(3).rand(400) + 50
    kept = 1 - 0.1 * 100 / 400
    for count in (40, 400):
        weights = kept ** np.arange(count - 1, -1, -1)
        weights /= weights.sum()
        assert curve_of(list(losses[:count]), steps=400).smoothed[-1] == pytest.approx(float(weights @ losses[:count]))
        assert _variance(kept, count) == pytest.approx(float(weights @ weights))
    assert curve_of([1.0], steps=14).smoothing == SMOOTHING


def test_rules_that_are_far_apart_suggest_nothing() -> None:
    assert Suggestion(2e-3, 1e-1, 1.0, 0.5).agree
    far = Suggestion(2e-5, 7e-2, 0.7, 0.5)
    assert not far.agree and far.careful == 2e-5


# --- noise that hides the fall --------------------------------------------------------------------------
