"""What SLURM says of this user's jobs: squeue of those that wait, run, or have just ended, sacct of the rest.

Accounting may be off; then sacct fails or prints nothing, and a job is known as long as slurmctld remembers it
(MinJobAge, 5 minutes where nobody changed it).
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dtrain.errors import SlurmError, UsageError
from dtrain.slurm.client import has_client, run_client

# No run's name has control characters, and hardly any other name does.
_FIELD, _RECORD = "\x1f", "\x1e"
_QUEUE_FIELDS = (
    *("JobArrayID", "ArrayTaskID", "JobID", "State", "Reason", "TimeLeft", "RestartCnt", "NodeList", "EndTime"),
    *("exit_code", "Name", "Command", "WorkDir"),
)
_ACCOUNT_FIELDS = ("JobID", "JobIDRaw", "State", "ExitCode", "End", "NodeList", "WorkDir")
_SOME_IDS = 200  # in one call of sacct

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
_NOTHING = ("", "(null)", "N/A", "None", "NONE", "None assigned", "Unknown", "UNKNOWN")
# What SLURM's words for why a job waits mean; a longer word may begin with one of them.
_REASONS = {
    "Resources": "no free nodes",
    "Priority": "lower priority than other jobs",
    "BeginTime": "not yet eligible; after a requeue up to 2 minutes",
    "Dependency": "waits for another job (dependency)",
    "JobArrayTaskLimit": "limit of array tasks running at once",
    "JobHeldUser": "held; release it with scontrol release",
    "JobHeldAdmin": "held by an administrator",
    "ReqNodeNotAvail": "nodes are down, drained or reserved",
    "PartitionTimeLimit": "requests more time than the partition allows",
    "PartitionNodeLimit": "requests more nodes than the partition has",
    "PartitionConfig": "requests something the partition does not allow",
    "PartitionDown": "the partition is down",
    "QOS": "a limit of its QOS",
    "Assoc": "a limit of its account",
    "MaxGRESPerAccount": "a limit of its account",
}


@dataclass(frozen=True)
class Job:
    """One job, or one task of an array.

    Attributes:
        id: as people name it: "123"; "123_4" for a task of an array.
        number: SLURM's own number; a task has one that is not its array's once it has started.
        state: in SLURM's words: PENDING, RUNNING, COMPLETED, ...
        reason: why it waits, or why it ended, in SLURM's words; empty where there is none.
        time_left: seconds until its time limit; None where there is none, or it has not started.
        restarts: how often SLURM has started it again; None where that is not known.
        nodes: where it runs or ran: "n[1-2]".
        ended: seconds since the epoch; None as long as it has not.
        code: the batch script's exit code, None as long as there is none; 128 + N where signal N ended it.
        name: its name.
        script: what was submitted; empty where it is not known.
        folder: where it runs; empty where it is not known.
        source: which command told: "squeue" or "sacct".
    """

    id: str
    number: str
    state: str
    reason: str = ""
    time_left: float | None = None
    restarts: int | None = None
    nodes: str = ""
    ended: float | None = None
    code: int | None = None
    name: str = ""
    script: str = ""
    folder: str = ""
    source: str = "squeue"

    @property
    def array(self) -> str:
        """The array's number, where it is a task of one; else empty."""
        return self.id.partition("_")[0] if "_" in self.id else ""

    @property
    def waits(self) -> bool:
        """Whether it is still to start, or to start again."""
        return self.state in WAITING

    @property
    def runs(self) -> bool:
        """Whether it holds nodes."""
        return self.state in RUNNING

    @property
    def has_ended(self) -> bool:
        """Whether it has ended for good, unless somebody requeues it."""
        return not (self.waits or self.runs)


@dataclass(frozen=True)
class Queue:
    """What SLURM told.

    Attributes:
        jobs: all that it told of.
        trouble: why it told nothing, or not all, in words; empty where all went well.
    """

    jobs: tuple[Job, ...] = ()
    trouble: str = ""

    def find(self, name: str) -> Job | None:
        """Returns the job of this id or number, None where it is not known."""
        by_id = next((job for job in self.jobs if job.id == name), None)
        return by_id or next((job for job in self.jobs if job.number == name), None)

    def tasks(self, array: str) -> list[Job]:
        """Returns the tasks of an array that are known."""
        return [job for job in self.jobs if job.array == array]


def read_queue(ended: Iterable[str] = (), *, needed_for: str) -> Queue:
    """Asks SLURM for this user's jobs; where it does not respond, that is told in words.

    Args:
        ended: ids of jobs that may have left the queue; sacct is asked for those of them that have.
        needed_for: what a person asked for, for messages.
    """
    if not has_client("squeue"):
        return Queue(trouble="SLURM is not on this machine (no squeue on PATH)")
    try:
        jobs = queued(needed_for=needed_for)
    except SlurmError as error:
        return Queue(trouble=str(error))
    known = {job.id for job in jobs} | {job.number for job in jobs}
    jobs += accounted([one for one in ended if one not in known], needed_for=needed_for)
    return Queue(tuple(jobs))


def queued(job: str | None = None, *, needed_for: str) -> list[Job]:
    """Returns this user's jobs that slurmctld knows of, each task of an array by itself.

    Args:
        job: the id of a job, task or array, where only that one is wanted.
        needed_for: what a person asked for, for messages.

    Raises:
        UsageError: there is no squeue here.
        SlurmError: it failed.
    """
    whose = [f"--user={os.getuid()}"] if job is None else [f"--jobs={job}"]
    fields = ",".join(f"{name}:0{_FIELD}" for name in _QUEUE_FIELDS) + _RECORD
    argv = ["squeue", "--noheader", "--array", "--states=all", *whose, f"--Format={fields}"]
    try:
        return parse_squeue(run_client(argv, needed_for=needed_for))
    except SlurmError as error:
        if job is not None and "Invalid job id" in str(error):
            return []
        raise


def accounted(ids: Sequence[str], *, needed_for: str) -> list[Job]:
    """Returns what accounting knows of jobs; nothing where there is no accounting.

    Args:
        ids: jobs and tasks of arrays.
        needed_for: what a person asked for, for messages.
    """
    jobs: list[Job] = []
    # By the arrays' numbers: asked for one task, sacct says nothing of one that was cancelled as it waited.
    numbers = list(dict.fromkeys(one.partition("_")[0] for one in ids))
    for start in range(0, len(numbers), _SOME_IDS):
        some = ",".join(numbers[start : start + _SOME_IDS])
        form = [f"--format={','.join(_ACCOUNT_FIELDS)}", "--parsable2", f"--delimiter={_FIELD}"]
        # Where accounting is off, it fails, and the runs' own folders are all there is.
        with contextlib.suppress(SlurmError, UsageError):
            argv = ["sacct", "--allocations", "--noheader", *form, f"--jobs={some}"]
            jobs += parse_sacct(run_client(argv, needed_for=needed_for))
    wanted = set(ids)
    return [job for job in jobs if job.id in wanted]


def output_file(job: str, *, needed_for: str) -> str:
    """Returns where a job's output goes, as slurmctld knows it; empty where it does not.

    Raises:
        UsageError: there is no scontrol here.
    """
    try:
        answer = run_client(["scontrol", "show", "job", job], needed_for=needed_for)
    except SlurmError:  # it has forgotten the job
        return ""
    match = re.search(r"^ *StdOut=(.+)$", answer, re.MULTILINE)
    return match[1] if match is not None else ""


def parse_squeue(text: str) -> list[Job]:
    """Reads what squeue printed in this module's format; what is no job of it is left out."""
    records = [line.lstrip("\n").split(_FIELD) for line in text.split(_RECORD)]
    named = [dict(zip(_QUEUE_FIELDS, one, strict=False)) for one in records if len(one) == len(_QUEUE_FIELDS) + 1]
    return [_queued_job(fields) for fields in named]


def _queued_job(fields: Mapping[str, str]) -> Job:
    identity, task, restarts = fields["JobArrayID"], _word(fields["ArrayTaskID"]), fields["RestartCnt"]
    job = Job(
        # 22.05 has "123_4" in the first of them, where its manual promises "123".
        id=identity if "_" in identity or not task else f"{identity}_{task}",
        number=fields["JobID"],
        state=fields["State"],
        reason=_word(fields["Reason"]),
        time_left=seconds_of(fields["TimeLeft"]),
        restarts=int(restarts) if restarts.isdigit() else None,
        nodes=_word(fields["NodeList"]),
        name=fields["Name"],
        script=_word(fields["Command"]),
        folder=_word(fields["WorkDir"]),
    )
    if not job.has_ended:
        return job  # what is told of its end is a guess, or of an earlier start
    return replace(job, ended=moment_of(fields["EndTime"]), code=code_of(fields["exit_code"]))


def parse_sacct(text: str) -> list[Job]:
    """Reads what sacct printed in this module's format; tasks that it tells of together are told apart."""
    records = [line.split(_FIELD) for line in text.splitlines()]
    named = [dict(zip(_ACCOUNT_FIELDS, one, strict=True)) for one in records if len(one) == len(_ACCOUNT_FIELDS)]
    return [
        Job(
            id=identity,
            number=fields["JobIDRaw"],
            state=fields["State"].partition(" ")[0],  # "CANCELLED by 1000"
            nodes=_word(fields["NodeList"]),
            ended=moment_of(fields["End"]),
            code=code_of(fields["ExitCode"]),
            folder=_word(fields["WorkDir"]),
            source="sacct",
        )
        for fields in named
        for identity in tasks_of(fields["JobID"])
    ]


def tasks_of(identity: str) -> list[str]:
    """Returns the tasks that SLURM tells of together: "7_[2-4,6%1]" are 7_2, 7_3, 7_4 and 7_6."""
    match = re.fullmatch(r"(\d+)_\[([^%\]]*)(?:%\d+)?\]", identity)
    if match is None:
        return [identity]
    parts = (re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part) for part in match[2].split(","))
    spans = [(int(part[1]), int(part[2] or part[1]), int(part[3] or 1)) for part in parts if part is not None]
    return [f"{match[1]}_{task}" for first, last, step in spans for task in range(first, last + 1, step)]


def seconds_of(text: str) -> float | None:
    """Returns a duration as SLURM writes it ("1-02:03:04", "03:04"), in seconds; None for "UNLIMITED" and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def moment_of(text: str) -> float | None:
    """Returns a time as SLURM writes it ("2026-01-31T12:00:00", of this machine's zone), in seconds since the epoch."""
    try:
        return time.mktime(time.strptime(text.strip(), "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return None


def code_of(text: str) -> int | None:
    """Returns an exit code, 128 + N where signal N ended the process; None where there is none.

    SLURM writes it as "1:0" or "0:9", and squeue of 22.05 as wait() has it: "256", "9".
    """
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if match is not None:
        code, number = int(match[1]), int(match[2])
    elif text.strip().isdigit():
        code, number = divmod(int(text), 256)
    else:
        return None
    return 128 + number if number else code


def reason_words(reason: str) -> str:
    """Returns SLURM's word for why a job waits with its meaning: "Resources (no free nodes)"."""
    meaning = next((words for word, words in _REASONS.items() if reason.startswith(word)), "")
    return f"{reason} ({meaning})" if meaning else reason


def _word(text: str) -> str:
    return "" if text.strip() in _NOTHING else text
