"""What SLURM says of a job."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# A job in one of these is over.
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
)
_OUTPUT = re.compile(r" StdOut=(.*?) (?:Power|Switches|$)")
_FIELD = re.compile(r"(?:^| )([A-Za-z]+(?:/[A-Za-z]+)*)=(\S*)")


@dataclass(frozen=True)
class Job:
    """One job, as `scontrol show job` tells of it.

    Attributes:
        id: as it is asked for: 12, or 12_3 for a task of an array.
        state: PENDING, RUNNING, COMPLETED ...
        reason: why it waits or has ended.
        code: exit code of its script.
        restarts: how often it was requeued.
        nodes: its nodes, in SLURM's short form.
        output: the file with its output.
        known: all that was said.
    """

    id: str
    state: str
    reason: str
    code: int
    restarts: int
    nodes: str
    output: Path
    known: dict[str, str]

    @property
    def over(self) -> bool:
        """Whether it has ended for good."""
        return self.state in ENDED

    @property
    def text(self) -> str:
        """All that it has printed so far."""
        return self.output.read_text(errors="replace") if self.output.is_file() else ""


def read_job(asked: str, text: str) -> Job:
    """Returns what `scontrol --oneliner show job` says of the first job; a value with a space in it is cut there."""
    line = text.partition("\nJobId=")[0]  # the words of a script may have line breaks in them
    known = dict(_FIELD.findall(line))
    output = _OUTPUT.search(line)
    return Job(
        id=asked,
        state=known.get("JobState", ""),
        reason=known.get("Reason", ""),
        code=int(known.get("ExitCode", "0:0").partition(":")[0]),
        restarts=int(known.get("Restarts", "0")),
        nodes=known.get("NodeList", ""),
        output=Path(output[1] if output else ""),
        known=known,
    )
