"""What trainers report of nine samples with the values 0 to 8 (true mean 4) on two CPU ranks, batch size 2.

    python tests/bench/means.py [--only NAME,...] [--json FILE]

Each is started as its documentation tells its users to. `pip install '.[bench]'` brings them.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

_TIMEOUT = 180.0


def main() -> None:
    """Runs and prints."""
    from bench.loading import chosen
    from bench.starting import end_children_on_sigterm
    from bench.table import print_table

    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", metavar="NAME,...", help="rivals, by the names of their files")
    arguments.add_argument("--json", metavar="FILE", type=Path, help="where the rows go, besides")
    asked = arguments.parse_args()
    end_children_on_sigterm()
    rows = [row for name in chosen(asked.only) for row in measure(name)]
    print("Nine samples, 0 to 8: the true mean is 4, over 9 samples. Two CPU ranks, batch size 2 on each.\n")
    print_table(("trainer", "version", "used as", "loss", "metric", "samples", ""), [_cells(row) for row in rows])
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(name: str) -> list[dict[str, Any]]:
    """The rows of one rival, one for each way of use."""
    from bench import starting
    from bench.loading import load, version

    rival = load(name)
    found = version(rival.PACKAGE)
    rows = []
    for variant in rival.NUMBERS:
        row = {"trainer": name, "version": found, "variant": variant}
        print(f"{name}: {variant} ...", file=sys.stderr)
        if found is None:
            row["error"] = getattr(rival, "MISSING", f"not installed: pip install {rival.PACKAGE}")
        else:
            with tempfile.TemporaryDirectory() as folder:
                told = starting.run(rival.LAUNCH, ["numbers", name, variant], rival.ENV, Path(folder), _TIMEOUT)
            row |= _merged(told)
        rows.append(row)
    return rows


def _merged(told: list[dict[str, Any]]) -> dict[str, Any]:
    """What the user of rank 0 reads, the samples that all ranks saw, and what is odd about the ranks."""
    failed = [one for one in told if one.get("error")]
    if failed:
        # The one that failed first: the others fail since it has gone.
        return {"error": min(failed, key=lambda one: one.get("time", 0.0))["error"]}
    row = {**told[0], "seen": sum(one["seen"] for one in told), "ranks": len(told)}
    row["by_rank"] = [[one["loss"], one["metric"]] for one in told]
    return row


def _cells(row: dict[str, Any]) -> list[str]:
    numbers = [_number(row.get("loss")), _number(row.get("metric")), str(row.get("seen", ""))]
    return [row["trainer"], row["version"] or "", row["variant"], *numbers, _remark(row)]


def _remark(row: dict[str, Any]) -> str:
    if row.get("error"):
        return str(row["error"])
    if row["ranks"] != 2:
        return f"{row['ranks']} rank(s) came up"
    first, second = row["by_rank"]
    if first != second:
        return "rank 1 reads " + ", ".join(_number(value) for value in second)
    return ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    main()
