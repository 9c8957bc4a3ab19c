"""How a stream scales: an epoch of samples that take 2 ms each to come, on 1, 2 and 4 ranks that read parts of it.

python tests/bench/streams.py [--samples 1000] [--whole]

The 2 ms are waited for, so that processor cores are no limit. The second of two epochs is measured, the slowest rank's.
With --whole every rank reads all of the stream.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from helpers.ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import dtrain
from dtrain.distributed.world import World

SECONDS = 0.002
BATCH = 16


class Slow(IterableDataset):
    """So many samples, each of which is waited for."""

    def __init__(self, samples: int) -> None:
        self.samples, self.rank, self.size, self.reads = samples, 0, 1, 0

    def set_rank(self, rank: int, world_size: int) -> None:
        """Is called before each pass."""
        self.rank, self.size = rank, world_size

    def __iter__(self) -> Any:
        for index in range(self.rank, self.samples, self.size):
            time.sleep(SECONDS)
            self.reads += 1
            yield torch.full((8,), float(index) / self.samples), torch.ones(1)


def epochs(world: World, samples: int, whole: bool) -> dict[str, Any]:
    """One rank: the second epoch's seconds, and what was read."""
    dataset, net = Slow(samples), nn.Linear(8, 1)
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    history = dtrain.train_model(
        net,
        2,
        DataLoader(dataset, BATCH),
        train_step=lambda model, x, y: (model(x) - y).square().mean(),
        data_sharding="dtrain" if whole else "auto",
        verbose=False,
        world=world,
    )
    return {"seconds": history["seconds"].iloc[-1], "reads": dataset.reads // 2}


def main() -> None:
    """Prints a line for each number of ranks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--whole", action="store_true")
    given = parser.parse_args()
    one = 0.0
    for size in (1, 2, 4):
        found = run_ranks(epochs, size, samples=given.samples, whole=given.whole)
        seconds = max(rank["seconds"] for rank in found)
        one = one or seconds
        reads = [rank["reads"] for rank in found]
        told = f"{size} ranks: {seconds:.2f} s, {seconds / one:.2f} of one rank's; reads {reads}, {sum(reads)} in all"
        print(told)


if __name__ == "__main__":
    main()
