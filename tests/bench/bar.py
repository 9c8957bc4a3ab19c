"""What the live bar costs at a thousand steps a second, on a real terminal: epochs with it over epochs without.

python tests/bench/bar.py [--pairs 5]
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

STEPS = 2000

RANK = f"""
import json, sys, time
import torch
from torch import nn
from dtrain.engine.loop import Engine
from dtrain.engine.train_step import Task
from dtrain.callbacks.progress import LiveBar
from dtrain.engine.callback import Callbacks
from dtrain.distributed.world import bring_up

torch.set_num_threads(1)
x = torch.ones(4, 8)

def busy():
    until = time.perf_counter() + 0.0008  # with the rest of a step about a millisecond
    while time.perf_counter() < until:
        pass

def train_step(model, features):
    busy()
    return model(features).mean()

def engine(shown):
    net = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return Engine(Task(net, train_step, [x] * {STEPS}, optimizer=optimizer), bring_up(cpu=True), epochs=1, callbacks=Callbacks(shown))

bar = LiveBar()
engines = [engine(bar), engine(None)]
pairs = []
for number in range(int(sys.argv[1]) + 1):
    times = []
    for one in engines if number % 2 else engines[::-1]:
        started = time.perf_counter()
        one.train_pass(number + 1)
        times.append(time.perf_counter() - started)
    pairs.append(times if number % 2 else times[::-1])
bar.close()
json.dump(pairs[1:], open(sys.argv[2], "w"))
"""


def main() -> None:
    """Prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    pairs = parser.parse_args().pairs
    ours, theirs = pty.openpty()
    drawn = [0]

    def drain() -> None:
        try:
            while part := os.read(ours, 65536):
                drawn[0] += len(part)
        except OSError:  # the terminal's other end is closed
            return

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pairs.json"
        process = subprocess.Popen(
            [sys.executable, "-c", RANK, str(pairs), str(out)],
            stdout=theirs,
            env={**os.environ, "TERM": "xterm-256color"},
        )
        os.close(theirs)
        reader = threading.Thread(target=drain)
        reader.start()
        code = process.wait()
        reader.join()
        os.close(ours)
        if code != 0:
            raise SystemExit(code)
        found = json.loads(out.read_text())
    ratios = sorted(bar / silent for bar, silent in found)
    rate = STEPS / statistics.median(bar for bar, _ in found)
    print(
        f"bar on over bar off: {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}), "
        f"{pairs} pairs, {rate:,.0f} steps/s, {drawn[0]:,} bytes drawn"
    )


if __name__ == "__main__":
    main()
