"""What one callback costs: the time of a step with one `after_step` callback over that without any.

python tests/bench/callbacks.py [--pairs 9] [--epochs 20] [--json FILE]

A small net on scikit-learn's digits, one CPU rank, one thread. The same run is measured with and without, epoch by
epoch in turns in one process; the callback itself does next to nothing, so that what is measured is its call. The
first pair warms up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=20, help="epochs of each side in a pair")
    parser.add_argument("--json", metavar="FILE", type=Path, help="where the numbers go")
    asked = parser.parse_args()
    found = compare(asked.pairs, asked.epochs)
    ratios = found["ratios"]
    print(
        f"one after_step callback: {statistics.median(ratios):.3f} of the step without ({min(ratios):.3f} to "
        f"{max(ratios):.3f}, {asked.pairs} pairs); {found['without_us']:.1f} us a step without any callback, "
        f"{found['with_us']:.1f} us with one, which was called {found['calls']} times"
    )
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=2) + "\n")


def compare(pairs: int, epochs: int) -> dict[str, Any]:
    """Trains by turns with no callback and with one.

    Args:
        pairs: that are measured.
        epochs: of each side in a pair.

    Returns:
        the ratio of each pair; the medians of a step's microseconds; how often the callback was called.
    """
    import torch

    import dtrain

    torch.set_num_threads(1)

    class Counts(dtrain.Callback):
        calls = 0

        def after_step(self, step: int, run: Any) -> None:
            self.calls += 1

    counts = Counts()
    without, with_ = _engine([]), _engine([counts])
    ratios, seconds = [], []
    for pair in range(pairs + 1):
        times = {}
        for engine in (with_, without) if pair % 2 else (without, with_):
            started = time.perf_counter()
            for epoch in range(epochs):
                engine.train_pass(pair * epochs + epoch + 1)
            times[engine is with_] = (time.perf_counter() - started) / (epochs * len(engine.task.dl_train))
        if pair:
            ratios.append(times[True] / times[False])
            seconds.append((times[False], times[True]))
    per_step = [statistics.median(side) * 1e6 for side in zip(*seconds, strict=True)]
    return {"ratios": sorted(ratios), "without_us": per_step[0], "with_us": per_step[1], "calls": counts.calls}


def _engine(callbacks: list[Any]) -> Any:
    """An engine over the digits, as `train_model` makes one; its train pass is called as an epoch calls it."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.utils.data import DataLoader, TensorDataset

    from bench.problems import digits
    from dtrain.distributed.world import bring_up
    from dtrain.engine.call_hooks import call_hooks
    from dtrain.engine.callback import each
    from dtrain.engine.hooks import hooks_of
    from dtrain.engine.loop import Engine
    from dtrain.engine.train_step import Task

    problem = digits("mlp")
    torch.manual_seed(0)
    net = problem.net()
    loader = DataLoader(TensorDataset(*problem.train_set.tensors), problem.batch_size, shuffle=True)
    task = Task(net, lambda model, x, y: cross_entropy(model(x), y), loader, optimizer=problem.optimizer(net))
    task.hooks = hooks_of({}, callbacks, "callbacks")
    engine = Engine(task, bring_up(cpu=True), epochs=1)
    call_hooks(engine)
    each(engine.callbacks.on_train_start, engine)
    return engine


if __name__ == "__main__":
    main()
