"""What this process is, for any script: its rank, the number of ranks, and a print for rank 0 alone. Loads no torch."""

from __future__ import annotations

from typing import Any

from dtrain.launch.env.inherited import mark_rank
from dtrain.launch.env.rank_env import RankFacts, read_rank_facts


def rank() -> int:
    """Returns this process's rank, 0 to world_size() - 1, as its launcher stated it; 0 without a launcher."""
    return _facts().rank


def world_size() -> int:
    """Returns the number of ranks over all machines; 1 without a launcher."""
    return _facts().size


def _facts() -> RankFacts:
    """Reads them. A script that asks for its place has taken it: dtrain's commands that it starts are no ranks."""
    facts = read_rank_facts()
    if facts.size > 1:
        mark_rank()
    return facts


def is_main() -> bool:
    """Returns whether this is global rank 0, the one that prints and writes."""
    return rank() == 0


def print_main(*values: Any, **options: Any) -> None:
    """Prints on global rank 0 alone; takes what `print` takes.

    The values are worked out on every rank before the call, so that `print_main(meter.means())` is right and
    `if is_main(): print(meter.means())` is not: the latter would wait for the other ranks for ever.
    """
    if is_main():
        print(*values, **options)  # noqa: T201
