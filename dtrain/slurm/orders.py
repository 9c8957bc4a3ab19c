"""Ends a job, or has it started again, from outside: with a checkpoint first, where it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dtrain.errors import SlurmError, UsageError
from dtrain.launch.postmortem import last_checkpoint
from dtrain.launch.requests import FILE_NAME as STOP_FILE
from dtrain.slurm.client import TIMEOUT_SECONDS, NoAnswerError, run_client, submit
from dtrain.slurm.record import CANCEL_NAME, FOLDER, SCRIPT_NAME, Record, read_record, write_record
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
        UsageError: one runs, is no run of dtrain's, and shall save first.
        SlurmError: SLURM did not do it.
    """
    for one in [one for one in jobs if one.is_over]:
        say(f"{one.words}: is over already ({one.state}).")
    left = [one for one in jobs if not one.is_over]
    for one in left:
        if one.job is not None and one.job.runs and one.run is None and not now:
            raise UsageError(f"{one.words}: is no run of dtrain's, and would not save first. Give --now to end it.")
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
            say(f"{one.words}: cancelled; it had not started, or was about to start again.{_later(one)}")
        left = [one for one in left if not one.is_over]
        if left and time.monotonic() > deadline:
            names = ", ".join(f"{one.id} ({one.state})" for one in left)
            raise SlurmError(f"{names}: not cancelled within {_SETTLE_SECONDS:g} s.{refusal} Try again, or give --now.")
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
        raise UsageError(f"{one.words}: is no run of dtrain's. SLURM's own command is: scontrol requeue {one.id}")
    one = _settled(one)
    if one.job is not None and one.job.waits:
        say(f"{one.words}: waits already: {one.why or one.state}.")
        return
    stop = run / STOP_FILE
    if stop.exists():
        raise UsageError(f"{one.words}: {stop} says that it has stopped for good. Remove that file first.")
    if complete and one.is_over:
        raise UsageError(
            f"{one.words}: is complete; there is nothing to go on with. More epochs: submit it with epochs=N."
        )
    _forget_cancel(run)
    if not one.is_over:
        say(f"{one.words}: {_start_running_again(one)}")
        return
    _start_again(one, run, say)


def _start_again(one: RunJob, run: Path, say: Callable[[str], object]) -> None:
    record = one.record or Record(one.id, name=run.name)
    # Starts without progress are counted anew: a person has looked at it.
    record = replace(record, forgiven=len(record.incarnations))
    at = f" It goes on from {saved}." if (saved := last_checkpoint(run)) else " It begins anew: it had no checkpoint."
    if one.job is not None and one.job.source == "squeue":
        write_record(run, record)
        try:
            run_client(["scontrol", "requeue", one.id], needed_for="dtrain requeue")
        except SlurmError as error:
            say(f"{one.words}: {error}; it is submitted anew.")
        else:
            say(f"{one.words}: waits to start again.{at}")
            return
    job = _submit_again(one, run, record)
    present = read_record(run) or record  # the job may have begun to write
    output = _output(record, one.id, job)
    new = replace(present, job=job, submitted=time.time(), output=output, forgiven=record.forgiven)
    write_record(run, new)
    say(f"{one.words}: SLURM no longer has it; submitted again as job {job}.{at}")


def _submit_again(one: RunJob, run: Path, record: Record) -> str:
    """Submits the script of a run again; returns the job's id."""
    script = Path(record.script) if record.script is not None else run / FOLDER / SCRIPT_NAME
    if not script.is_file():
        raise UsageError(
            f"{one.words}: SLURM no longer has it, and the script that was submitted is not there: {script}. "
            f"Submit the run's config anew: dtrain submit {run / 'config.yaml'}"
        )
    _, _, task = one.id.partition("_")
    job = submit(script, cwd=_work_dir(one), options=[f"--array={task}"] if task else [], needed_for="dtrain requeue")
    return f"{job}_{task}" if task else job


def _output(record: Record, old: str, new: str) -> str | None:
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
        say(f"{one.words}: cancelled; it had only just started, or was about to end.{_later(one)}")
    _ask([one.id for one in hearing])
    for one in hearing:
        say(
            f"{one.words}: asked to save and to end; dtrain logs {one.id} -f shows it. "
            f"If it does not: dtrain cancel {one.id} --now.{_later(one)}"
        )


def _start_running_again(one: RunJob) -> str:
    """Has a job that runs start again; returns what was done, in words."""
    if not listens(one):
        run_client(["scontrol", "requeue", one.id], needed_for="dtrain requeue")
        return "starts again; it had only just started, or was about to end."
    _ask([one.id])
    return f"asked to save; then it starts again. dtrain logs {one.id} -f shows it."


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
        (run / FOLDER).mkdir(exist_ok=True)
        (run / FOLDER / CANCEL_NAME).touch()


def _forget_cancel(run: Path) -> None:
    (run / FOLDER / CANCEL_NAME).unlink(missing_ok=True)


def _scancel(ids: Sequence[str], *options: str, seconds: float = TIMEOUT_SECONDS) -> None:
    for start in range(0, len(ids), _SOME_IDS):
        some = ids[start : start + _SOME_IDS]
        run_client(["scancel", *options, *some], needed_for="dtrain cancel and requeue", seconds=seconds)


def _later(one: RunJob) -> str:
    """How to go on with a run some other time."""
    return f" To go on later: dtrain requeue {one.handle}" if one.run is not None else ""
