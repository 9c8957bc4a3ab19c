"""Which of SLURM's jobs are runs of dtrain, and which of them a person means by a number, a name or a folder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dtrain.errors import UsageError, nearest
from dtrain.layout import JOB, SLURM
from dtrain.rundir.job_record import CANCEL_NAME, JobAttempt, JobRecord, read_record
from dtrain.slurm.queue import Job, Queue, queued, read_queue, reason_words

DEFAULT = "runs"  # run.dir, where nobody says otherwise
_JOB_NAME = re.compile(r"\d+(_\d+)?")
_MOST_NAMED = 5


@dataclass(frozen=True)
class RunJob:
    """A run and its job, as far as either is known.

    Attributes:
        id: the job's, "123" or "123_4"; empty where the run was never submitted.
        run: the run's folder; None for a job that is not a dtrain run.
        record: what the run's folder says of the job.
        job: what SLURM says of it.
    """

    id: str
    run: Path | None = None
    record: JobRecord | None = None
    job: Job | None = None

    @property
    def name(self) -> str:
        """The run's name, or else the job's."""
        return self.run.name if self.run is not None else self.job.name if self.job is not None else ""

    @property
    def words(self) -> str:
        """What to call it in a message: "job 123 (run digits)"."""
        return f"job {self.id} (run {self.name})" if self.run is not None else f"job {self.id}"

    @property
    def handle(self) -> str:
        """What to call the run in a command of the shell: its name, or its folder where the name would not do."""
        if self.run is None:
            return self.id
        return shlex.quote(self.run.name if self.run.parent == Path(DEFAULT) else str(self.run))

    @property
    def state(self) -> str:
        """SLURM's word for its state; where SLURM knows nothing, a word of our own, in small letters."""
        if self.job is not None:
            return self.job.state
        if self.record is None or not self.record.job:
            return "not submitted"
        complete = self._last is not None and self._last.code == 0
        if self.run is not None and (self.run / SLURM / CANCEL_NAME).exists() and not complete:
            return "cancelled"
        return "ended" if self._last is not None and self._last.ended is not None else "unknown"

    @property
    def why(self) -> str:
        """Why it waits or how it ended, as far as is known."""
        job, last = self.job, self._last
        if job is not None and not job.has_ended:
            return reason_words(job.reason) if job.waits else ""
        # Of one that was cancelled as it waited, SLURM still tells why it waited.
        told = "" if job is None or job.state == "CANCELLED" else job.reason
        if last is None or last.ended is None:
            return told or (f"last seen on {last.nodes}" if job is None and last is not None else "")
        return last.why or told

    @property
    def _last(self) -> JobAttempt | None:
        return self.record.incarnations[-1] if self.record is not None and self.record.incarnations else None

    @property
    def ended(self) -> float | None:
        """When it ended, in seconds since the epoch; None where it has not, or that is not known."""
        if self.job is not None:
            return self.job.ended
        return self._last.ended if self._last is not None else None

    @property
    def is_over(self) -> bool:
        """Whether it neither waits nor runs, as far as is known."""
        return self.job.has_ended if self.job is not None else True


@dataclass(frozen=True)
class KnownJobs:
    """All runs and jobs that are known here.

    Attributes:
        all: runs of dtrain, by their jobs' numbers.
        queue: what SLURM told, of other jobs too.
        runs: the folder of the runs.
        troubles: what could not be read, in words.
    """

    all: tuple[RunJob, ...]
    queue: Queue
    runs: Path
    troubles: tuple[str, ...] = ()


def look(runs: Path, also: Iterable[Path] = (), *, needed_for: str) -> KnownJobs:
    """Asks SLURM, and all run folders.

    Args:
        runs: the folder of the runs.
        also: further runs' folders.
        needed_for: what a person asked for, for messages.
    """
    records, troubles = read_records([*runs.glob(f"*/{SLURM}/{JOB}"), *(one / SLURM / JOB for one in also)])
    queue = read_queue((record.job for record in records.values() if record.job), needed_for=needed_for)
    records |= _elsewhere(queue.jobs, runs)
    troubles += [queue.trouble] if queue.trouble else []
    return KnownJobs(tuple(match(records, queue.jobs, runs)), queue, runs, tuple(troubles))


def _elsewhere(jobs: Sequence[Job], runs: Path) -> dict[Path, JobRecord]:
    """Returns the records of jobs whose scripts lie in other folders of runs; of an array all runs lie side by side."""
    scripts = {run for job in jobs if (run := run_of_script(job.script, runs)) is not None}
    others = {run.parent for run in scripts} - {runs.resolve()}
    files = [file for folder in others for file in folder.glob(f"*/{SLURM}/{JOB}")]
    records, _ = read_records(files)
    present = {job.id for job in jobs}
    return {run: record for run, record in records.items() if record.job in present}


def refreshed(jobs: Iterable[RunJob], *, needed_for: str) -> list[RunJob]:
    """Returns the same runs with their jobs as slurmctld has them now; accounting, which is late, is not asked.

    Raises:
        SlurmError: it did not answer.
    """
    jobs = list(jobs)
    now: dict[str, Job] = {}
    for number in {one.id.partition("_")[0] for one in jobs}:
        now |= {job.id: job for job in queued(number, needed_for=needed_for)}
    return [replace(one, job=now.get(one.id)) for one in jobs]


def read_records(files: Iterable[Path]) -> tuple[dict[Path, JobRecord], list[str]]:
    """Returns the records of runs by the runs' folders, and what could not be read, in words."""
    records, troubles = {}, []
    for file in sorted({file.resolve(): file for file in files}.values()):
        run = file.parent.parent
        try:
            record = read_record(run)
        except UsageError as error:
            troubles.append(str(error))
            continue
        if record is not None:
            records[run] = record
    return records, troubles


def match(records: Mapping[Path, JobRecord], jobs: Sequence[Job], runs: Path) -> list[RunJob]:
    """Brings runs and jobs together.

    A job belongs to the run whose record has its number; or else to the run in whose folder its script lies, as long
    as it waits or runs: somebody may have submitted that script by hand.
    """
    by_name = {job.number: job for job in jobs} | {job.id: job for job in jobs}
    found = {run: RunJob(record.job, run, record, by_name.get(record.job)) for run, record in records.items()}
    taken = {one.job.id for one in found.values() if one.job is not None}
    others = []
    by_path = {run.resolve(): run for run in found}
    for job in jobs:
        run = run_of_script(job.script, runs)
        # The runs of an array have one script: which of them a task is, only the records tell.
        if job.id in taken or run is None or job.has_ended or job.array:
            continue
        mine = by_path.get(run.resolve())
        if mine is None:
            others.append(RunJob(job.id, run, None, job))
        elif found[mine].is_over:
            found[mine] = RunJob(job.id, mine, records[mine], job)
    return sorted([*found.values(), *others], key=lambda one: _order(one.id))


def run_of_script(command: str, runs: Path) -> Path | None:
    """Returns the run's folder that a batch script lies in, None where it lies elsewhere.

    Args:
        command: the script, and after a space what it was given, which SLURM does not quote.
        runs: the folder of the runs.
    """
    match = re.match(rf"(/.*)/{SLURM}/[^/ ]+\.sbatch(?: |$)", command, re.DOTALL)
    run = Path(match[1]) if match is not None else None
    known = run is not None and (run.parent == runs.resolve() or (run / SLURM / JOB).exists())
    return run if known else None


def find(name: str, known: KnownJobs) -> list[RunJob]:
    """Returns what a person means by a name: one run, or all tasks of an array.

    Args:
        name: "123", "123_4", a run's name, or its folder.
        known: the runs and jobs.

    Raises:
        UsageError: there is nothing of this name.
    """
    folder = Path(name)
    if "/" in name and folder.is_dir():
        return [_of_folder(folder, known)]
    if _JOB_NAME.fullmatch(name) and (found := _of_number(name, known)):
        return found
    found = [one for one in known.all if one.name == name.rstrip("/")]
    if found:
        return found
    if (known.runs / name).is_dir():
        return [_of_folder(known.runs / name, known)]
    raise UsageError(_unknown(name, known))


def _of_folder(folder: Path, known: KnownJobs) -> RunJob:
    for one in known.all:
        if one.run is not None and one.run.resolve() == folder.resolve():
            return one
    raise UsageError(
        f"{folder}: no SLURM job is known for it: it has no {SLURM}/{JOB}. "
        "`dtrain jobs --all` lists the runs that were jobs."
    )


def _of_number(name: str, known: KnownJobs) -> list[RunJob]:
    """The job of this number; all tasks of that array; or the run that once was that job."""
    exact = [one for one in known.all if name == one.id or (one.job is not None and name == one.job.number)]
    tasks = [one for one in known.all if one.id.startswith(f"{name}_")]
    if tasks or exact:
        return tasks or exact
    foreign = known.queue.tasks(name) or [job for job in [known.queue.find(name)] if job is not None]
    if foreign:
        return [RunJob(job.id, job=job) for job in foreign]
    return [one for one in known.all if earlier_output(one, name) is not None]


def earlier_output(one: RunJob, name: str) -> Path | None:
    """Returns the output of the job that a run was before it was submitted again; None where it was not that job."""
    path = one.run / SLURM / f"job-{name}.out" if one.run is not None else None
    is_present = name == one.id or (one.job is not None and name == one.job.number)
    return path if path is not None and not is_present and path.exists() else None


def _unknown(name: str, known: KnownJobs) -> str:
    names = [one.name for one in known.all if one.run is not None]
    ids = [one.id for one in known.all if one.id]
    near = nearest(name, [*ids, *names] if not _JOB_NAME.fullmatch(name) else ids)
    last = ", ".join(f"{one.id} ({one.name})" for one in known.all[-_MOST_NAMED:])
    there = (
        f" Known are {last}."
        if last
        else f" No run in {known.runs} was submitted as a job (set another folder with --dir)."
    )
    trouble = f" {known.queue.trouble}." if known.queue.trouble else ""
    return f"{name}: no such job or run.{near}{there}{trouble}"


def _order(identity: str) -> tuple[int, int]:
    number, _, task = identity.partition("_")
    return int(number) if number.isdigit() else -1, int(task) if task.isdigit() else -1
