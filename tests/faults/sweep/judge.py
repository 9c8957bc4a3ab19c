"""Whether what dtrain said and left is right."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from faults.sweep.table import BATCH, Case

MARK = "SWEEP_CASE"
_PATIENCE_SECONDS = 30.0


@dataclass
class Verdict:
    """What came of one case.

    Attributes:
        case: which.
        seconds: from the fault to the end of the last process.
        problems: what was not right; empty where all was.
        said: the line of the screen that names the fault.
        screen: all of it.
    """

    case: Case
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    said: str = ""
    screen: str = ""

    def check(self, right: bool, problem: str) -> None:
        if not right:
            self.problems.append(problem)

    def entry(self) -> dict[str, Any]:
        """The same as JSON; the screen only where it is needed."""
        case = self.case
        found = {"fault": case.fault, "ranks": case.ranks, "load": case.load, "seed": case.seed, "under": case.under}
        found |= {"seconds": round(self.seconds, 2), "said": self.said, "problems": self.problems}
        return found | ({"place": case.place, "screen": self.screen[-4000:]} if self.problems else {})


def running(token: str) -> list[psutil.Process]:
    """The processes of one case that still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def wait_for_end(token: str, verdict: Verdict, since: float) -> None:
    """Waits until no process of the case runs; what stays is a problem, and is ended."""
    deadline = time.time() + _PATIENCE_SECONDS
    while (left := running(token)) and time.time() < deadline:
        time.sleep(0.05)
    verdict.seconds = max(0.0, time.time() - since)
    for process in left:
        verdict.problems.append(f"left running: {process.pid} {' '.join(process.cmdline())[:200]}")
        process.kill()


def judge_screen(verdict: Verdict, texts: list[str], more: Mapping[str, object] | None = None) -> None:
    """Looks for the patterns of the fault on every launcher's screen."""
    case = verdict.case
    first = case.first_sample()
    values = {**case.place, **(more or {}), "indices": ", ".join(map(str, range(first, first + BATCH)))}
    verdict.screen = "\n--- the other node\n".join(texts)
    for text in texts:
        for pattern in case.kind.says:
            filled = pattern.format(**values) if "{" in pattern else pattern
            verdict.check(re.search(filled, text) is not None, f"the screen lacks {filled!r}")
    told = [line for line in texts[0].splitlines() if re.match(r"(on node \d+: |\[rank \d+\] )?dtrain: ", line)]
    verdict.said = told[0] if told else ""


def judge_failure(verdict: Verdict, run: Path) -> None:
    """Compares failure.json with the place of the fault."""
    case, cause = verdict.case, verdict.case.kind.cause
    file = run / "failure.json"
    if cause is None:
        return
    if not file.exists():
        verdict.problems.append("no failure.json")
        return
    found = json.loads(file.read_text())
    expected = {name: case.place[name] for name in ("rank", "epoch", "step", "phase")} | {"cause": cause}
    for name, value in expected.items():
        verdict.check(found[name] == value, f"failure.json: {name} is {found[name]!r}, should be {value!r}")
    others = sorted(str(rank) for rank in range(case.ranks) if rank != case.place["rank"])
    verdict.check(sorted(found["others"]) == others, f"failure.json: others are {found['others']}")


def judge_time(verdict: Verdict) -> None:
    verdict.check(
        verdict.seconds <= verdict.case.kind.within,
        f"it took {verdict.seconds:.1f} s to end, should be at most {verdict.case.kind.within:g} s",
    )
