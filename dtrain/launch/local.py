"""Starts this machine's ranks, watches them, and ends all when one fails, here or on another node."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dtrain.errors import EXIT_OK, EXIT_STOPPED
from dtrain.launch.hangs import HangWatch
from dtrain.launch.job import Job
from dtrain.launch.left import reports_folder
from dtrain.launch.meeting import Meeting, Stopped, Word, meet
from dtrain.launch.output import Output
from dtrain.launch.ports import free_port
from dtrain.launch.postmortem import Failure, PostMortem, Seen
from dtrain.launch.reaper import Reaper
from dtrain.launch.relay import Relayed
from dtrain.launch.reports import named_run, read_reports, words_on_alone
from dtrain.launch.requests import kept_for_later
from dtrain.launch.stacks import raw_crash_text
from dtrain.launch.stopping import Orders, signals_caught

_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.05
_ECHO_SECONDS = _GRACE_SECONDS + 1.0
_LAUNCH = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Ending:
    """How a job of local ranks ended.

    Attributes:
        exit_code: 0 where all ranks ended with 0, 75 where they stopped on request, else that of the rank that failed
            first; 130 after Ctrl-C, 128 + N after another signal that ended them.
        text: what a person shall read of it; empty where all went well, but for a warning.
        signal: what stopped the job from outside, or None.
        when: seconds since the epoch.
        run: the folder of the run that the ranks worked on, where they named one.
        failure: what `failure.json` shall hold, None where there is nothing.
        ended: rank -> how it ended, of this node's.
    """

    exit_code: int
    text: str = ""
    signal: int | None = None
    when: float = field(default_factory=time.time)
    run: Path | None = None
    failure: Failure | None = None
    ended: Mapping[str, str] = field(default_factory=dict)

    def word(self, node: int) -> Word:
        """Returns the same for the launchers of the other nodes."""
        failure = None if self.failure is None else asdict(self.failure)
        return Word(node, self.exit_code, self.text, self.when, failure=failure, ended=dict(self.ended))


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


def start_local_ranks(argv: Sequence[str], size: int, environment: dict[str, str] | None = None, **more: Any) -> int:
    """Runs `python ARGV` as ranks here, prints why they failed where they did, and returns the exit code.

    The arguments are those of `run_local_ranks`.
    """
    return told(run_local_ranks(argv, size, environment, **more))


def told(ending: Ending) -> int:
    """Prints why a job did not end well, where it did not, and returns its exit code."""
    if ending.text:
        print(ending.text, file=sys.stderr)  # noqa: T201
    return ending.exit_code


def run_local_ranks(  # noqa: PLR0913 - keyword-only
    argv: Sequence[str],
    size: int,
    environment: dict[str, str] | None = None,
    *,
    relayed: bool | Callable[[], None] = False,
    hang_seconds: float | None = None,
    stop_seconds: float | None = None,
    caught: Sequence[int] = (),
) -> Ending:
    """Runs `python ARGV` as ranks 0 to size - 1 here and waits for them.

    Args:
        argv: what follows the interpreter's name; a program that leaves a report when it ends (`dtrain_argv`,
            `script_argv`), since an end without a word counts as a failure.
        size: number of ranks, at least 1.
        environment: further variables for every rank.
        relayed: the ranks' output goes through this process's sys.stdout and sys.stderr, and they have no input;
            else through its file descriptors, and rank 0 has its input. A function is called again and again besides.
        hang_seconds: how long a rank may stand still; 0 is for ever, and None says nothing. See `dtrain.launch.hangs`.
        stop_seconds: how long ranks may take to stop on request; None where the program does not know how to.
        caught: signals that came before this.
    """
    job = Job(
        size, port=free_port(), environment=environment or {}, hang_seconds=hang_seconds, stop_seconds=stop_seconds
    )
    return run_job(argv, job, relayed=relayed, caught=caught)


def run_job(
    argv: Sequence[str],
    job: Job,
    about: Mapping[str, str] | None = None,
    *,
    relayed: bool | Callable[[], None] = False,
    caught: Sequence[int] = (),
) -> Ending:
    """Runs this node's part of a job: meets the other nodes, starts the ranks, and waits until all have ended.

    Args:
        argv: as for `run_local_ranks`.
        job: this node's part; of several nodes' job the port of rank 0's store is chosen here.
        about: what must be the same on all nodes; see `meeting.meet`.
        relayed: as for `run_local_ranks`.
        caught: signals that came before this.

    Raises:
        WorldError: the nodes did not come together.
    """
    with signals_caught(stoppable=job.stop_seconds is not None, before=caught) as signals:
        if job.nodes == 1:
            return _run_part(argv, job, None, signals, relayed=relayed)
        try:
            meeting = meet(job, about or {}, signals)
        except Stopped:
            return _stopped(signals[0])
        with contextlib.closing(meeting):
            return _run_part(argv, meeting.job, meeting, signals, relayed=relayed)


def _run_part(
    argv: Sequence[str], job: Job, meeting: Meeting | None, caught: Sequence[int], *, relayed: bool | Callable[[], None]
) -> Ending:
    reaper: Reaper | None = None
    with reports_folder() as name:
        ranks = Ranks(job.first_rank, [], Path(name))
        orders = Orders(caught, job.stop_seconds, ranks.reports)
        output = Relayed(relayed) if relayed else Output(lambda: job.log_dir or _runs_logs(ranks.reports), orders.ends)
        hangs = HangWatch(ranks.reports, job.hang_seconds or 0.0, alone=job.nodes == 1)
        post_mortem = PostMortem(ranks.reports, range(job.first_rank, job.first_rank + job.ranks))
        try:
            for local_rank in range(job.ranks):
                stdout, stderr = output.channels(job.first_rank + local_rank)
                environment = job.rank_environment(local_rank, name) | dict(output.environment)
                with contextlib.nullcontext() if job.stop_seconds is None else kept_for_later():
                    ranks.processes.append(_start(argv, environment, stdout, stderr, has_input=not relayed))
            output.start(ranks.processes)
            reaper = Reaper([process.pid for process in ranks.processes])
            seen, word = _watch(ranks, orders, meeting, hangs, output.wait)
        finally:
            _end(ranks.processes, politely=job.stop_seconds is None)
            if reaper is not None:
                reaper.dismiss()
            output.close({rank: raw_crash_text(ranks.reports, rank) for rank, _ in ranks.numbered()})
        ending = _ending(seen, post_mortem, orders, ranks)
        ending = ending if meeting is None else _joint_ending(ending, word, meeting)
        if ending.failure is not None and job.first_rank == 0:  # rank 0's node has the run's folder
            ending = replace(ending, text="\n".join([ending.text, *post_mortem.leave(ending.failure)]))
        if ending.exit_code == EXIT_OK and job.first_rank == 0:
            ending = replace(ending, text=words_on_alone(read_reports(ranks.reports), job.nodes * job.ranks))
        if ending.text:
            output.end_lines()
        return replace(ending, run=named_run(ranks.reports))


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


def _watch(
    ranks: Ranks,
    orders: Orders,
    meeting: Meeting | None,
    hangs: HangWatch,
    wait: Callable[[float], None],
) -> tuple[Seen, Word | None]:
    """Waits until all ranks of all nodes ended well, one failed, one hangs, or a signal came.

    Args:
        ranks: this node's.
        orders: what the signals that come ask for.
        meeting: the other nodes' launchers, or None without other nodes.
        hangs: tells when this node's ranks stand still.
        wait: lets some seconds pass, at most.

    Returns:
        what was seen of this node's ranks; and how another node's part failed, if that is what ended the job.
    """
    done, all_ran = False, 0.0
    while not orders.end_now({rank: one for rank, one in ranks.numbered() if one.poll() is None}):
        now = time.time()
        ended = {rank: code for rank, one in ranks.numbered() if (code := one.poll()) is not None}
        heard = {report.rank for report in read_reports(ranks.reports)}
        # Each rank leaves word, well or not: one that ended without it did not end well.
        silent = tuple(rank for rank in ended if rank not in heard)
        if silent or not all(orders.ended_well(code) for code in ended.values()):
            return Seen(ended, silent, all_ran=all_ran), None
        if len(ended) == len(ranks.processes) and not done:
            if meeting is None:
                break
            meeting.tell(Word(meeting.job.node_rank, EXIT_OK, "", now))
            done = True
        if meeting is not None and ((word := meeting.news()) is not None or (done and meeting.over())):
            return Seen(), word
        hang = hangs.check({rank: one.pid for rank, one in ranks.numbered() if rank not in ended})
        if hang is not None:
            return Seen(ended, hang=hang), None
        all_ran = now if not ended else all_ran
        wait(_POLL_SECONDS)
    return Seen(), None


def _end(ranks: list[subprocess.Popen[bytes]], *, politely: bool) -> None:
    """Ends what still runs: SIGTERM, and SIGKILL to the whole process group after a grace.

    A rank that takes SIGTERM for a request to stop gets SIGKILL at once.
    """
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGTERM if politely else signal.SIGKILL)
            rank.send_signal(signal.SIGCONT)  # one that is stopped would not hear the other
    deadline = time.monotonic() + _GRACE_SECONDS
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)  # its DataLoader workers included
        rank.wait()


def _ending(seen: Seen, post_mortem: PostMortem, orders: Orders, ranks: Ranks) -> Ending:
    """Tells why this node's ranks ended, with the exit code of the first cause."""
    if orders.ends:
        return _stopped(orders.ends[0], late=orders.late)
    codes = {one.poll() for one in ranks.processes}
    if EXIT_STOPPED in codes and all(orders.ended_well(code) for code in codes):
        return Ending(EXIT_STOPPED, next(report.text for report in read_reports(ranks.reports) if report.text))
    verdict = post_mortem.verdict(seen)
    return Ending(verdict.exit_code, verdict.text, when=verdict.when, failure=verdict.failure, ended=verdict.ended)


def _stopped(number: int, *, late: bool = False) -> Ending:
    why = "; they did not stop by themselves in time (train.stop_seconds)" if late else ""
    return Ending(128 + number, f"dtrain: stopped by {signal.Signals(number).name}; all ranks are ended{why}.", number)


def _joint_ending(ending: Ending, word: Word | None, meeting: Meeting) -> Ending:
    """Tells the other nodes how this one ended, and puts what another one said before it where that came first."""
    mine = ending.word(meeting.job.node_rank)
    well = ending.exit_code in (EXIT_OK, EXIT_STOPPED)  # each node's own ranks have stopped
    if not well:
        meeting.tell(mine)
        if ending.signal is None:  # where this is an echo, the cause comes once that node has ended its ranks
            word = meeting.last_words(_ECHO_SECONDS) if mine.order[0] else meeting.last_words()
    elif word is None:
        return ending
    else:
        meeting.pass_on(word)
        meeting.tell(replace(mine, exit_code=word.exit_code, text=""))
    others = {**(meeting.ended(_ECHO_SECONDS) if mine.node == 0 else {}), **ending.ended}
    if word is None or (not well and word.order >= mine.order):
        return replace(ending, failure=_with_others(ending.failure, others))
    text = word.text if word.lost else f"on node {word.node}: {word.text}"
    failure = None if word.failure is None else _with_others(Failure(**word.failure), others)
    if ending.text and not mine.order[0]:
        text = f"{text}\non this node: {ending.text}"
    return Ending(word.exit_code, text, when=word.when, failure=failure)


def _with_others(failure: Failure | None, others: Mapping[str, str]) -> Failure | None:
    """Adds how ranks of all nodes ended."""
    if failure is None:
        return None
    told = {**others, **failure.others}
    told.pop(str(failure.rank), None)
    return replace(failure, others=dict(sorted(told.items(), key=lambda one: int(one[0]))))
