"""The curve of a learning-rate range test, and what it suggests. Knows nothing of torch.

The test is that of L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", 2017 (arXiv:1506.01186),
section 3.3; the growth by a factor, the smoothing and the end at four times the best are those of fastai.
"""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass, field

from dtrain.errors import UsageError
from dtrain.wording import number

SMOOTHING = 0.9  # what the running mean keeps of itself at each step, in a test of up to 100
DIVERGED = 4.0  # times the best
_ERRORS = 3.5  # standard errors
_APART = 100  # times
_LEAST_FALL = 0.01  # of the plateau


def growing(start: float, end: float, steps: int) -> list[float]:
    """Returns the learning rates of a test: each is the one before it times the same factor.

    Raises:
        UsageError: they would not grow.
    """
    if not 0 < start < end < math.inf:
        raise UsageError(
            f"--from {start:g} --to {end:g}: the lr grows from --from, above 0, to "
            "--to: --from should be less than --to."
        )
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

    @property
    def smoothing(self) -> float:
        """What the running mean keeps: more where there are more steps, so that it spans as much of the rates."""
        return max(SMOOTHING, 1 - (1 - SMOOTHING) * 100 / len(self.rates))

    def add(self, loss: float) -> bool:
        """Takes the loss of one more step in; returns whether the test goes on."""
        self.losses.append(loss)
        self._mean = self.smoothing * self._mean + (1 - self.smoothing) * loss
        self.smoothed.append(self._mean / (1 - self.smoothing ** len(self.losses)))
        best = min(self.smoothed[self.settled :], default=math.inf)
        if not math.isfinite(loss):
            self.ended = "the loss is no longer finite"
        elif math.isfinite(best) and self.smoothed[-1] > best + (DIVERGED - 1) * abs(best):
            self.ended = f"the smoothed loss is more than {DIVERGED:g} times its best, {number(best)}"
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
        """Returns what the curve suggests; None where the loss does not clearly come down.

        It does where the smoothed loss is somewhere below its plateau, the mean of the first half of the losses up to
        its lowest point: by more than 1 %, and by more than 3.5 standard errors of the difference, with what these
        losses scatter from one step to the next. The steepest descent is sought only where it is so, up to the lowest
        point: elsewhere it would be that of noise.
        """
        rates, _, smoothed = self.points()
        least = self._least_fall()
        clear = [step for step, fall, noise in self._falls() if fall > max(least, noise)]
        if not clear:
            return None
        lowest = min(clear, key=smoothed.__getitem__)
        half = max(1, len(self.rates) // 20)
        steepest = min((step for step in clear if step <= lowest), key=lambda step: _slope(smoothed, step, half))
        return Suggestion(rates[steepest], rates[lowest] / 10, rates[lowest], smoothed[lowest])

    @property
    def unclear(self) -> bool:
        """Whether more steps may show what these do not: nothing that agrees is suggested, and the scatter is why.

        A loader that has ended before the test, and does not go around, has no more steps.
        """
        found, least = self.suggestion(), self._least_fall()
        over = bool(self.ended) or len(self.losses) == len(self.rates)
        return over and not (found and found.agree) and any(noise > least for _, _, noise in self._falls())

    def _plateau(self) -> list[float]:
        _, losses, smoothed = self.points()
        lowest = min(range(self.settled, len(smoothed)), key=smoothed.__getitem__, default=0)
        return losses[: max(lowest // 2, self.settled + 1)]

    def _least_fall(self) -> float:
        plateau = self._plateau()
        return _LEAST_FALL * abs(statistics.fmean(plateau)) if plateau else 0.0

    def _falls(self) -> list[tuple[int, float, float]]:
        """Steps, how far the smoothed loss is below the plateau there, and how far it may be by chance alone.

        There are none where the test ended at once.
        """
        plateau, smoothed = self._plateau(), self.points()[2]
        if len(smoothed) < self.settled + 3:
            return []
        level, scatter = statistics.fmean(plateau), _ERRORS * _scatter(plateau)
        return [
            (step, level - smoothed[step], scatter * math.sqrt(_variance(self.smoothing, step + 1) + 1 / len(plateau)))
            for step in range(self.settled, len(smoothed))
        ]


@dataclass(frozen=True)
class Suggestion:
    """Learning rates by two rules.

    Attributes:
        steepest: where the smoothed loss falls most steeply over the logarithm of the rate, by a tenth of the test.
        tenth: a tenth of the rate at which it is lowest.
        lowest: the rate at which it is lowest.
        loss: the smoothed loss there.
    """

    steepest: float
    tenth: float
    lowest: float
    loss: float

    @property
    def careful(self) -> float:
        """The lower one of the two."""
        return min(self.steepest, self.tenth)

    @property
    def agree(self) -> bool:
        """Whether the two are near enough to each other for either to be believed."""
        return max(self.steepest, self.tenth) <= _APART * self.careful


def _slope(values: list[float], step: int, half: int) -> float:
    """The difference over so many steps to each side, fewer at the ends; they are equally far apart in the rate's log.

    Over one step alone it would be the noise of that step's batch.
    """
    low, high = max(0, step - half), min(len(values) - 1, step + half)
    return (values[high] - values[low]) / (high - low)


def _scatter(values: list[float]) -> float:
    """The standard deviation of values around their trend: from the differences of neighbours, which have none."""
    return math.sqrt(statistics.fmean((after - before) ** 2 for before, after in itertools.pairwise(values)) / 2)


def _variance(smoothing: float, count: int) -> float:
    """The variance of the running mean of so many independent values, over that of one of them."""
    kept = smoothing**count
    return (1 - smoothing) / (1 + smoothing) * (1 + kept) / (1 - kept)
