"""The curve of a learning-rate range test, and what it suggests. Knows nothing of torch.

The test is that of L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", 2017 (arXiv:1506.01186),
section 3.3; the growth by a factor, the smoothing and the end at four times the best are those of fastai.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from dtrain.errors import UsageError

SMOOTHING = 0.9  # what the running mean keeps of itself at each step
DIVERGED = 4.0  # times the best
_LEAST_FALL = 0.01  # of the first losses


def growing(start: float, end: float, steps: int) -> list[float]:
    """Returns the learning rates of a test: each is the one before it times the same factor.

    Raises:
        UsageError: they would not grow.
    """
    if not 0 < start < end < math.inf:
        raise UsageError(f"--from {start:g} --to {end:g}: the lr grows from above 0: --from should be less than --to.")
    return [start * (end / start) ** (step / (steps - 1)) for step in range(steps)]


@dataclass
class Curve:
    """The losses of a test so far.

    Attributes:
        rates: the learning rate of each step there is to be.
        losses: of each step so far: the mean over the samples of all ranks, before the step's update.
        smoothed: their exponential running mean, with its bias to 0 taken out.
        ended: why the test ended before its last step; empty where it did not.
    """

    rates: list[float]
    losses: list[float] = field(default_factory=list)
    smoothed: list[float] = field(default_factory=list)
    ended: str = ""
    _mean: float = 0.0

    @property
    def settled(self) -> int:
        """The first step whose running mean is of some steps: a tenth of all are passed by."""
        return max(1, len(self.rates) // 10)

    def add(self, loss: float) -> bool:
        """Takes the loss of one more step in; returns whether the test goes on."""
        self.losses.append(loss)
        self._mean = SMOOTHING * self._mean + (1 - SMOOTHING) * loss
        self.smoothed.append(self._mean / (1 - SMOOTHING ** len(self.losses)))
        best = min(self.smoothed[self.settled :], default=math.inf)
        if not math.isfinite(loss):
            self.ended = "the loss is no longer finite"
        elif math.isfinite(best) and self.smoothed[-1] > best + (DIVERGED - 1) * abs(best):
            self.ended = f"the smoothed loss is more than {DIVERGED:g} times its best, {best:.4g}"
        return not self.ended

    def points(self) -> tuple[list[float], list[float], list[float]]:
        """Returns rates, losses and smoothed losses of the steps whose loss is finite."""
        count = sum(map(math.isfinite, self.losses))  # one that is not is the last
        return self.rates[:count], self.losses[:count], self.smoothed[:count]

    def top(self) -> float:
        """Returns how high a plot shall reach: somewhat above what comes before the lowest smoothed loss.

        What comes after it may be so much higher that all else would be flat.
        """
        _, _, smoothed = self.points()
        before = smoothed[: smoothed.index(min(smoothed)) + 1]
        return max(before) + max(0.3 * (max(before) - before[-1]), 0.01 * abs(before[-1]))

    def suggestion(self) -> Suggestion | None:
        """Returns what the curve suggests; None where the loss does not come down.

        It does where the smoothed loss falls below the mean of the first losses (a tenth of all steps) by more than
        these scatter (their standard deviation), and by more than 1 %.
        """
        rates, losses, smoothed = self.points()
        first = losses[: self.settled + 1]
        if len(smoothed) < self.settled + 3:
            return None
        lowest = min(range(self.settled, len(smoothed)), key=smoothed.__getitem__)
        fall = statistics.fmean(first) - smoothed[lowest]
        if fall <= max(statistics.pstdev(first), _LEAST_FALL * abs(statistics.fmean(first))):
            return None
        steepest = min(range(self.settled, lowest + 1), key=lambda step: _slope(smoothed, step))
        return Suggestion(rates[steepest], rates[lowest] / 10, rates[lowest], smoothed[lowest])


@dataclass(frozen=True)
class Suggestion:
    """Learning rates by two rules.

    Attributes:
        steepest: where the smoothed loss falls most steeply over the logarithm of the rate.
        tenth: a tenth of the rate at which it is lowest.
        lowest: the rate at which it is lowest.
        loss: the smoothed loss there.
    """

    steepest: float
    tenth: float
    lowest: float
    loss: float


def _slope(values: list[float], step: int) -> float:
    """The central difference, one-sided at the ends; the steps are equally far apart in the rate's logarithm."""
    low, high = max(0, step - 1), min(len(values) - 1, step + 1)
    return (values[high] - values[low]) / (high - low)
