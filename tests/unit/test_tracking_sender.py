"""The training's side of W&B, against another side that the test plays: what it says, and how long it waits."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from dtrain.callbacks.tracking import wandb_tracker
from dtrain.callbacks.tracking.base import RunEnd
from dtrain.callbacks.tracking.wandb_tracker import WandbTracker
from dtrain.layout import TRACKING

TELL = "import json, sys, time\ndef tell(event, **more): print(json.dumps({'event': event, **more}), flush=True)\n"


def tracker_beside(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: float = 60.0) -> WandbTracker:
    """A tracker whose other process runs this code."""
    (tmp_path / TRACKING).mkdir()
    script = tmp_path / "other.py"
    script.write_text(TELL + code)
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\nexec {sys.executable} {script}\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(wandb_tracker.sys, "executable", str(stand_in))
    return WandbTracker(tmp_path, "abc", patience)


REMEDY = "All values are kept; send them later with: dtrain sync"


@pytest.mark.parametrize(
    ("code", "warnings"),
    [
        ("tell('up'); tell('online', url='http://w/r'); sys.stdin.readline(); tell('done', sent=True, why='')", []),
        ("tell('up'); tell('offline', why=''); sys.stdin.readline(); tell('done', sent=False, why='')", []),
        ("tell('up'); tell('offline', why='it is gone'); sys.stdin.readline(); tell('done', sent=False, why='')",
         [f"W&B: offline: it is gone. {REMEDY}"]),
        ("tell('up'); tell('online', url='u'); sys.stdin.readline(); tell('done', sent=False, why='it went')",
         [f"W&B: not everything was sent: it went. {REMEDY}"]),
        ("tell('up'); tell('failed', why='KeyError: x')", [f"W&B: not tracked: KeyError: x. {REMEDY}"]),
        ("tell('up'); tell('online', url='u'); sys.exit(1)", [f"W&B: not everything was sent: its process ended, see IT/tracking/wandb.log. {REMEDY}"]),
    ],
)  # fmt: skip
def test_a_person_reads_one_line_at_most(
    code: str, warnings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = tracker_beside(code, tmp_path, monkeypatch)
    tracker.log_steps({"step/loss": 1.0}, 3)
    tracker.log_epoch({"epoch": 1})
    tracker.finish(RunEnd())
    assert [
        record.message.removesuffix(f" {tmp_path}").replace(str(tmp_path), "IT") for record in caplog.records
    ] == warnings


def test_one_that_does_not_end_is_waited_for_as_long_as_was_said_and_ended(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = "tell('up'); tell('online', url='http://w/r'); open('pid', 'w').write('1'); time.sleep(600)"
    monkeypatch.chdir(tmp_path)
    tracker = tracker_beside(code, tmp_path, monkeypatch, patience=1.0)
    until = time.monotonic() + 60
    while not Path("pid").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    began = time.monotonic()
    tracker.finish(RunEnd())
    assert time.monotonic() - began < 30  # two seconds, on a machine with nothing else to do
    assert [r.message for r in caplog.records] == [
        f"W&B: not everything was sent: it did not finish in time. {REMEDY} {tmp_path}"
    ]
    assert capsys.readouterr().out == "W&B: http://w/r\nW&B: sending the last values, for 1 s at most\n"
    assert tracker._process.returncode == -9
