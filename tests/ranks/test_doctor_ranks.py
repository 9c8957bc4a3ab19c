"""What ranks measure for `dtrain doctor`: right sums are right, wrong ones are found, nodes are timed in pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist
from helpers.ranks import run_ranks


def measured(world, wrong: int) -> Any:
    """One rank: three nodes of a rank each; one rank's sums go wrong where `wrong` says so."""
    from dtrain.tools.doctor import collectives

    collectives._SPAN, collectives._CPU_BYTES, collectives._PAIR_BYTES = 0.01, 1 << 16, 1 << 12
    right = dist.all_reduce

    def reduce(tensor, **more):
        right(tensor, **more)
        if world.rank == wrong:
            tensor[-1] += 1

    dist.all_reduce = reduce
    return collectives.measure(replace(world, local_rank=0, local_size=1))


def test_ranks_measure_and_agree_on_it() -> None:
    first, *others = run_ranks(measured, 3, wrong=1)
    assert all(other["ranks"] == first["ranks"] and other["pairs"] == first["pairs"] for other in others)
    (reduce,) = first["reduces"]
    assert (reduce["backend"], reduce["wrong"]) == ("gloo", [1])
    assert reduce["speed"] > 0
    assert reduce["latency"] > 0
    assert [(node, right) for node, _, _, _, right in first["ranks"]] == [(0, True), (1, True), (2, True)]
    assert all(speed > 0 for _, _, _, speed, _ in first["ranks"])
    assert sorted((one, two) for one, two, _ in first["pairs"]) == [(0, 1), (0, 2), (1, 2)]
