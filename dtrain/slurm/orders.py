"""Ends a job, or has it started again, from outside: with a checkpoint first, where it runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dtrain.errors import SlurmError, UsageError
from dtrain.files import make_folder, open_below
from dtrain.launch.monitor.postmortem import last_checkpoint
from dtrain.layout import CONFIG, SCRIPT, SLURM, STOP
from dtrain.rundir.job_record import CANCEL_NAME, JobRecord, read_record, write_record
from dtrain.slurm.client import TIMEOUT_SECONDS, NoAnswerError, run_client, submit
from dtrain.slurm.runs import RunJob, refreshed

_SOME_IDS = 200  # in one call
_SIGNAL_SECONDS = 5.0  # scancel's own pause before it tries again
_SETTLE_SECONDS, _POLL_SECONDS = 20.0, 0.5  # a job that is on its way out soon waits again, or has ended


def cancel(jobs: Sequence[RunJob], say: Callable[[str], object], *, now: bool) -> None:
    """Ends jobs for good; those that run save first.

    Args:
        jobs: what to end, as it was a moment ago.
        say: gets a line for a person on each.
        now: end them at once; of what has not been saved, SLURM's own time of grace (KillWait) may still be enough.

    Raises:
        UsageError: one runs, is not a dtrain run, and shall save first.
        SlurmError: SLURM did not do it.
    """
    for one in [one for one in jobs if one.is_over]:
        say(f"{one.words}: has already ended ({one.state}).")
    left = [one for one in jobs if not one.is_over]
    for one in left:
        if one.job is not None and one.job.runs and one.run is None and not now:
            raise UsageError(f"{one.words}: is not a dtrain run, and would not save first. Use --now to cancel it.")
    _note_cancel(left)
    if not now:
        _cancel_saved(left, say)
        return
    _scancel([one.id for one in left])
    for one in left:
        say(f"{one.words}: cancelled.{_later(one)}")


def _cancel_saved(left: Sequence[RunJob], say: Callable[[str], object]) -> None:
    """What waits is cancelled first, since a task that ends makes room for the next one of its array."""
    deadline, refusal = time.monotonic() + _SETTLE_SECONDS, ""
    while left:
        try:
            # Without scancel's --state=PENDING: given a task, it would cancel all tasks of its array that wait. One
            # that starts just now has nothing to save yet.
            _scancel([one.id for one in left if one.job is not None and one.job.waits])
        except SlurmError as error:
            refusal = f" {error}."
        _end_running([one for one in left if one.state == "RUNNING"], say)
        left = refreshed([one for one in left if one.state != "RUNNING"], needed_for="dtrain cancel")
        for one in [one for one in left if one.is_over]:
            say(f"{one.words}: cancelled; it was pending, or about to restart.{_later(one)}")
        left = [one for one in left if not one.is_over]
        if left and time.monotonic() > deadline:
            names = ", ".join(f"{one.id} ({one.state})" for one in left)
            raise SlurmError(f"{names}: not cancelled within {_SETTLE_SECONDS:g} s.{refusal} Try again, or use --now.")
        time.sleep(_POLL_SECONDS if left else 0)


def requeue(one: RunJob, say: Callable[[str], object], *, complete: bool) -> None:
    """Has a run start again: one that runs saves first.

    Args:
        one: the run, as it was a moment ago.
        say: gets a line for a person.
        complete: whether the run has done all its epochs.

    Raises:
        UsageError: it is no run, complete, or was stopped for good by its STOP file.
        SlurmError: SLURM did not do it.
    """
    run = one.run
    if run is None:
        raise UsageError(f"{one.words}: is not a dtrain run. Use SLURM's own command: scontrol requeue {one.id}")
    one = _settled(one)
    if one.job is not None and one.job.waits:
        say(f"{one.words}: is already pending: {one.why or one.state}.")
        return
    stop = run / STOP
    if stop.exists():
        raise UsageError(f"{one.words}: {stop} marks the run as stopped for good. Remove that file first.")
    if complete and one.is_over:
        raise UsageError(f"{one.words}: is complete. To train more epochs, submit it with epochs=N.")
    _forget_cancel(run)
    if not one.is_over:
        say(f"{one.words}: {_start_running_again(one)}")
        return
    _start_again(one, run, say)


def _start_again(one: RunJob, run: Path, say: Callable[[str], object]) -> None:
    record = one.record or JobRecord(one.id, name=run.name)
    # Starts without progress are counted anew: a person has looked at it.
    record = replace(record, forgiven=len(record.incarnations))
    at = (
        f" It resumes from {saved}."
        if (saved := last_checkpoint(run))
        else " It starts from scratch: there is no checkpoint."
    )
    if one.job is not None and one.job.source == "squeue":
        write_record(run, record)
        try:
            run_client(["scontrol", "requeue", one.id], needed_for="dtrain requeue")
        except SlurmError as error:
            say(f"{one.words}: {error}; submitting it again.")
        else:
            say(f"{one.words}: is queued to restart.{at}")
            return
    job = _submit_again(one, run, record)
    present = read_record(run) or record  # the job may have begun to write
    output = _output(record, one.id, job)
    new = replace(present, job=job, submitted=time.time(), output=output, forgiven=record.forgiven)
    write_record(run, new)
    say(f"{one.words}: SLURM no longer knows it; submitted again as job {job}.{at}")


def _submit_again(one: RunJob, run: Path, record: JobRecord) -> str:
    """Submits the script of a run again; returns the job's id."""
    script = Path(record.script) if record.script is not None else run / SLURM / SCRIPT
    if not script.is_file():
        raise UsageError(
            f"{one.words}: SLURM no longer knows it, and its batch script is missing: {script}. Submit the "
            f"run's config again: dtrain submit {run / CONFIG}"
        )
    _, _, task = one.id.partition("_")
    job = submit(script, cwd=_work_dir(one), options=[f"--array={task}"] if task else [], needed_for="dtrain requeue")
    return f"{job}_{task}" if task else job


def _output(record: JobRecord, old: str, new: str) -> str | None:
    """Where the output of a job goes that was submitted again; None where it is left to SLURM to tell."""
    path = Path(record.output) if record.output is not None else None
    return str(path.with_name(f"job-{new}.out")) if path is not None and path.name == f"job-{old}.out" else None


def _work_dir(one: RunJob) -> Path:
    """Where the job ran, since the script may name files from there; where that is not known, here."""
    known = (one.job.folder if one.job is not None else "") or (one.record.folder if one.record is not None else None)
    return Path(known) if known else Path.cwd()


def _settled(one: RunJob) -> RunJob:
    """Returns a run once its job is not on its way out any more, which takes a moment."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while one.state == "COMPLETING" and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        (one,) = refreshed([one], needed_for="dtrain requeue")
    return one


def _end_running(jobs: Sequence[RunJob], say: Callable[[str], object]) -> None:
    hearing = [one for one in jobs if listens(one)]
    deaf = [one for one in jobs if one not in hearing]
    _scancel([one.id for one in deaf])
    for one in deaf:
        say(f"{one.words}: cancelled; it had just started, or was about to end.{_later(one)}")
    _ask([one.id for one in hearing])
    for one in hearing:
        say(
            f"{one.words}: asked to save and stop; follow it with dtrain logs {one.id} "
            f"-f. If it does not stop: dtrain cancel {one.id} --now.{_later(one)}"
        )


def _start_running_again(one: RunJob) -> str:
    """Has a job that runs start again; returns what was done, in words."""
    if not listens(one):
        run_client(["scontrol", "requeue", one.id], needed_for="dtrain requeue")
        return "requeued; it had just started, or was about to end."
    _ask([one.id])
    return f"asked to save, then requeued. Follow it with dtrain logs {one.id} -f."


def listens(one: RunJob) -> bool:
    """Whether the batch script of a job that runs has got to where it hears a request, which takes some seconds.

    Before, the signal would end it, and SLURM would call the job failed.
    """
    record = read_record(one.run) if one.run is not None else None
    if record is None or not record.incarnations or one.job is None:
        return False
    last = record.incarnations[-1]
    return last.ended is None and last.job_id == one.job.number and one.job.restarts in (None, last.restart)


def _ask(ids: Sequence[str]) -> None:
    """Asks jobs' batch scripts to have the ranks save and stop; what they do then, the file `cancel` tells them."""
    try:
        _scancel(ids, "--batch", "--signal=USR1", seconds=_SIGNAL_SECONDS)
    except NoAnswerError:
        # As long as other tasks of an array wait, slurmctld passes the signal on and yet reports a failure, by which
        # scancel sends it again and again, for a minute. slurmctld was there a moment ago, so the first one has come.
        if not any("_" in one for one in ids):
            raise


def _note_cancel(jobs: Sequence[RunJob]) -> None:
    """Tells the batch scripts, and `dtrain jobs`: of a waiting task that is cancelled SLURM itself keeps no trace."""
    for run in [one.run for one in jobs if one.run is not None]:
        make_folder(run, SLURM)
        os.close(open_below(run, f"{SLURM}/{CANCEL_NAME}", os.O_WRONLY | os.O_CREAT))


def _forget_cancel(run: Path) -> None:
    (run / SLURM / CANCEL_NAME).unlink(missing_ok=True)


def _scancel(ids: Sequence[str], *options: str, seconds: float = TIMEOUT_SECONDS) -> None:
    for start in range(0, len(ids), _SOME_IDS):
        some = ids[start : start + _SOME_IDS]
        run_client(["scancel", *options, *some], needed_for="dtrain cancel and requeue", seconds=seconds)


def _later(one: RunJob) -> str:
    """How to go on with a run some other time."""
    return f" To resume later: dtrain requeue {one.handle}" if one.run is not None else ""
