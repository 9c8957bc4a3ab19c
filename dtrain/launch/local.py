"""Starts this machine's ranks, watches them, and ends all when one fails, here or on another node."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from dtrain.errors import EXIT_OK
from dtrain.launch.hangs import HangWatch
from dtrain.launch.job import Job
from dtrain.launch.meeting import Meeting, Stopped, Word, meet
from dtrain.launch.output import Output
from dtrain.launch.ports import free_port
from dtrain.launch.postmortem import PostMortem, Seen
from dtrain.launch.reaper import Reaper
from dtrain.launch.relay import Relayed
from dtrain.launch.reports import named_run, read_reports
from dtrain.launch.stacks import raw_crash_text

_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.05
_LAUNCH = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Ending:
    """How a job of local ranks ended.

    Attributes:
        exit_code: 0 where all ranks ended with 0, else that of the rank that failed first; 130 after Ctrl-C,
            128 + N after another signal.
        text: what a person shall read of it; empty where all went well.
        signal: what stopped the job from outside, or None.
        when: seconds since the epoch.
    """

    exit_code: int
    text: str = ""
    signal: int | None = None
    when: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Ranks:
    """The ranks that run on this node.

    Attributes:
        first: the global number of the first one.
        processes: they themselves.
        reports: the folder where each leaves a word when it ends.
    """

    first: int
    processes: list[subprocess.Popen[bytes]]
    reports: Path

    def numbered(self) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
        """Yields each rank's global number and process."""
        return enumerate(self.processes, start=self.first)


def dtrain_argv(arguments: Sequence[str]) -> list[str]:
    """Returns what follows the interpreter's name to run `dtrain ARGUMENTS`."""
    return [str(_LAUNCH.parent / "__main__.py"), *arguments]


def script_argv(script: str, arguments: Sequence[str]) -> list[str]:
    """Returns what follows the interpreter's name to run a user's script as a rank that reports its end."""
    return [str(_LAUNCH / "script_runner.py"), script, *arguments]


def start_local_ranks(
    argv: Sequence[str], size: int, environment: dict[str, str] | None = None, *, hang_seconds: float = 0.0
) -> int:
    """Runs `python ARGV` as ranks here, prints why they failed where they did, and returns the exit code.

    The arguments are those of `run_local_ranks`.
    """
    return told(run_local_ranks(argv, size, environment, hang_seconds=hang_seconds))


def told(ending: Ending) -> int:
    """Prints why a job did not end well, where it did not, and returns its exit code."""
    if ending.text:
        print(ending.text, file=sys.stderr)  # noqa: T201
    return ending.exit_code


def run_local_ranks(
    argv: Sequence[str],
    size: int,
    environment: dict[str, str] | None = None,
    *,
    relayed: bool = False,
    hang_seconds: float = 0.0,
) -> Ending:
    """Runs `python ARGV` as ranks 0 to size - 1 here and waits for them.

    Args:
        argv: what follows the interpreter's name; a program that leaves a report when it ends (`dtrain_argv`,
            `script_argv`), since an end without a word counts as a failure.
        size: number of ranks, at least 1.
        environment: further variables for every rank.
        relayed: the ranks' output goes through this process's sys.stdout and sys.stderr, and they have no input;
            else through its file descriptors, and rank 0 has its input.
        hang_seconds: how long a rank may stand still; 0 is for ever. See `dtrain.launch.hangs`.
    """
    job = Job(size, port=free_port(), environment=environment or {}, hang_seconds=hang_seconds)
    return run_job(argv, job, relayed=relayed)


def run_job(argv: Sequence[str], job: Job, about: Mapping[str, str] | None = None, *, relayed: bool = False) -> Ending:
    """Runs this node's part of a job: meets the other nodes, starts the ranks, and waits until all have ended.

    Args:
        argv: as for `run_local_ranks`.
        job: this node's part; of several nodes' job the port of rank 0's store is chosen here.
        about: what must be the same on all nodes; see `meeting.meet`.
        relayed: as for `run_local_ranks`.

    Raises:
        WorldError: the nodes did not come together.
    """
    with signals_caught() as caught:
        if job.nodes == 1:
            return _run_part(argv, job, None, caught, relayed=relayed)
        try:
            meeting = meet(job, about or {}, caught)
        except Stopped:
            return _stopped(caught)
        with contextlib.closing(meeting):
            return _run_part(argv, meeting.job, meeting, caught, relayed=relayed)


def _run_part(argv: Sequence[str], job: Job, meeting: Meeting | None, caught: list[int], *, relayed: bool) -> Ending:
    reaper: Reaper | None = None
    with tempfile.TemporaryDirectory(prefix="dtrain-") as name:
        ranks = Ranks(job.first_rank, [], Path(name))
        output = Relayed() if relayed else Output(lambda: job.log_dir or _runs_logs(ranks.reports), caught)
        hangs = HangWatch(ranks.reports, job.hang_seconds, alone=job.nodes == 1)
        post_mortem = PostMortem(ranks.reports, range(job.first_rank, job.first_rank + job.ranks))
        try:
            for local_rank in range(job.ranks):
                stdout, stderr = output.channels(job.first_rank + local_rank)
                environment = job.rank_environment(local_rank, name) | dict(output.environment)
                ranks.processes.append(_start(argv, environment, stdout, stderr, has_input=not relayed))
            output.start(ranks.processes)
            reaper = Reaper([process.pid for process in ranks.processes])
            seen, word = _watch(ranks, caught, meeting, hangs, output.wait)
        finally:
            _end(ranks.processes)
            if reaper is not None:
                reaper.dismiss()
            output.close({rank: raw_crash_text(ranks.reports, rank) for rank, _ in ranks.numbered()})
        ending = _ending(seen, post_mortem, caught)
        ending = ending if meeting is None else _joint_ending(ending, word, meeting)
        if ending.text:
            output.end_lines()
        return ending


def _runs_logs(reports: Path) -> Path | None:
    """Returns the folder of the ranks' logs in the run's folder, as soon as the run has one on this machine."""
    run = named_run(reports)
    return run / "logs" if run is not None and run.is_dir() else None


def rank_environment(rank: int, size: int, port: int, reports: str) -> dict[str, str]:
    """Returns the whole environment of one of `size` local ranks; a user's own values are kept."""
    return Job(size, port=port).rank_environment(rank, reports)


def _start(
    argv: Sequence[str], environment: Mapping[str, str], stdout: int, stderr: int, *, has_input: bool
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *argv],
        env=dict(environment),
        stdin=None if environment["RANK"] == "0" and has_input else subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        # A terminal's Ctrl-C must come through the supervisor once, not to every rank besides.
        start_new_session=True,
    )


@contextlib.contextmanager
def signals_caught() -> Iterator[list[int]]:
    """Notes SIGINT, SIGTERM and SIGHUP instead of dying of them.

    Signals are the main thread's alone; in any other there is nothing to note.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, _frame: FrameType | None) -> None:
        caught.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(
    ranks: Ranks,
    caught: list[int],
    meeting: Meeting | None,
    hangs: HangWatch,
    wait: Callable[[float], None],
) -> tuple[Seen, Word | None]:
    """Waits until all ranks of all nodes ended well, one failed, one hangs, or a signal came.

    Args:
        ranks: this node's.
        caught: gets the signals that come.
        meeting: the other nodes' launchers, or None without other nodes.
        hangs: tells when this node's ranks stand still.
        wait: lets some seconds pass, at most.

    Returns:
        what was seen of this node's ranks; and how another node's part failed, if that is what ended the job.
    """
    done, all_ran = False, 0.0
    while not caught:
        now = time.time()
        ended = {rank: code for rank, one in ranks.numbered() if (code := one.poll()) is not None}
        heard = {report.rank for report in read_reports(ranks.reports)}
        # Each rank leaves word, well or not: one that ended without it did not end well.
        silent = tuple(rank for rank in ended if rank not in heard)
        if silent or any(ended.values()):
            return Seen(ended, silent, all_ran=all_ran), None
        if len(ended) == len(ranks.processes) and not done:
            if meeting is None:
                break
            meeting.tell(EXIT_OK)
            done = True
        if meeting is not None and ((word := meeting.news()) is not None or (done and meeting.over())):
            return Seen(), word
        hang = hangs.check({rank: one.pid for rank, one in ranks.numbered() if rank not in ended})
        if hang is not None:
            return Seen(ended, hang=hang), None
        all_ran = now if not ended else all_ran
        wait(_POLL_SECONDS)
    return Seen(), None


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Ends what still runs: SIGTERM, and SIGKILL to the whole process group after a grace."""
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
            rank.send_signal(signal.SIGCONT)  # one that is stopped would not hear the other
    deadline = time.monotonic() + _GRACE_SECONDS
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)  # its DataLoader workers included
        rank.wait()


def _ending(seen: Seen, post_mortem: PostMortem, caught: list[int]) -> Ending:
    """Tells why this node's ranks ended, with the exit code of the first cause."""
    if caught:
        return _stopped(caught)
    verdict = post_mortem.verdict(seen)
    return Ending(verdict.exit_code, verdict.text, when=verdict.when)


def _stopped(caught: list[int]) -> Ending:
    name = signal.Signals(caught[0]).name
    return Ending(128 + caught[0], f"dtrain: stopped by {name}; all ranks are ended.", caught[0])


def _joint_ending(ending: Ending, word: Word | None, meeting: Meeting) -> Ending:
    """Tells the other nodes how this one ended, and puts what another one said before it where that came first."""
    if ending.signal is None and ending.exit_code != EXIT_OK:
        word = meeting.last_words()
    if ending.exit_code != EXIT_OK:
        meeting.tell(ending.exit_code, ending.text, ending.when)
    elif word is not None:
        meeting.pass_on(word)
    if word is None or (ending.exit_code != EXIT_OK and word.when >= ending.when):
        return ending
    text = word.text if word.lost else f"on node {word.node}: {word.text}"
    return Ending(word.exit_code, f"{text}\non this node: {ending.text}" if ending.text else text)
