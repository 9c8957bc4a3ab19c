"""From a login node: submits the job in which the nodes are looked at, waits for it, and reads what it found."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from dtrain.errors import DtrainError, SlurmError, UsageError
from dtrain.launch.supervisor import dtrain_argv
from dtrain.slurm.client import run_client, submit
from dtrain.tools.doctor.cluster import job_runs
from dtrain.tools.doctor.finding import Finding

NAME, RESULT, OUTPUT, SCRIPT = "SLURM job", "result.json", "job.out", "doctor.sbatch"
_NEEDED_FOR = "dtrain doctor --nodes"
_POLL, _SEEN_SECONDS, _UNHEARD = 1.0, 10.0, 10
_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "RESV_DEL_HOLD", "REQUEUE_HOLD", "SUSPENDED")
# Waiting does not help: the request is not within the partition's or the account's limits.
_NEVER = (
    "PartitionNodeLimit",
    "PartitionTimeLimit",
    "AccountNotAllowed",
    "QOSNotAllowed",
    "InvalidAccount",
    "InvalidQOS",
    "BadConstraints",
)
_AT_WORK = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED", "RESIZING")


@dataclass(frozen=True)
class DoctorJob:
    """What is asked of SLURM.

    Attributes:
        nodes: their number.
        words: of `dtrain doctor`, which the job runs.
        options: of sbatch.
        wait: seconds that the job may wait in the queue.
    """

    nodes: int
    words: Sequence[str]
    options: Sequence[str]
    wait: float


def allocation() -> tuple[str, ...]:
    """Returns the nodes of the job that this process is in and that runs; () outside of one."""
    job = os.environ.get("SLURM_JOB_ID")
    return nodes_of_job() if job and job_runs(job) else ()


def nodes_of_job() -> tuple[str, ...]:
    """Returns the nodes that SLURM's variables name."""
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    return tuple(run_client(["scontrol", "show", "hostnames", nodes], needed_for=_NEEDED_FOR).split())


def chosen(nodes: tuple[str, ...], count: int) -> tuple[str, ...]:
    """Returns the first nodes of an allocation.

    Raises:
        UsageError: it has fewer.
    """
    if len(nodes) < count:
        raise UsageError(
            f"--nodes {count}, but this shell is in an allocation (job {os.environ.get('SLURM_JOB_ID')}) of "
            f"{len(nodes)}: {', '.join(nodes)}. Use --nodes {len(nodes)}, or run it outside of the allocation."
        )
    return nodes[:count]


def checked_options(words: Sequence[str]) -> list[str]:
    """Returns further options of sbatch.

    Raises:
        UsageError: one is no option: sbatch would take it for the script.
    """
    for word in words:
        if not word.startswith("--") or word == "--" or not word.isprintable():
            raise UsageError(f"--sbatch-arg {word!r}: should be a long sbatch option: --sbatch-arg=--exclude=node7.")
    return list(words)


def script_text(order: DoctorJob, folder: Path) -> str:
    """Returns the batch script: the same command, told to look at the nodes that it is given."""
    words = ["doctor", *order.words, "--nodes", str(order.nodes), "--into", str(folder.absolute())]
    return f"#!/bin/bash\n# Written by dtrain doctor.\nexec {shlex.join([sys.executable, *dtrain_argv(words)])}\n"


def run_job(order: DoctorJob, folder: Path, tell: Callable[[str], None]) -> dict[str, object] | Finding:
    """Submits the job and waits for it; where this process is ended first, the job is cancelled.

    Args:
        order: what is asked for.
        folder: a new one, which the nodes should see.
        tell: is given a line whenever there is news.

    Returns:
        what the job found, as it wrote it; or a failure that says why there is nothing.
    """
    script = folder / SCRIPT
    script.write_text(script_text(order, folder), encoding="utf-8")
    output = str(folder.absolute() / OUTPUT).replace("%", "%%")  # sbatch has a meaning of its own for it
    options = [f"--nodes={order.nodes}", "--ntasks-per-node=1", "--job-name=dtrain-doctor", "--no-requeue", "--no-kill"]
    job = submit(
        script, cwd=Path.cwd(), options=[*options, f"--output={output}", *order.options], needed_for=_NEEDED_FOR
    )
    with _cancelled_on_exit(job, tell) as keep:
        state, reason = _wait_for(job, order.wait, folder / RESULT, tell)
        keep.append(state not in _WAITING)
    if state in _WAITING:
        words = f"job {job} did not start ({state.lower()}: {reason}) and was cancelled"
        remedy = (
            "check the partition's limits and free nodes (dtrain doctor); request less, or wait longer: --wait SECONDS"
        )
        return Finding(NAME, "fail", words, remedy)
    return _result(folder, job, state)


def _result(folder: Path, job: str, state: str) -> dict[str, object] | Finding:
    deadline = time.monotonic() + _SEEN_SECONDS  # a network file system may take some seconds to show it
    while RESULT not in os.listdir(folder):  # noqa: PTH208 - a network file system then looks anew
        if time.monotonic() > deadline:
            return _no_result(folder, job, state)
        time.sleep(0.1)
    found: dict[str, object] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return found


def _no_result(folder: Path, job: str, state: str) -> Finding:
    words = f"job {job} ended ({state.lower()}) without a result"
    try:
        said = [line for line in (folder / OUTPUT).read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        words = f"{words}, and its output is missing: the job's first node does not see {folder.parent}"
        return Finding(NAME, "fail", words, "use a folder shared with the nodes: run.dir=FOLDER")
    remedy = (
        "read its output; if the time limit is too short: --time 10; if the nodes "
        "use another Python: activate yours first"
    )
    return Finding(NAME, "fail", f"{words}: {said[-1] if said else 'it printed nothing'}", remedy)


def _wait_for(job: str, seconds: float, result: Path, tell: Callable[[str], None]) -> tuple[str, str]:
    """Returns the job's last state and reason: once its result is here, it has ended, or has waited for too long."""
    deadline, before, unheard = time.monotonic() + seconds, ("", ""), 0
    while True:
        try:
            state, reason = _state_of(job)
            unheard = 0
        except SlurmError:  # a controller that is busy, or starts anew
            unheard += 1
            if unheard == _UNHEARD:
                raise
            time.sleep(_POLL)
            continue
        if (state, reason) != before:
            tell(f"job {job}: {state.lower()}{f' ({reason})' if reason not in ('None', '') else ''}")
            before = state, reason
        too_long = time.monotonic() > deadline or reason in _NEVER
        if result.is_file() or state not in (*_WAITING, *_AT_WORK) or (state in _WAITING and too_long):
            return state, reason
        time.sleep(_POLL)


def _state_of(job: str) -> tuple[str, str]:
    try:
        told = run_client(["squeue", "-h", "-j", job, "--states=all", "-o", "%T|%R"], needed_for=_NEEDED_FOR)
    except DtrainError as error:
        if "Invalid job id" in str(error):
            return "ENDED", ""
        raise
    state, _, reason = told.strip().partition("|")
    return (state, reason.strip("()")) if state else ("ENDED", "")


@contextlib.contextmanager
def _cancelled_on_exit(job: str, tell: Callable[[str], None]) -> Iterator[list[bool]]:
    """Cancels the job however this process stops waiting for it, unless True was put into the list before."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    keep: list[bool] = []
    try:
        yield keep
    finally:
        if not any(keep):
            with contextlib.suppress(DtrainError):
                run_client(["scancel", job], needed_for=_NEEDED_FOR)
            tell(f"job {job} was cancelled")
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def work_folder(runs: Path) -> Iterator[Path]:
    """Makes a folder for one examination among the runs, and takes it away again.

    Raises:
        UsageError: nothing can be written there.
    """
    with contextlib.ExitStack() as stack:
        try:
            runs.mkdir(parents=True, exist_ok=True)
            made = tempfile.TemporaryDirectory(prefix=".dtrain-doctor-", dir=runs, ignore_cleanup_errors=True)
            name = stack.enter_context(made)
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise UsageError(f"{runs}: cannot write there: {why}. Use another folder: run.dir=FOLDER.") from None
        yield Path(name)
