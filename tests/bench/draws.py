"""What the same random draws on all ranks cost: processor time of epochs with `same_draws` over that without.

python tests/bench/draws.py [--ranks 2] [--pairs 6] [--net cnn|mlp]

Trains on the digits with `batch=global`: the bundled recipe's net, which has one dropout, or a small one of two layers
that has one after each. With one rank the difference is that of seeding before each step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


def main() -> None:
    """Starts the ranks, the first of which prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--net", choices=("cnn", "mlp"), default="cnn")
    asked = parser.parse_args()
    if "RANK" in os.environ:
        compare(asked.pairs, asked.net)
        return
    from dtrain.launch.supervisor import free_port

    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={asked.ranks}"]
    words = [f"--master-port={free_port()}", __file__, *sys.argv[1:]]
    subprocess.run([*launcher, *words], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def compare(pairs: int, net: str) -> None:
    """Runs epochs by turns, with and without."""
    import torch

    from dtrain.distributed.world import bring_up
    from dtrain.engine.loop import Engine
    from dtrain.engine.options import RunOptions
    from dtrain.engine.train_step import Task

    torch.set_num_threads(1)
    world = bring_up(cpu=True)
    with_, without = (
        Engine(Task(*_task(net)), world, epochs=1, options=RunOptions(batch="global", same_draws=on))
        for on in (True, False)
    )
    ratios, seconds = [], []
    for number in range(pairs + 1):
        times = {}
        for engine in (with_, without) if number % 2 else (without, with_):
            world.gather_json(None)
            started = time.process_time()
            for epoch in range(1 if net == "cnn" else 10):
                engine.train_pass(number * 10 + epoch + 1)
            times[engine is with_] = time.process_time() - started
        if number:  # the first one warms up
            ratios.append(times[True] / times[False])
            seconds.append(times[False])
    if world.is_main:
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        each = f"{statistics.median(seconds) * 1000:.0f} ms without"
        print(f"{net}, {world.size} rank(s): {statistics.median(ratios):.3f} ({spread}), {each}")


def _task(name: str):
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from bench.problems import digits

    problem = digits(name)
    torch.manual_seed(0)
    net = problem.net()
    if name == "mlp":
        net = nn.Sequential(
            nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.Dropout(0.1), nn.Linear(32, 10)
        )
    optimizer = problem.optimizer(net)
    loader = DataLoader(TensorDataset(*problem.train_set.tensors), problem.batch_size, shuffle=True)

    def train_step(model, features, labels):
        return problem.loss_func(model(features), labels)

    return net, train_step, loader, None, None, optimizer


if __name__ == "__main__":
    main()
