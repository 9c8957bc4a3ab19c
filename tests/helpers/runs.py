"""Folders of runs as `dtrain train` leaves them, made by hand: with values that are known."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("epoch", "loss", "accuracy", "val_loss", "val_accuracy", "lr", "seconds", "samples_per_second")


def a_start(at: float, **more: Any) -> dict[str, Any]:
    """A line of `starts.jsonl`."""
    versions = {"dtrain": "0.2.0", "torch": "2.13.0", "accelerate": "1.15.0", "python": "3.11.7"}
    facts = {"host": "node1", "pid": 1, "ranks": 2, "device": "cpu", "job": None, "checkpoint": None, "epoch": 0}
    return {"event": "start", "at": at, **facts, "versions": versions, "gpu": None, "cores": 4, "code": None} | more


def an_end(at: float, why: str = "complete", **more: Any) -> dict[str, Any]:
    """A line of `starts.jsonl`."""
    return {"event": "end", "at": at, "why": why, "epoch": 0, "text": ""} | more


def rows(epochs: int, seed: int = 0, seconds: float = 1.5) -> list[dict[str, Any]]:
    """A history whose values have all their digits; the lowest val_loss is in its midst."""
    found = []
    for epoch in range(1, epochs + 1):
        way = epoch / epochs
        loss = math.exp(-3 * way) / (1 + seed / 7) + 0.01 * math.sin(epoch * (seed + 2))
        val_loss = loss + 0.3 * max(0.0, way - 0.6) ** 1.3 + 0.012 * math.cos(epoch * (seed + 3))
        accuracy = 1 - loss / 3
        rate = 0.003 * (1 + math.cos(math.pi * way)) / 2 + 1e-5
        took = seconds * (1 + 0.07 * math.sin(epoch))
        values = (epoch, loss, accuracy, val_loss, 1 - val_loss / 3, rate, took, 1438 / took)
        found.append(dict(zip(COLUMNS, values, strict=True)))
    return found


def make_run(
    folder: Path,
    history: Sequence[dict[str, Any]] = (),
    *,
    config: dict[str, Any] | None = None,
    starts: Sequence[dict[str, Any]] = (),
    failure: dict[str, Any] | None = None,
) -> Path:
    """Makes a run's folder.

    Args:
        folder: it must not be there yet.
        history: its rows; none leaves no file.
        config: what `config.yaml` holds, which is YAML, of which JSON is a part.
        starts: the lines of `starts.jsonl`.
        failure: what `failure.json` holds.
    """
    folder.mkdir(parents=True)
    if history:
        with (folder / "history.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(history[0])
            writer.writerows(row.values() for row in history)
    if config is not None or not history:
        (folder / "config.yaml").write_text(json.dumps(config or {}))
    if starts:
        (folder / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in starts))
    if failure is not None:
        (folder / "failure.json").write_text(json.dumps(failure))
    return folder


def aged(folder: Path, at: float) -> Path:
    """Has a run's history last changed then."""
    for name in ("history.csv", "config.yaml"):
        if (folder / name).exists():
            os.utime(folder / name, (at, at))
    return folder


def cells(folder: Path) -> list[dict[str, str]]:
    """The texts of a run's history, read by the standard library alone."""
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))
