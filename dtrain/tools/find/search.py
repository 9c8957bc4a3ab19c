"""The search for the largest batch that fits, and the estimate of what takes the memory. Knows nothing of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_FINE = 16  # the search ends where the bounds are this part of the batch apart
_ROUND = 8  # sizes are multiples of it, where there is room
_FITTED = 4  # the largest batches, by which a sample's memory is estimated: of small ones much else shows


@dataclass(frozen=True)
class BatchTrial:
    """What a try of a batch size on all ranks came to.

    Attributes:
        batch: samples of each rank.
        fits: whether its steps were done within the memory.
        why: why not; empty where it fits.
        peak: bytes that the rank with most took at once; None where that is not known.
        samples_per_second: of all ranks, in the steps alone; None where it does not fit.
        parameters: bytes of the net's parameters and buffers.
        gradients: bytes of their gradients.
        optimizer: bytes of the optimizers' states after a step.
    """

    batch: int
    fits: bool
    why: str = ""
    peak: int | None = None
    samples_per_second: float | None = None
    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0


def largest(fits: Callable[[int], bool], start: int, most: int) -> int:
    """Returns the largest batch that fits: doubled until one does not, then bisected to within a sixteenth.

    Args:
        fits: tries a batch.
        start: the first one to try, at least 1.
        most: the largest one there may be.

    Returns:
        a batch that was tried and fits; 0 where one sample does not.
    """
    low, high = 0, most + 1
    batch = min(start, most)
    while low < batch < high:
        if fits(batch):
            low, batch = batch, min(2 * batch, most)
        else:
            high = batch
    while high - low > max(1, low // _FINE):
        batch = (low + high) // 2
        if high - low >= 4 * _ROUND:
            batch -= batch % _ROUND
        if fits(batch):
            low = batch
        else:
            high = batch
    return low


@dataclass(frozen=True)
class Estimate:
    """What takes a rank's memory, in bytes.

    Attributes:
        parameters: with buffers.
        gradients: of the parameters.
        optimizer: its states.
        per_sample: activations and data of each sample of a batch; None where no slope is to be seen.
        rest: whatever else, by the same straight line: the program, the data set; None without a slope.
    """

    parameters: int
    gradients: int
    optimizer: int
    per_sample: float | None = None
    rest: float | None = None


def estimate(tries: Sequence[BatchTrial]) -> Estimate | None:
    """Fits a line to the peaks of the largest batches; None where none fits."""
    fitting = sorted((one for one in tries if one.fits and one.peak is not None), key=lambda one: one.batch)
    if not fitting:
        return None
    last = fitting[-1]
    fixed = last.parameters, last.gradients, last.optimizer
    line = _line([(one.batch, one.peak or 0) for one in fitting[-_FITTED:]])
    if line is None or line[0] <= 0:
        return Estimate(*fixed)
    return Estimate(*fixed, line[0], max(0.0, line[1] - sum(fixed)))


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Returns slope and intercept of the line with the least squares."""
    if len(points) < 2:
        return None
    middle = [sum(point[axis] for point in points) / len(points) for axis in (0, 1)]
    across = sum((x - middle[0]) ** 2 for x, _ in points)
    slope = sum((x - middle[0]) * (y - middle[1]) for x, y in points) / across
    return slope, middle[1] - slope * middle[0]
