"""What is known of a run's job in the run's own folder: it outlives the scheduler's memory, and needs no accounting."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dtrain.errors import UsageError
from dtrain.files import make_folder, read_below, write_below
from dtrain.layout import JOB, SLURM

CANCEL_NAME = "cancel"  # as long as this file is there, the job ends for good when it stops


@dataclass(frozen=True)
class JobAttempt:
    """One time that a job was started; a job that is requeued has several.

    Attributes:
        restart: how often SLURM had started the job before.
        job_id: its number; that of the task, where the job is one of an array.
        nodes: where it ran, as SLURM writes it: "n[1-2]".
        started: seconds since the epoch.
        ended: seconds since the epoch; None while it runs, or where it ended without a word.
        code: the exit code of its ranks, or None.
        why: what became of it, in words.
        progress: newest checkpoint's epoch and step, and rows of the history, as it began.
    """

    restart: int
    job_id: str
    nodes: str
    started: float
    ended: float | None = None
    code: int | None = None
    why: str = ""
    progress: tuple[float, ...] = ()


@dataclass(frozen=True)
class JobRecord:
    """A run's job.

    Attributes:
        job: its number, "123"; "123_4" for a task of an array; empty before it is submitted.
        submitted: seconds since the epoch, None where another command than `dtrain submit` did it.
        script: the file that was submitted, None where it is not known.
        output: the file that the job's output goes to, None where it is not known.
        name: the run's.
        incarnations: the times that it was started, the first one first.
        forgiven: so many of the first ones do not count towards the cap: a person had the job started again since.
        folder: where it runs, from which its script may name files; None where that is not known.
    """

    job: str
    submitted: float | None = None
    script: str | None = None
    output: str | None = None
    name: str = ""
    incarnations: tuple[JobAttempt, ...] = ()
    forgiven: int = 0
    folder: str | None = None

    def without_progress(self, now: tuple[float, ...]) -> int:
        """Returns how many of the last incarnations began where the run stands now, and so have achieved nothing.

        Args:
            now: how far the run is.
        """
        counted = self.incarnations[self.forgiven :]
        return sum(1 for _ in itertools.takewhile(lambda one: one.progress == now, reversed(counted)))

    def with_attempt(self, one: JobAttempt) -> JobRecord:
        """Returns this record with an attempt added, or updated: the last one, where it is the same."""
        kept = self.incarnations
        if kept and (kept[-1].job_id, kept[-1].restart) == (one.job_id, one.restart):
            kept = kept[:-1]
        return replace(self, incarnations=(*kept, one))


def read_record(run: Path) -> JobRecord | None:
    """Returns what the run's folder says of its job; None where it says nothing.

    Raises:
        UsageError: the file is damaged.
    """
    path = run / SLURM / JOB
    try:
        found = json.loads(read_below(run, f"{SLURM}/{JOB}"))
        incarnations = tuple(_attempt(one) for one in found.pop("incarnations", ()))
        return JobRecord(**_known(JobRecord, found), incarnations=incarnations)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}. Remove it; nothing else depends on it.") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path}: is not a job record ({error}). Remove it; nothing else depends on it.") from None


def write_record(run: Path, record: JobRecord) -> None:
    """Writes a record into a run's folder, whole or not at all; makes its `slurm` folder where there is none."""
    run.mkdir(parents=True, exist_ok=True)
    make_folder(run, SLURM)
    write_below(run, f"{SLURM}/{JOB}", json.dumps(asdict(record), indent=1) + "\n")


def _attempt(found: Mapping[str, Any]) -> JobAttempt:
    known = _known(JobAttempt, found)
    return JobAttempt(**known | {"progress": tuple(known.get("progress") or ())})


def _known(kind: type[Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out what a later version may have added."""
    names = {one.name for one in fields(kind)}
    return {name: value for name, value in found.items() if name in names}
