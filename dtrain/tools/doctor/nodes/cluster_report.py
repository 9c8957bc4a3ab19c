"""What was seen of all nodes; JSON can hold it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What shall be looked at.

    Attributes:
        nodes: their names, as SLURM has them.
        folder: a folder that all of them should see.
        ranks: on each node; None for one a GPU, else one.
        cpu: whether they compute on the CPU.
        wandb: whether the way to W&B is of interest.
    """

    nodes: tuple[str, ...]
    folder: Path
    ranks: int | None = None
    cpu: bool = False
    wandb: bool = False


@dataclass
class ClusterReport:
    """What came of it.

    Attributes:
        nodes: all that were asked for.
        facts: node -> what it said of itself when it came: see `task.introduce`.
        absent: node -> why it did not come, as far as is known.
        lost: node -> what it was last asked for, where it came and did not answer.
        skew: node -> seconds that its clock is ahead of the first node's, and how exact that is.
        files: node -> its own token, or why it could not write one; and how fast it writes.
        read: node -> whose token it read -> after how many seconds; None where it did not.
        locks: node -> "held" off by another's lock, as it should be; "taken" all the same; or "none" there.
        reach: node -> peer -> how it reached it, or why not.
        machine: node -> the findings of its own checks.
        left_out: node -> why it took no part in the all-reduce.
        joined: the nodes that did, in the order of their ranks.
        ranks: on each of these.
        measured: what the ranks measured; None where they did not come to an end.
        trouble: why not.
    """

    nodes: list[str]
    facts: dict[str, Answer] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    skew: dict[str, tuple[float, float]] = field(default_factory=dict)
    files: dict[str, Answer] = field(default_factory=dict)
    read: dict[str, dict[str, float | None]] = field(default_factory=dict)
    locks: dict[str, str] = field(default_factory=dict)
    reach: dict[str, dict[str, Answer]] = field(default_factory=dict)
    machine: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    joined: list[str] = field(default_factory=list)
    ranks: int = 0
    measured: Answer | None = None
    trouble: str = ""

    @property
    def present(self) -> list[str]:
        """The nodes that came, in SLURM's order."""
        return [node for node in self.nodes if node in self.facts]
