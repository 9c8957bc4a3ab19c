"""Injects each fault at random places and prints a table of what came of it.

    python tests/faults/sweep [--times 20] [--only FAULT ...] [--ranks 1 2 4] [--load idle busy]
                              [--under dtrain torchrun srun] [--out FILE.json]

Each fault is tried `--times` times on each number of ranks, under each load and launcher that suits it. srun is that of
a virtual cluster, which must be possible here (`helpers.cluster`). Results are added to --out, so that
the sweep can be run in parts; --show prints the table of what is there, and runs nothing. A case that failed is run
again, alone, by the words that are printed with it. Run it on a machine that does nothing else: "busy" keeps both
cores busy by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from faults.sweep.load import busy_cores
from faults.sweep.play import cluster_for_srun, play
from faults.sweep.table import DTRAIN, FAULTS, SRUN, TORCHRUN, Case

_BUSY_AT_ONCE = 2  # cases; the load is there anyway, and most of a case's time is start-up or waiting


def main() -> int:
    asked = _arguments()
    if not asked.show:
        with cluster_for_srun(asked.under):
            _run(asked)
    entries = _read(asked.out)
    print(_table(entries))
    bad = [entry for entry in entries if entry["problems"]]
    print(f"\n{len(entries)} cases, {len(bad)} not right.")
    return int(bool(bad))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=list(FAULTS), metavar="FAULT", choices=list(FAULTS))
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2, 4])
    parser.add_argument("--under", nargs="*", default=[DTRAIN], choices=[DTRAIN, TORCHRUN, SRUN])
    parser.add_argument("--load", nargs="*", default=["idle", "busy"], choices=["idle", "busy"])
    parser.add_argument("--seed", type=int, help="of the one case to run; else 0 to TIMES - 1")
    parser.add_argument("--out", type=Path, default=Path("sweep.json"))
    parser.add_argument("--show", action="store_true")
    return parser.parse_args()


def _run(asked: argparse.Namespace) -> None:
    seeds = range(asked.times) if asked.seed is None else [asked.seed]
    for load in asked.load:
        cases = [
            Case(fault, n, load, seed, under)
            for under in asked.under
            for fault in asked.only
            for n in asked.ranks
            for seed in seeds
        ]
        cases = [case for case in cases if case.possible]
        at_once = _BUSY_AT_ONCE if load == "busy" else 1
        with busy_cores() if load == "busy" else contextlib.nullcontext(), ThreadPoolExecutor(at_once) as pool:
            for number, verdict in enumerate(pool.map(play, cases), 1):
                _note(asked.out, verdict.entry())
                mark = "ok " if not verdict.problems else "BAD"
                print(f"{mark} {number}/{len(cases)} {verdict.seconds:5.1f} s  {verdict.case.again()}", flush=True)
                for problem in verdict.problems:
                    print(f"      {problem}", flush=True)


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _note(file: Path, entry: dict[str, Any]) -> None:
    """Adds a result; a line each, so that a sweep that is broken off keeps what it has."""
    with file.open("a") as out:
        out.write(json.dumps(entry) + "\n")


def _table(entries: list[dict[str, Any]]) -> str:
    lines = [
        "| fault | under | right: 1 rank | 2 | 4 | to the end, s: median (max), idle | busy | what was said, for example |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        for under in (DTRAIN, TORCHRUN, SRUN):
            some = [one for one in entries if one["fault"] == fault and one.get("under", DTRAIN) == under]
            if some:
                right = [_right([one for one in some if one["ranks"] == ranks]) for ranks in (1, 2, 4)]
                times = [_times([one for one in some if one["load"] == load]) for load in ("idle", "busy")]
                said = next((entry["said"] for entry in some if entry["said"]), "")
                lines.append(f"| {' | '.join([fault, under, *right, *times, said[:110]])} |")
    return "\n".join(lines)


def _right(entries: list[dict[str, Any]]) -> str:
    return f"{sum(not entry['problems'] for entry in entries)} of {len(entries)}" if entries else "-"


def _times(entries: list[dict[str, Any]]) -> str:
    if not entries:
        return ""
    seconds = [entry["seconds"] for entry in entries]
    return f"{statistics.median(seconds):.1f} ({max(seconds):.1f})"


if __name__ == "__main__":
    raise SystemExit(main())
