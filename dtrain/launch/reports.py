"""How a rank tells its supervisor how it ended: one small JSON file a rank, also when all went well."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

REPORT_DIR = "DTRAIN_REPORT_DIR"


@dataclass(frozen=True)
class Report:
    """How one rank ended, in words.

    Attributes:
        rank: who.
        exit_code: what the job shall end with.
        text: what a person shall read; empty where all went well.
        when: seconds since the epoch; the earliest report is the cause, later ones are its echo.
    """

    rank: int
    exit_code: int
    text: str
    when: float


def supervised() -> bool:
    """Whether a dtrain supervisor prints this rank's report."""
    return REPORT_DIR in os.environ


def write_report(rank: int, exit_code: int, text: str) -> None:
    """Leaves a report for the supervisor; whole or not at all."""
    path = Path(os.environ[REPORT_DIR]) / f"rank-{rank}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(asdict(Report(rank, exit_code, text, time.time()))), encoding="utf-8")
    part.replace(path)


def read_reports(folder: Path) -> list[Report]:
    """Returns the reports that ranks left, the earliest first."""
    reports = [Report(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("rank-*.json")]
    return sorted(reports, key=lambda report: report.when)
