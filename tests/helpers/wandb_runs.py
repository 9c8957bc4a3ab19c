"""What a run tracked by W&B leaves, what its sender makes of it, and what is then to be compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from dtrain.callbacks.tracking.files import STEPS, StepLog, write_json
from dtrain.callbacks.tracking.wandb_tracker import _WORKER
from dtrain.layout import TRACKING
from dtrain.rundir.history import read_history
from helpers.commands import MARK, clean_environment
from helpers.wandb_files import wandb_rows


def truth(run: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_history(run).to_dict("records")
    return rows


def plain(rows: list[dict[str, Any]]) -> list[str]:
    """Rows that can be compared, to the last digit, also where there is NaN."""
    return [repr(sorted(row.items())) for row in rows]


def offline_rows(run: Path) -> list[dict[str, Any]]:
    """The rows in all of W&B's own files of a run, in their order."""
    parts = sorted(
        run.glob("wandb/*run-*/run-*.wandb"), key=lambda part: part.parent.name.rpartition("run-")[0] + part.parent.name
    )
    return [row for part in parts for row in wandb_rows(part)]


def made_run(run: Path, epochs: int, **options: Any) -> Path:
    """What a training leaves for who sends it."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("recipe: mine.py\n")
    log = StepLog(run)
    with (run / "history.csv").open("w") as history:
        history.write("epoch,loss,val_loss\n")
        for epoch in range(1, epochs + 1):
            log.add({"updates": 10 * epoch - 5, "at": 1e9 + epoch, "values": {"step/loss": 1 / epoch}})
            history.write(f"{epoch},{epoch / 3},{'nan' if epoch == 2 else epoch / 7}\n")
            log.add({"row": epoch, "updates": 10 * epoch, "at": 1e9 + epoch + 0.5})
            log.add({"firm": epoch})
    log.close()
    wandb = {"project": "mine", "entity": None, "mode": "online", "wait_seconds": 60.0, "id": "abc123", **options}
    write_json(
        run / TRACKING / "about.json",
        {"wandb": wandb, "name": run.name, "config": {"lr": 0.1}, "about": {"code": "c0de"}},
    )
    return run


def more_of(run: Path, *lines: dict[str, Any], row: str = "") -> None:
    """What a training that was resumed adds to that."""
    with (run / TRACKING / STEPS).open("a") as steps, (run / "history.csv").open("a") as history:
        history.write(row)
        steps.writelines(json.dumps(line) + "\n" for line in lines)


def beside(run: Path, env: dict[str, str], end: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Runs the process that sends, to its end; what it has told."""
    done = subprocess.run(
        [sys.executable, "-c", _WORKER, str(run)],
        input="" if end is None else json.dumps(end) + "\n",
        capture_output=True,
        check=True,
        text=True,
        timeout=120,
        env={name: value for name, value in clean_environment(**env).items() if name != MARK},
    )
    return [json.loads(line) for line in done.stdout.splitlines()]
