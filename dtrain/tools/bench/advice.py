"""What was measured, and what follows from it. Knows nothing of torch, so that the supervisor starts at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

MUCH = 0.15  # of a step
_LITTLE = 0.02  # of a step: launches below it are no matter
# Turns on each side -> the least gain that counts, and how many of the pairs of a turn with the change and one without
# may be the wrong way round. Chance alone comes so far in 1 of 6, 20, 70 and 126 trials (Mann and Whitney, 1947).
_LEAST = {2: (1.25, 0), 3: (1.10, 0), 4: (1.10, 0), 5: (1.05, 1)}
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

Verdict = Literal["faster", "slower", "noise", "skipped"]


@dataclass(frozen=True)
class TrialResult:
    """What a trial came to: turns of the run as it is, and of the run with one thing changed, one after the other.

    Attributes:
        name: what was tried: "num_workers=0".
        change: what the user would write.
        note: what it means for the results; empty where they are the same.
        base: seconds a sample of each turn of the run as it is.
        tried: the same with the change.
        why: why it could not be tried; empty where it was.
    """

    name: str
    change: str
    note: str = ""
    base: Sequence[float] = ()
    tried: Sequence[float] = ()
    why: str = ""

    @property
    def gain(self) -> float:
        """How many times as fast it is, of the medians; nan where it was not tried."""
        return median(self.base) / median(self.tried) if self.base and self.tried else math.nan

    @property
    def verdict(self) -> Verdict:
        """Whether it is faster beyond what the turns scatter by."""
        turns = min(len(self.base), len(self.tried))
        if self.why or turns < min(_LEAST):  # one turn shows nothing
            return "skipped"
        least, most = _LEAST[min(turns, max(_LEAST))]
        wrong = sum(tried >= base for tried in self.tried for base in self.base)
        if self.gain >= least and wrong <= most:
            return "faster"
        surely = self.gain <= 1 / least and len(self.base) * len(self.tried) - wrong <= most
        return "slower" if surely else "noise"


@dataclass(frozen=True)
class BenchResult:
    """What one rank measured.

    Attributes:
        step_seconds: of a step, as in training, without the stopwatch.
        samples_per_second: of all ranks.
        parts: part of a step -> seconds, with the stopwatch.
        asked: how often a step asks a tensor for its number.
        device: the kind of device.
        workers: of the training loader; None where it is no DataLoader.
        by_batch: whether whole batches are fetched at once.
        steps: steps that were measured.
        reads: "FILE:LINE (item)" of the user's code -> how often a step reads a tensor on the device there.
        flops: floating-point operations of a step's forward and backward, of this rank; None where not known.
        peak: operations a second of a matrix product in `dtype` on this device; None where not known.
        dtype: "float32", say.
        enqueue_seconds: that the host takes to send a step to the GPU; None on the CPU, or where the step waits for it.
        device_seconds: that the GPU takes for what it was sent; None as above.
        images: whether batches have parts of four dimensions.
        trials: what was tried, as JSON keeps `TrialResult`.
        trial_seconds: that this took.
        untried: why nothing was tried; empty where something was, or was not to be.
    """

    step_seconds: float
    samples_per_second: float
    parts: dict[str, float]
    asked: float
    device: str
    workers: int | None
    by_batch: bool
    steps: int
    reads: dict[str, float] = field(default_factory=dict)
    flops: float | None = None
    peak: float | None = None
    dtype: str = "float32"
    enqueue_seconds: float | None = None
    device_seconds: float | None = None
    images: bool = False
    trials: list[dict[str, Any]] = field(default_factory=list)
    trial_seconds: float | None = None
    untried: str = ""

    @property
    def results(self) -> list[TrialResult]:
        """The trials."""
        return [TrialResult(**one) for one in self.trials]


def shares_of(measured: BenchResult) -> dict[str, float]:
    """Returns part of a step -> its share of the measured time."""
    total = sum(measured.parts.values())
    return {name: seconds / total if total else 0.0 for name, seconds in measured.parts.items()}


def compute_words(measured: BenchResult) -> list[str]:
    """Returns lines on how much of the device's power a step uses, and how much of a step are launches."""
    lines = []
    if measured.flops and measured.peak:
        rate = measured.flops / measured.step_seconds
        lines.append(
            f"compute: {_amount(measured.flops)}FLOP a step in forward and backward, {_amount(rate)}FLOP/s: "
            f"{_percent(rate / measured.peak)} of the {_amount(measured.peak)}FLOP/s of a matrix product in "
            f"{measured.dtype} on this device"
        )
    host, device = measured.enqueue_seconds, measured.device_seconds
    if host is not None and device is not None:
        part = max(0.0, 1 - device / host) if host else 0.0
        lines.append(
            f"launches: sending a step to the GPU takes {1e3 * host:.3f} ms, computing it {1e3 * device:.3f} ms: "
            + (f"{_percent(part)} of a step is launch overhead" if part > _LITTLE else "no launch overhead")
        )
    return lines


def trial_words(measured: BenchResult) -> list[str]:
    """Returns lines on what was tried: what is faster with what to change, the best first; then the rest by name."""
    results = measured.results
    by_verdict = {one: [r for r in results if r.verdict == one] for one in ("faster", "noise", "slower", "skipped")}
    lines = [measured.untried] if measured.untried else []
    faster = sorted(by_verdict["faster"], key=lambda one: one.gain, reverse=True)
    gains = [f"{one.gain:.2f} times {'the samples/s' if one.note else 'as fast'}" for one in faster]
    wide = [max(map(len, column), default=0) for column in ([one.name for one in faster], gains)]
    for one, gain in zip(faster, gains, strict=True):
        note = f" ({one.note})" if one.note else ""
        lines.append(f"  {one.name:<{wide[0]}}  {gain:<{wide[1]}}  {one.change}{note}")
    if results and not faster:
        lines.append("  nothing that was tried is faster")
    for verdict, words in (("noise", "within noise"), ("slower", "slower")):
        named = ", ".join(f"{one.name} ({one.gain:.2f})" for one in by_verdict[verdict])
        lines += [f"  {words}: {named}"] if named else []
    lines += [f"  skipped: {one.name}: {one.why or 'no time was left'}" for one in by_verdict["skipped"]]
    return lines


def advice(measured: BenchResult) -> list[str]:
    """Returns what a trial cannot show: where in the user's code time goes, the largest share first."""
    shares = shares_of(measured)
    found = {"metric function": _about_metric(measured), "data": _about_data(measured)}
    told = [
        text
        for share, text in sorted(((shares.get(name, 0.0), text) for name, text in found.items()), reverse=True)
        if share > MUCH and text
    ]
    if measured.device != "cpu" and measured.reads:
        where = ", ".join(f"{place} {times:g} times" for place, times in measured.reads.items())
        told.append(
            f"a step reads values of tensors on the GPU and waits for it each time: {where}. Return the tensors; "
            "dtrain accumulates them on the device."
        )
    return told


def _about_data(measured: BenchResult) -> str:
    results = measured.results
    if any(one.verdict == "faster" and "num_workers" in one.name for one in results):
        return ""  # that says it
    waiting = f"{_percent(shares_of(measured)['data'])} of a step is spent waiting for data"
    if measured.workers is None:
        return f"{waiting}, in the main process: prepare batches in advance, or use a DataLoader with num_workers."
    if measured.by_batch and measured.workers == 0:
        return ""
    tried = [one.name for one in results if "num_workers" in one.name and one.verdict != "skipped"]
    none = f", and {' and '.join(tried)} did not help" if tried else ""
    if measured.by_batch:
        return f"{waiting}{none}." if tried else ""
    return (
        f"{waiting}{none}: do less in __getitem__, or give the dataset __getitems__, which returns a whole batch's "
        "samples."
    )


def _about_metric(measured: BenchResult) -> str:
    seconds = measured.parts.get("metric function", 0.0)
    share = shares_of(measured).get("metric function", 0.0)
    return (
        f"model.metric_func takes {1e3 * seconds:.2f} ms a step, {_percent(share)}: compute it with torch, or return "
        "what it needs to a torchmetrics object of build_metrics(), which computes once an epoch."
    )


def _percent(share: float) -> str:
    if share < 0.001:
        return "less than 0.1 %"
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _amount(count: float) -> str:
    """A number with three digits and the letter of its size: "12.3 M"."""
    for factor, letter in _UNITS:
        if count >= factor:
            return f"{count / factor:.3g} {letter}"
    return f"{count:.3g} "
