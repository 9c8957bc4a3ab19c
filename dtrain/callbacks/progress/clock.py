"""How fast a run is and how long it still takes, from what was seen of it so far."""

from __future__ import annotations

from collections import deque

from dtrain.engine.facts import PassFacts

_WINDOW_SECONDS = 30.0  # a rate is that of the last so many: a first step that compiles is soon forgotten
_WINDOW_LOOKS = 128
_WHOLE_EPOCHS = 5  # the next epoch takes as long as the mean of so many last ones


class Clock:
    """Keeps the time of the passes. All times are given, in seconds by one clock, so that it has none of its own.

    Attributes:
        facts: of the pass that runs; None before the first.
        steps: of that pass that are done, the skipped ones included.
    """

    def __init__(self) -> None:
        self.facts: PassFacts | None = None
        self.steps = 0
        self._begun = 0.0
        self._looks: deque[tuple[float, int, int]] = deque(maxlen=_WINDOW_LOOKS)  # when, steps, samples
        self._counts: dict[str, int] = {}  # steps of a whole pass, by its title
        self._took: dict[str, float] = {}  # seconds of a whole pass, by its title
        self._epoch_begun: float | None = None  # None where it began in another process
        self._wholes: deque[float] = deque(maxlen=_WHOLE_EPOCHS)

    def begin(self, facts: PassFacts, now: float) -> None:
        """A pass begins; one that ran before is over."""
        self._end_pass(now)
        if facts.split == "train":
            self._epoch_begun = None if facts.skipped else now
        self.facts, self.steps, self._begun = facts, facts.skipped, now - facts.aside()
        self._looks.clear()
        self._looks.append((self._begun, facts.skipped, facts.samples()))

    def look(self, steps: int, now: float) -> None:
        """So many steps of the pass are done."""
        if self.facts is None:
            return
        self.steps = steps
        looks = self._looks
        now = self._of_pass(now)
        looks.append((now, steps, self.facts.samples()))
        while len(looks) > 2 and now - looks[1][0] >= _WINDOW_SECONDS:
            looks.popleft()

    def end_epoch(self, now: float) -> None:
        """An epoch is over, with all that belongs to it."""
        self._end_pass(now)
        if self._epoch_begun is not None:
            self._wholes.append(now - self._epoch_begun)
        self._epoch_begun = None

    @property
    def total(self) -> int | None:
        """Steps of the pass; where the loader cannot tell, as many as in the last epoch; None where that is unknown."""
        if self.facts is None:
            return None
        if self.facts.steps is not None:
            return self.facts.steps
        known = self._counts.get(self.facts.title)
        return known if known is not None and known >= self.steps else None

    @property
    def samples_per_second(self) -> float | None:
        """Of all ranks, if they are all as fast as this one; None before the first look."""
        if self.facts is None or len(self._looks) < 2:
            return None
        (since, _, before), (until, _, after) = self._looks[0], self._looks[-1]
        return (after - before) * self.facts.run.ranks / max(until - since, 1e-9) if after > before else None

    def pass_left(self, now: float) -> float | None:
        """Seconds until the pass that runs is over; None where there is nothing to tell it by."""
        total, facts = self.total, self.facts
        if total is None or facts is None:
            return None
        now = self._of_pass(now)
        (since, before, _), (until, after, _) = self._looks[0], self._looks[-1]
        if after <= before:  # it has just begun: as long as last time
            known = None if facts.skipped else self._took.get(facts.title)
            return None if known is None else max(0.0, known - (now - self._begun))
        left = (total - after) * (until - since) / (after - before)
        return max(0.0, left - (now - until))

    def epoch_left(self, now: float) -> float | None:
        """Seconds until the epoch is over, its validation included once one was seen."""
        left = self.pass_left(now)
        if left is None or self.facts is None or self.facts.split != "train":
            return left
        return left + sum(took for title, took in self._took.items() if title.startswith("valid"))

    def run_left(self, now: float) -> float | None:
        """Seconds until the last epoch is over, if none stops the run before."""
        left = self.epoch_left(now)
        if left is None or self.facts is None:
            return None
        epochs = 0 if self.facts.within else self.facts.epochs - self.facts.epoch
        return left + max(0, epochs) * self._an_epoch(now) if epochs > 0 else left

    def _an_epoch(self, now: float) -> float:
        """Seconds that a whole epoch takes."""
        if self._wholes:
            return sum(self._wholes) / len(self._wholes)
        took = dict(self._took)
        whole = self._whole_pass(now)
        if self.facts is not None and whole is not None:
            took[self.facts.title] = whole
        return sum(took.values())

    def _whole_pass(self, now: float) -> float | None:
        """Seconds that the pass that runs would take from its first step to its last."""
        left, total = self.pass_left(now), self.total
        if left is None or total is None or self.facts is None:
            return None
        here = self._of_pass(now) - self._begun + left
        mine = total - self.facts.skipped
        return here * total / mine if mine > 0 else here

    def _end_pass(self, now: float) -> None:
        facts, self.facts = self.facts, None
        if facts is None or self.steps <= facts.skipped:
            return
        mine = (facts.steps or self.steps) - facts.skipped
        self._counts[facts.title] = facts.steps or self.steps
        took = now - facts.aside() - self._begun
        self._took[facts.title] = took * self._counts[facts.title] / max(1, mine)

    def _of_pass(self, now: float) -> float:
        """The time by a clock that stands still for what is no part of the pass."""
        return now if self.facts is None else now - self.facts.aside()


def short_time(seconds: float) -> str:
    """Returns "0:07", "12:05", "3:04:05" or "2d 03:04"."""
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def short_number(number: float) -> str:
    """Returns "0.53", "7.4", "812", "12.3k" or "4.05M": three digits or so."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= factor:
            scaled = number / (1e3 if letter == "k" else factor)
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{letter}"
    return f"{number:.0f}" if number >= 100 else f"{number:.2g}" if number < 10 else f"{number:.0f}"
