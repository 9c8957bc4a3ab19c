"""How long training waits for a checkpoint: written beside it, in its way, and by `accelerator.save_state`.

python tests/bench/checkpoint.py [--megabytes 500] [--rounds 5]

One net and its Adam state, of that size together, saved by each in turn, in one process; medians. Training goes on
between two saves, so that the writing beside it has to share the machine with it.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain.checkpoint.saver import Checkpointer
from dtrain.config.schema import CheckpointConfig
from dtrain.distributed.world import bring_up
from dtrain.engine.loop import Engine
from dtrain.engine.train_step import Task

WIDTH = 1024


def engine_of(megabytes: int) -> Engine:
    """An engine whose net and Adam state are of this size, after one epoch of two steps."""
    layers = max(1, round(megabytes * 1e6 / (3 * 4 * WIDTH * (WIDTH + 1))))
    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    loader = DataLoader(TensorDataset(torch.randn(16, WIDTH)), batch_size=8)
    engine = Engine(
        Task(net, lambda model, x: model(x).square().mean(), loader, optimizer=optimizer), bring_up(cpu=True), epochs=1
    )
    engine.history.append({"epoch": 1, **engine.train_pass(1).means})
    return engine


def waits_for_keeper(engine: Engine, folder: Path, *, beside: bool, rounds: int) -> list[float]:
    """Seconds that training waited for each save."""
    keeper = Checkpointer(engine, folder, CheckpointConfig(asynchronous=beside, keep_last=1, keep_best=0), dict)
    for number in range(rounds + 1):
        engine.place.enter("checkpoint", number + 1)
        keeper.on_save_point(engine.place)
        started = time.perf_counter()
        while keeper.writing or time.perf_counter() - started < 0.2:  # training, in the meantime
            engine.task.module(torch.randn(8, WIDTH)).square().mean()
    keeper.on_train_end()
    return keeper.stalls[1:]  # the first one makes the room for the copy


def waits_for_accelerate(engine: Engine, folder: Path, rounds: int) -> list[float]:
    """Seconds of `accelerator.save_state`, whose files are not synced."""
    accelerator = engine.world.accelerator
    accelerator.prepare(engine.task.module, engine.task.optimizer)
    seconds = []
    for _ in range(rounds):
        shutil.rmtree(folder, ignore_errors=True)
        started = time.perf_counter()
        accelerator.save_state(str(folder))
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    logging.disable(logging.INFO)
    engine = engine_of(options.megabytes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {
            "beside the training": waits_for_keeper(engine, folder / "a", beside=True, rounds=options.rounds),
            "in its way": waits_for_keeper(engine, folder / "b", beside=False, rounds=options.rounds),
        }
        shutil.rmtree(folder / "a")
        shutil.rmtree(folder / "b")
        found["accelerator.save_state"] = waits_for_accelerate(engine, folder / "c", options.rounds)
    reference = statistics.median(found["accelerator.save_state"])
    print(f"{options.megabytes} MB, median of {options.rounds}")
    for what, seconds in found.items():
        median = statistics.median(seconds)
        print(f"{what:<24} {median:.3f} s ({min(seconds):.3f} to {max(seconds):.3f})  {median / reference:.2f}")


if __name__ == "__main__":
    main()
