"""What the page shows of runs, as JSON: the histories' cells as they are written, all else as text."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from dtrain import __version__
from dtrain.config.flat import flatten
from dtrain.masking import masked
from dtrain.report.finding import changed
from dtrain.report.media import MOST_OF_PAGE, media_data, size_of_media
from dtrain.report.runs import Run
from dtrain.rundir.columns import mode_of
from dtrain.rundir.starts import RunStart

_START_FACTS = ("host", "ranks", "device", "gpu", "cores", "code", "job", "checkpoint")
_FAILURE_FACTS = ("rank", "host", "device", "epoch", "step", "phase", "cause", "traceback", "file")


def page_data(runs: Sequence[Run], *, live: bool) -> dict[str, Any]:
    """Returns what the page shows.

    Args:
        runs: in this order.
        live: whether the page is to ask for more.
    """
    shown, room = [], MOST_OF_PAGE
    for run in runs:
        shown.append(run_data(run, room))
        room -= size_of_media(shown[-1]["media"])
    return {"dtrain": __version__, "made": None if live else time.time(), "live": live, "runs": shown}


def run_data(run: Run, room: int = MOST_OF_PAGE) -> dict[str, Any]:
    """Returns what the page shows of one run.

    Args:
        run: it.
        room: bytes that are left in the page for images.
    """
    monitor, mode = run.monitor()
    modes = {name: mode_of(name) for name in run.columns}
    return {
        "name": run.name,
        "folder": str(run.folder),
        "state": run.state,
        "changed": changed(run.folder),
        "epoch": run.epoch,
        "planned": run.planned,
        "columns": list(run.columns),
        "epochs": run.epochs,
        "seconds": run.seconds,
        "cells": {name: run.texts(name) for name in run.columns},
        "monitor": monitor,
        "modes": modes | ({} if monitor is None else {monitor: mode}),
        "resumed": run.resumed_after(),
        "config": {
            name: _shown(masked(name, value)) for name, value in flatten(run.config).items() if name != "defaults"
        },
        "starts": [_start(one) for one in run.starts],
        "damage": list(run.damage),
        "media": media_data(run.folder, room),
        "failures": [_failure(one) for one in run.failures],
        "incarnations": _incarnations(run.job),
    }


def _start(one: RunStart) -> dict[str, Any]:
    versions = one.facts.get("versions")
    return {
        "at": _number(one.at),
        "ended": _number(one.ended),
        "why": one.why,
        "text": one.text,
        "epoch": one.epoch,
        "before": one.before,
        **{name: _text(one.facts.get(name)) for name in _START_FACTS},
        "versions": {str(k): _text(v) for k, v in versions.items()} if isinstance(versions, Mapping) else {},
    }


def _failure(one: Mapping[str, Any]) -> dict[str, Any]:
    raised = one.get("exception")
    raised = raised if isinstance(raised, Mapping) else {}
    others = one.get("others")
    told = (
        "; ".join(f"rank {rank}: {_text(how)}" for rank, how in others.items()) if isinstance(others, Mapping) else None
    )
    return {
        "at": _number(one.get("at")),
        **{name: _text(one.get(name)) for name in _FAILURE_FACTS},
        "type": _text(raised.get("type")),
        "message": _text(raised.get("message")),
        "others": told or None,
    }


def _incarnations(job: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The times that SLURM started the run; nothing of where its files are."""
    return [
        {
            "job_id": _text(one["job_id"]),
            "nodes": _text(one["nodes"]),
            "started": _number(one["started"]),
            "ended": _number(one["ended"]),
            "code": _number(one["code"]),
            "why": _text(one["why"]),
        }
        for one in (job or {}).get("incarnations", ())
    ]


def _text(value: Any) -> str | None:
    """Files of a run's folder may hold anything; what is shown of it is text."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    try:
        return str(value)
    except (RecursionError, ValueError):  # nested, or an integer, without bounds
        return "(cannot be shown)"


def _shown(value: Any) -> str:
    text = _text(value)
    return "null" if text is None else text


def _number(value: Any) -> float | None:
    try:
        return value if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None
