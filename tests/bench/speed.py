"""What an epoch costs with a trainer, as a multiple of a tuned hand-written loop.

    python tests/bench/speed.py [--ranks 1|2] [--model mlp|cnn|tutorial] [--pairs 5] [--only NAME,...] [--json FILE]

An epoch trains on scikit-learn's digits, validates, and yields the epoch's means of loss and accuracy. Trainer and
hand-written loop take turns epoch by epoch in the same process (with --ranks 2: in the same two ranks, against plain
DDP). `pip install '.[bench]'` brings the trainers.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from statistics import median

_TIMEOUT = 580.0


def main() -> None:
    """Runs and prints."""
    from bench.loading import chosen
    from bench.starting import end_children_on_sigterm
    from bench.table import print_table

    asked = _arguments()
    end_children_on_sigterm()
    rows = [row for name in chosen(asked.only) for row in measure(name, asked)]
    against = "the tutorial's loop" if asked.model == "tutorial" else "a tuned hand-written loop"
    print(
        f"Epoch time over that of {against}: median of {asked.pairs} pairs (least to most), each of {asked.epochs} "
        f"epochs by turns. {asked.model}, {asked.ranks} CPU rank(s), one thread each.\n"
    )
    head = ("trainer", "version", "used as", "ratio", "(spread)", "ms/epoch", "by hand", "us/step more", "")
    print_table(head, [_cells(row) for row in rows])
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    arguments.add_argument("--model", choices=("mlp", "cnn", "tutorial"), default="mlp")
    arguments.add_argument("--pairs", type=int, default=5)
    arguments.add_argument("--epochs", type=int, help="epochs of each side in a pair; by default 20, for the CNN 2")
    arguments.add_argument("--only", metavar="NAME,...", help="rivals, by the names of their files")
    arguments.add_argument("--json", metavar="FILE", type=Path, help="where the rows go, with every epoch's seconds")
    asked = arguments.parse_args()
    asked.epochs = asked.epochs or (2 if asked.model == "cnn" else 20)
    if asked.model == "tutorial":
        asked.only, asked.ranks = "dtrain", 1
    return asked


def measure(name: str, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one trainer, one for each way of use."""
    from bench import starting
    from bench.loading import PYTHON, TORCHRUN, load, version

    rival = load(name)
    found = version(rival.PACKAGE)
    options = json.dumps({"model": asked.model, "epochs": asked.pairs * asked.epochs})
    rows = []
    for variant in rival.SPEED:
        if (variant == "the tutorial's steps") != (asked.model == "tutorial"):
            continue
        row = {"trainer": name, "version": found, "variant": variant}
        print(f"{name}: {variant} ...", end="", file=sys.stderr, flush=True)
        if found is None:
            row["error"] = getattr(rival, "MISSING", f"not installed: pip install {rival.PACKAGE}")
        else:
            launch = PYTHON if asked.ranks == 1 else TORCHRUN
            with tempfile.TemporaryDirectory() as folder:
                words = ["speed", name, variant, options]
                told = starting.run(launch, words, rival.ENV, Path(folder), _TIMEOUT)
            row |= next((one for one in told if one.get("error")), told[0])
        rows.append(row if row.get("error") else row | _ratios(row, asked.epochs))
        print(*_cells(rows[-1])[3:5], file=sys.stderr)
    return rows


def _ratios(row: dict[str, Any], size: int) -> dict[str, Any]:
    """The ratio of each pair; a pair is `size` epochs of each side, and counts by its median epochs."""
    pairs = [
        (median(row["theirs"][start : start + size]), median(row["hands"][start : start + size]))
        for start in range(0, len(row["theirs"]), size)
    ]
    return {
        "ratios": sorted(their / hand for their, hand in pairs),
        "epoch_ms": median(their for their, _ in pairs) * 1e3,
        "hand_ms": median(hand for _, hand in pairs) * 1e3,
        "us_per_step": median(their - hand for their, hand in pairs) / row["steps"] * 1e6,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    who = [row["trainer"], row["version"] or "", row["variant"]]
    if row.get("error"):
        return [*who, "", "", "", "", "", row["error"]]
    ratios = row["ratios"]
    spread = f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
    times = [f"{row['epoch_ms']:.1f}", f"{row['hand_ms']:.1f}", f"{row['us_per_step']:.0f}"]
    return [*who, f"{median(ratios):.2f}", spread, *times, ""]


if __name__ == "__main__":
    main()
