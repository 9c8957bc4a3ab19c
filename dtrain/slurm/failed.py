"""A run's `failure.json`, told to a person as its supervisor told it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.launch.monitor.heartbeat import Beat
from dtrain.launch.monitor.postmortem import read_failure
from dtrain.layout import FAILURE
from dtrain.slurm.runs import RunJob


def failure_of(one: RunJob) -> str:
    """Returns what a person shall read of why a job that is over has failed; empty where it has not."""
    if one.run is None or not one.is_over or one.state == "COMPLETED":
        return ""
    path = one.run / FAILURE
    try:
        found = read_failure(one.run)
    except ValueError as error:
        return f"{path}: cannot be read ({error})."
    return "" if found is None else failure_text(found, path)


def failure_text(found: Mapping[str, Any], path: Path) -> str:
    """Returns the words for what `failure.json` holds: cause, rank, step, the user's own frames, and what is left.

    Args:
        found: its fields; see `dtrain.launch.monitor.postmortem.RankFailure`.
        path: the file.
    """
    raised = found.get("exception") or {}
    what = (
        f"{raised.get('type')}: {raised.get('message')}" if raised else _CAUSES.get(str(found.get("cause")), "failed")
    )
    place = Beat(1, str(found.get("phase") or ""), found.get("epoch") or 0, found.get("step") or 0)
    device = f", device {found['device']}" if found.get("device") else ""
    lines = [
        str(found.get("traceback") or "").rstrip("\n"),
        f"dtrain: failure: rank {found.get('rank')}: {what}",
        f"  at {place}, on {found.get('host')}{device}",
        _others(found.get("others") or {}),
        f"  last checkpoint: {found.get('checkpoint') or 'none yet'}",
        f"  full report: {path}",
    ]
    return "\n".join(line for line in lines if line)


_CAUSES = {
    "killed": "was killed (SIGKILL)",
    "out_of_memory": "ran out of memory",
    "segfault": "crashed",
    "signal": "was killed by a signal",
    "exit": "exited without reporting a cause",
    "hang": "hung, and was terminated",
    "lost": "was lost with its node",
    "peer": "lost its connection to a rank that exited",
    "nan": "had a loss that is not finite",
}


def _others(others: Mapping[str, str]) -> str:
    by_text: dict[str, list[str]] = {}
    for rank, how in others.items():
        by_text.setdefault(how, []).append(rank)
    told = "; ".join(f"rank{'s' if len(r) > 1 else ''} {', '.join(r)}: {how}" for how, r in by_text.items())
    return f"  the others: {told}" if told else ""
