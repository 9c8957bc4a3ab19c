"""Which node is slow: nodes are timed in pairs.

An all-reduce of all nodes runs at the pace of the slowest link, and so does not tell which one that is. Here each
node is timed with one partner at a time, several pairs at once, with as many partners as there are rounds. A node's
speed is that of its best pair: a slow node is slow with every partner, while a node that is well has at least one
pair without the slow one. With two nodes there is one pair alone, which cannot tell them apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

_ROUNDS = 4
SLOW = 0.6


def rounds_of_pairs(nodes: int, rounds: int = _ROUNDS) -> list[list[tuple[int, int]]]:
    """Returns who is timed with whom, by the circle method: no node twice in a round, no pair twice.

    Args:
        nodes: their number; of an odd one, a node rests in each round.
        rounds: at most.
    """
    seats = list(range(nodes)) + ([-1] if nodes % 2 else [])
    found = []
    for _ in range(min(rounds, len(seats) - 1)):
        pairs = [(min(pair), max(pair)) for pair in zip(seats[: len(seats) // 2], reversed(seats), strict=False)]
        found.append([pair for pair in pairs if pair[0] >= 0])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def best_pairs(pairs: Sequence[tuple[int, int, float]]) -> dict[int, float]:
    """Returns each node's speed: that of its best pair."""
    found: dict[int, float] = {}
    for first, second, speed in pairs:
        for node in (first, second):
            found[node] = max(speed, found.get(node, 0.0))
    return found


def slowest(speeds: Mapping[int, float]) -> tuple[int, float] | None:
    """Returns the slowest node and its share of the median of the others, where the speeds tell nodes apart."""
    if len(set(speeds.values())) < 2:
        return None
    node = min(speeds, key=lambda one: speeds[one])
    return node, speeds[node] / statistics.median([speed for other, speed in speeds.items() if other != node])
