"""A trainer against a hand-written loop, epoch by epoch in turn, in the same process or in the same ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from bench.hand import TunedLoop, TutorialLoop
from bench.problems import Problem, digits

WARM_UP = 5  # epochs of each side that are not counted


class Duel:
    """Takes the times; the trainer calls `between` once in each of its epochs.

    Args:
        problem: what both train.
        epochs: how many of each side count.
    """

    def __init__(self, problem: Problem, epochs: int) -> None:
        self.problem = problem
        self.epochs = epochs + WARM_UP + 1
        self.theirs: list[float] = []
        self.hands: list[float] = []
        self.means: list[dict[str, float]] = []
        self._hand: Any = None
        self._since: float | None = None

    def between(self, **means: float) -> None:
        """The trainer's epoch ends here; the hand-written loop has its turn, then the next one begins."""
        now = self._now()
        if self._since is not None:
            self.theirs.append(now - self._since)
        self.means.append(means)
        with torch.inference_mode(mode=False), torch.enable_grad():
            if self._hand is None:
                self._hand = TutorialLoop(self.problem) if self.problem.model == "tutorial" else TunedLoop(self.problem)
            before = self._now()
            hands = self._hand.epoch()
            self._since = self._now()
        self.hands.append(self._since - before)
        self.hands_means = hands

    def _now(self) -> float:
        """With the ranks together, so that neither side waits for what the other left behind."""
        if self.problem.size > 1:
            dist.barrier()
        return time.perf_counter()


def fight(train: Callable[..., None], options: dict[str, Any]) -> dict[str, Any]:
    """Runs one trainer's `SPEED` function against the hand-written loop.

    Returns:
        seconds of each epoch that counts, of both sides, and the means that both had at the end.
    """
    problem = digits(options["model"])
    duel = Duel(problem, options["epochs"])
    train(problem, duel.epochs, duel.between)
    if torch.get_num_threads() != 1:
        raise RuntimeError(f"it set torch's threads to {torch.get_num_threads()}")
    theirs = duel.theirs[WARM_UP:][: options["epochs"]]
    if len(theirs) < options["epochs"] or (problem.size > 1 and dist.get_world_size() != problem.size):
        raise RuntimeError(f"{len(theirs)} epochs of {options['epochs']} on {problem.size} ranks were measured")
    _check(duel.means[-1], duel.hands_means, problem.model)
    steps = sum(len(loader) for loader in (duel._hand.dl_train, duel._hand.dl_valid))
    hands = duel.hands[1 + WARM_UP :][: options["epochs"]]
    return {"theirs": theirs, "hands": hands, "steps": steps, "means": duel.means[-1], "hands_means": duel.hands_means}


def _check(means: dict[str, float], hands: dict[str, float], model: str) -> None:
    """Both sides must have learnt about the same, or one of them did something else."""
    for name, mean in hands.items():
        if not abs(float(means[name]) - mean) < 0.15:
            raise RuntimeError(f"{model}: {name} is {means[name]}, by hand {mean}")
