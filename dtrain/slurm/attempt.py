"""What a job's batch script runs on the first node: srun, and what is due when SLURM wants the job to end.

::

    SLURM: SIGUSR1 to this process, ahead of the time limit        (--signal=B:USR1@120; dtrain requeue, dtrain cancel)
    this process: SIGUSR1 to srun, which sends it to every task    (again and again: one that starts up may miss it)
    the ranks: stop after one and the same step, save, exit code 75
    this process: scontrol requeue
    SLURM: starts the job again, which goes on from the checkpoint
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dtrain.errors import EXIT_FAILED, DtrainError
from dtrain.launch.env.ports import quiet_port
from dtrain.launch.monitor.postmortem import last_checkpoint, read_failure
from dtrain.launch.nodes.secret import SECRET, SECRET_FILE, new_secret
from dtrain.launch.retries import progress, set_aside
from dtrain.layout import SLURM, STOP
from dtrain.rundir.job_record import CANCEL_NAME, JobAttempt, JobRecord, read_record, write_record
from dtrain.slurm.client import run_client
from dtrain.slurm.own_job import OwnJob, is_preempted, node_limit, nodes_answer
from dtrain.slurm.submission import word
from dtrain.slurm.verdict import (
    AWAIT,
    CANCEL,
    NODE_MAY_BE_LOST,
    REQUEUE,
    STOPPED,
    AttemptEnd,
    NextAction,
    given_up,
    verdict,
)

_POLL_SECONDS = 0.2
_AGAIN_SECONDS = 10.0  # between requests to ranks that have not stopped yet
_GONE_SECONDS = 60.0  # a job that has asked SLURM to end it waits for that


@dataclass
class SlurmSignals:
    """What SLURM asked of the batch script so far.

    Attributes:
        asked: to stop, and to start again: SIGUSR1.
        terminated: SLURM is ending the job: SIGTERM.
    """

    asked: bool = False
    terminated: bool = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[SlurmSignals]:
        """Notes them instead of dying of them."""
        numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(one, self._note) for one in numbers]
        try:
            yield self
        finally:
            for one, handler in zip(numbers, before, strict=True):
                signal.signal(one, handler)

    def _note(self, number: int, _frame: object) -> None:
        if number == signal.SIGUSR1:
            self.asked = True
        else:
            self.terminated = True


def run_attempt(  # noqa: PLR0913 - keyword-only
    command: Sequence[str],
    run: Path,
    place: OwnJob,
    *,
    signals: SlurmSignals,
    cap: int,
    environment: Mapping[str, str],
    say: Callable[[str], None],
) -> int:
    """Runs a job's ranks once, and does what is due when they have ended.

    Args:
        command: srun with all that it shall run.
        run: the folder of the run that they work on; the record of its job is kept there.
        place: the job.
        signals: hears what SLURM asks.
        cap: so many incarnations without progress are followed by another one.
        environment: the whole environment of srun.
        say: shows a line in the job's output.

    Returns:
        the exit code of the job.
    """
    record = read_record(run) or JobRecord(place.name, name=run.name)
    if record.job != place.name:
        record = replace(record, job=place.name, forgiven=len(record.incarnations))
        (run / SLURM / CANCEL_NAME).unlink(missing_ok=True)  # it was meant for another job
    before = progress(run)
    attempts_without_progress = record.without_progress(before)
    one = JobAttempt(place.restart, place.job_id, place.nodes, time.time(), progress=before)
    if attempts_without_progress > cap:
        return _refused(run, record, one, attempts_without_progress, say)
    record = replace(record.with_attempt(one), folder=str(Path.cwd()))
    write_record(run, record)
    set_aside(run, 1)
    say(f"job {place.name}, start {place.restart + 1}, on {place.nodes}: run {run}")
    code = _follow(command, environment, signals, say)
    ended = AttemptEnd(code, asked=signals.asked, terminated=signals.terminated, cap=cap)
    ended = _looked_at(ended, run, place, record)
    what = verdict(ended)
    say(f"{what.why} (exit code {code}); last checkpoint: {last_checkpoint(run) or 'none'}")
    record = read_record(run) or record  # what others wrote meanwhile is kept
    write_record(run, record.with_attempt(replace(one, ended=time.time(), code=code, why=what.why)))
    _carry_out(what, place, signals, say)
    return code


def _refused(
    run: Path, record: JobRecord, one: JobAttempt, attempts_without_progress: int, say: Callable[[str], None]
) -> int:
    why = f"giving up: {given_up(attempts_without_progress)}"
    write_record(run, record.with_attempt(replace(one, ended=time.time(), code=EXIT_FAILED, why=why)))
    say(f"{why}. Find the cause, then run: dtrain requeue {record.job}")
    return EXIT_FAILED


def _follow(
    command: Sequence[str], environment: Mapping[str, str], signals: SlurmSignals, say: Callable[[str], None]
) -> int:
    """Runs srun; passes requests to stop on; returns its exit code, as a shell would."""
    try:
        process = subprocess.Popen(list(command), env=dict(environment))
    except OSError as error:
        raise DtrainError(f"{command[0]}: cannot be started: {error.strerror}. Is it on PATH on this node?") from None
    next_time = 0.0
    while process.poll() is None:
        if signals.asked and not signals.terminated and time.monotonic() >= next_time:
            if not next_time:
                say("stop requested (SIGUSR1): the ranks are saving")
            next_time = time.monotonic() + _AGAIN_SECONDS
            process.send_signal(signal.SIGUSR1)
        time.sleep(_POLL_SECONDS)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _looked_at(ended: AttemptEnd, run: Path, place: OwnJob, record: JobRecord) -> AttemptEnd:
    """Adds what the run's folder and SLURM tell."""
    failure = read_failure(run)
    lost = failure is not None and failure["cause"] in NODE_MAY_BE_LOST and not ended.terminated
    return replace(
        ended,
        preempted=ended.code in STOPPED and not ended.asked and is_preempted(place.job_id),
        stop_file=(run / STOP).exists(),
        cancel_file=(run / SLURM / CANCEL_NAME).exists(),
        failure=failure,
        nodes_answer=lost and nodes_answer(place),
        without_progress=record.without_progress(progress(run)),
    )


def _carry_out(what: NextAction, place: OwnJob, signals: SlurmSignals, say: Callable[[str], None]) -> None:
    if what.action == AWAIT:
        _wait_for(lambda: signals.terminated, node_limit())
        if signals.terminated:
            return
    # By name: the number of an array's last task is that of the whole array, and scancel knows no other task's number.
    if what.action in (AWAIT, REQUEUE):
        _ask_slurm(["scontrol", "requeue", place.name], place, signals, say)
    elif what.action == CANCEL:
        _ask_slurm(["scancel", place.name], place, signals, say)


def _ask_slurm(argv: Sequence[str], place: OwnJob, signals: SlurmSignals, say: Callable[[str], None]) -> None:
    """Has SLURM end this job, and waits for that; where SLURM refuses, the job just ends."""
    try:
        run_client(argv, needed_for="a job that is to be started again")
    except DtrainError as error:
        if signals.terminated:  # it came at once, before the command had ended
            return
        say(f"{error}\nresume with: dtrain requeue {place.name}")
        return
    _wait_for(lambda: signals.terminated, _GONE_SECONDS)


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def named(command: Sequence[str], words: Sequence[str], run: Path) -> tuple[list[str], dict[str, str]]:
    """Returns srun's command, and variables, so that each start of the job finds its run.

    The name is added to the words of `dtrain train`, with which the command ends in the batch scripts that dtrain
    brings; so no program that a rank starts inherits it. Where a script ends otherwise, a variable has it.

    Args:
        command: as the batch script has it.
        words: of `dtrain train`; they name no run.
        run: the run's folder.
    """
    if "train" in command and [*command[len(command) - len(words) :]] == [*words]:
        return [*command, word("run.name", run.name)], {}
    return list(command), {"DTRAIN_RUN__NAME": run.name}


def environment_of(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns the environment for srun: that of the batch script, which srun hands on to each task.

    It does so also at sites that submit with --export=NONE, where the script has readied it and nothing else has. With
    it goes a new secret, by which the nodes' launchers and ranks know each other, where the user gave none (other users
    cannot read a process's environment), and a port that is free on this node, which is the first one.

    Args:
        environ: by default this process's.
    """
    env = dict(os.environ if environ is None else environ)
    given = env.get(SECRET) or env.get(SECRET_FILE)
    made = {} if given else {SECRET: new_secret()}
    if not env.get("MASTER_PORT"):
        made["MASTER_PORT"] = str(quiet_port())
    return env | made | {"SLURM_EXPORT_ENV": "ALL"}
