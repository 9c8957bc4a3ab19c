"""Starts this machine's ranks, watches them, and ends all when one fails, here or on another node."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dtrain.errors import EXIT_OK, EXIT_STOPPED
from dtrain.launch.env.interfaces import check_interfaces
from dtrain.launch.env.job import Job
from dtrain.launch.env.ports import free_port
from dtrain.launch.env.rank_env import RankFacts
from dtrain.launch.forked import Fork
from dtrain.launch.monitor.exit_report import named_run, read_reports, single_rank_hint
from dtrain.launch.monitor.hang_watch import ExitWatch, HangWatch
from dtrain.launch.monitor.postmortem import PostMortem, RankFailure, SupervisorState
from dtrain.launch.monitor.stack_dump import raw_crash_text
from dtrain.launch.nodes.base import InterruptedBySignal, Rendezvous
from dtrain.launch.nodes.messages import ExitMessage
from dtrain.launch.nodes.rendezvous import meet
from dtrain.launch.ranks import RankProcess, Ranks
from dtrain.launch.signals.escalation import Escalation, signals_caught
from dtrain.launch.signals.job_control import stopped_together
from dtrain.launch.signals.launcher import launcher_above
from dtrain.launch.signals.left_behind import open_folders, own_folder
from dtrain.launch.signals.reaper import Reaper
from dtrain.launch.signals.stop_request import kept_for_later
from dtrain.launch.terminal.guarded import say
from dtrain.launch.terminal.notebook_relay import NotebookOutput
from dtrain.launch.terminal.tty_relay import Output

_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.05
_ECHO_SECONDS = _GRACE_SECONDS + 1.0
_LAUNCH = Path(__file__).resolve().parent


@dataclass(frozen=True)
class JobEnd:
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
        reported: whether a rank has told of its own end, which is what `text` says.
    """

    exit_code: int
    text: str = ""
    signal: int | None = None
    when: float = field(default_factory=time.time)
    run: Path | None = None
    failure: RankFailure | None = None
    ended: Mapping[str, str] = field(default_factory=dict)
    reported: bool = False

    def word(self, node: int) -> ExitMessage:
        """Returns the same for the launchers of the other nodes."""
        failure = None if self.failure is None else asdict(self.failure)
        return ExitMessage(node, self.exit_code, self.text, self.when, failure=failure, ended=dict(self.ended))


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


def told(ending: JobEnd) -> int:
    """Prints why a job did not end well, where it did not, and returns its exit code."""
    if ending.text:
        say(ending.text)
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
) -> JobEnd:
    """Runs `python ARGV` as ranks 0 to size - 1 here and waits for them.

    Args:
        argv: what follows the interpreter's name; a program that leaves a report when it ends (`dtrain_argv`,
            `script_argv`), since an end without a word counts as a failure.
        size: number of ranks, at least 1.
        environment: further variables for every rank.
        relayed: the ranks' output goes through this process's sys.stdout and sys.stderr, and they have no input;
            else through its file descriptors, and rank 0 has its input. A function is called again and again besides.
        hang_seconds: how long a rank may stand still; 0 is for ever, and None says nothing. See
            `dtrain.launch.monitor.hang_watch`.
        stop_seconds: how long ranks may take to stop on request; None where the program does not know how to.
        caught: signals that came before this.
    """
    job = Job(
        size, port=free_port(), environment=environment or {}, hang_seconds=hang_seconds, stop_seconds=stop_seconds
    )
    return run_job(argv, job, relayed=relayed, caught=caught)


def run_forked_rank(
    work: Callable[[], None],
    facts: RankFacts,
    *,
    hang_seconds: float | None,
    stop_seconds: float | None,
    caught: Sequence[int],
) -> JobEnd:
    """Forks off the only rank, or the one that another launcher has made of this process, and waits for its end.

    Args:
        work: what the rank does; it ends the process and never returns.
        facts: which rank it is. Of several, the others have supervisors of their own, and what the ranks say
            themselves they print.
        hang_seconds: as for `run_local_ranks`.
        stop_seconds: as for `run_local_ranks`.
        caught: as for `run_local_ranks`.
    """
    # Each rank is a node by itself here, whose launcher knows nothing of the others: it does not meet them.
    job = Job(1, nodes=facts.size, node_rank=facts.rank, hang_seconds=hang_seconds, stop_seconds=stop_seconds)
    with signals_caught(stoppable=stop_seconds is not None, before=caught) as signals:
        return _run_part(Fork(work, facts), job, None, signals, relayed=False)


def run_job(
    argv: Sequence[str],
    job: Job,
    about: Mapping[str, str] | None = None,
    *,
    relayed: bool | Callable[[], None] = False,
    caught: Sequence[int] = (),
) -> JobEnd:
    """Runs this node's part of a job: meets the other nodes, starts the ranks, and waits until all have ended.

    Args:
        argv: as for `run_local_ranks`.
        job: this node's part; of several nodes' job the port of rank 0's store is chosen here.
        about: what must be the same on all nodes; see `meet`.
        relayed: as for `run_local_ranks`.
        caught: signals that came before this.

    Raises:
        WorldError: the nodes did not come together, or are told to use an interface that leads to none of them.
    """
    with signals_caught(stoppable=job.stop_seconds is not None, before=caught) as signals:
        if job.nodes == 1:
            return _run_part(argv, job, None, signals, relayed=relayed)
        check_interfaces(os.environ | job.environment, job.host)
        try:
            meeting = meet(job, about or {}, signals)
        except InterruptedBySignal:
            return _stopped(signals[0])
        with contextlib.closing(meeting):
            return _run_part(argv, meeting.job, meeting, signals, relayed=relayed)


def _run_part(
    argv: Sequence[str] | Fork,
    job: Job,
    meeting: Rendezvous | None,
    caught: Sequence[int],
    *,
    relayed: bool | Callable[[], None],
) -> JobEnd:
    reaper: Reaper | None = None
    with own_folder() as name:
        fork = argv if isinstance(argv, Fork) else None
        exits = ExitWatch(job.hang_seconds or 0.0, _GRACE_SECONDS)
        alone, apart = job.ranks * job.nodes == 1, fork is not None and fork.apart
        ranks = Ranks(job.first_rank, [], Path(name), exits, alone=alone, apart=apart)
        launcher = launcher_above(os.getpid()) if fork is not None else None
        orders = Escalation(caught, job.stop_seconds, ranks.reports, launcher=launcher, silent=apart)
        output = (
            NotebookOutput(relayed)
            if relayed
            else Output(lambda: job.log_dir or _runs_logs(ranks.reports), orders.ends, apart=apart)
        )
        hangs = HangWatch(ranks.reports, job.hang_seconds or 0.0, alone=job.nodes == 1)
        numbers = range(job.first_rank, job.first_rank + job.ranks)
        local_rank, size = (fork.facts.local_rank, job.nodes) if fork is not None and apart else (0, 0)
        post_mortem = PostMortem(ranks.reports, numbers, alone=alone, apart=size, local_rank=local_rank)
        try:
            for local_rank in range(job.ranks):
                stdout, stderr = output.channels(job.first_rank + local_rank)
                with contextlib.nullcontext() if job.stop_seconds is None else kept_for_later():
                    if isinstance(argv, Fork):
                        ranks.processes.append(argv(name, stdout, stderr))
                        continue
                    environment = job.rank_environment(local_rank, name) | dict(output.environment)
                    ranks.processes.append(_start(argv, environment, stdout, stderr, has_input=not relayed))
            output.start(ranks.processes)
            reaper = Reaper([process.pid for process in ranks.processes], open_folders())
            with stopped_together(lambda: [one.pid for one in ranks.processes if one.poll() is None]):
                seen, word = _watch(ranks, orders, meeting, hangs, output.wait)
        finally:
            _end(ranks.processes, politely=job.stop_seconds is None)
            if reaper is not None:
                reaper.dismiss()
            output.close({rank: raw_crash_text(ranks.reports, rank) for rank, _ in ranks.numbered()})
        ending = _ending(seen, post_mortem, orders, ranks)
        ending = ending if meeting is None else _joint_ending(ending, word, meeting)
        # Rank 0's node has the run's folder. A rank apart has left word itself, if it could.
        if ending.failure is not None and (not ending.reported if apart else job.first_rank == 0):
            ending = replace(ending, text="\n".join([ending.text, *post_mortem.leave(ending.failure)]))
        if ending.exit_code == EXIT_OK and job.first_rank == 0:
            ending = replace(ending, text=single_rank_hint(read_reports(ranks.reports), job.nodes * job.ranks))
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
    orders: Escalation,
    meeting: Rendezvous | None,
    hangs: HangWatch,
    wait: Callable[[float], None],
) -> tuple[SupervisorState, ExitMessage | None]:
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
    while not orders.end_now():
        now = time.time()
        words = ranks.words()
        ranks.end_overdue(words)
        ended = ranks.codes(words)
        # Each rank leaves word, well or not: one that ended without it did not end well.
        silent = tuple(rank for rank in ended if rank not in words)
        if silent or not all(orders.ended_well(code, words[rank]) for rank, code in ended.items()):
            return SupervisorState(ended, silent, all_ran=all_ran), None
        if len(ended) == len(ranks.processes) and not done:
            if meeting is None:
                break
            meeting.tell(ExitMessage(meeting.job.node_rank, EXIT_OK, "", now))
            done = True
        if meeting is not None and ((word := meeting.news()) is not None or (done and meeting.over())):
            return SupervisorState(), word
        hang = hangs.check({rank: one.pid for rank, one in ranks.numbered() if rank not in ended})
        if hang is not None:
            return SupervisorState(ended, hang=hang), None
        all_ran = now if not ended else all_ran
        wait(_POLL_SECONDS)
    return SupervisorState(), None


def _end(ranks: Sequence[RankProcess], *, politely: bool) -> None:
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


def _ending(seen: SupervisorState, post_mortem: PostMortem, orders: Escalation, ranks: Ranks) -> JobEnd:
    """Tells why this node's ranks ended, with the exit code of the first cause."""
    if orders.ends:
        return _stopped(orders.ends[0], orders, ranks.first if ranks.apart else None)
    words = ranks.words()
    codes = ranks.codes(words)
    well = len(codes) == len(words) and all(orders.ended_well(code, words.get(rank)) for rank, code in codes.items())
    if well and EXIT_STOPPED in codes.values():
        return JobEnd(EXIT_STOPPED, next((word.text for word in words.values() if word.text), ""), reported=True)
    verdict = post_mortem.verdict(seen)
    return JobEnd(
        verdict.exit_code,
        verdict.text,
        when=verdict.when,
        failure=verdict.failure,
        ended=verdict.ended,
        reported=verdict.reported,
    )


def _stopped(number: int, orders: Escalation | None = None, apart: int | None = None) -> JobEnd:
    """Tells that a signal, or the end of the launcher above, has ended the ranks.

    Args:
        number: the signal.
        orders: how that came about; None before there were ranks.
        apart: the only rank here, where others have supervisors of their own.
    """
    name = signal.Signals(number).name
    what, they = ("all ranks were", "they") if apart is None else (f"rank {apart} was", "it")
    late = orders is not None and orders.late
    if orders is not None and orders.orphaned_by is not None:
        by, why = f"the end of {orders.orphaned_by}", f"; {they} did not stop in time" if late else ""
    else:
        by, why = name, f"; {they} did not stop within train.stop_seconds" if late else ""
    return JobEnd(128 + number, f"dtrain: stopped by {by}; {what} terminated{why}.", number)


def _joint_ending(ending: JobEnd, word: ExitMessage | None, meeting: Rendezvous) -> JobEnd:
    """Tells the other nodes how this one ended, and puts what another one said before it where that came first."""
    mine = ending.word(meeting.job.node_rank)
    well = ending.exit_code in (EXIT_OK, EXIT_STOPPED)  # each node's own ranks have stopped
    if not well:
        meeting.tell(mine)
        if ending.signal is None:  # where this is an echo, the cause comes once that node has ended its ranks
            word = meeting.exit_messages(_ECHO_SECONDS) if mine.order[0] else meeting.exit_messages()
    elif word is None:
        return ending
    else:
        meeting.pass_on(word)
        meeting.tell(replace(mine, exit_code=word.exit_code, text=""))
    others = {**(meeting.ended(_ECHO_SECONDS) if mine.node == 0 else {}), **ending.ended}
    if word is None or (not well and word.order >= mine.order):
        return replace(ending, failure=_with_others(ending.failure, others))
    text = word.text if word.lost else f"on node {word.node}: {word.text}"
    failure = None if word.failure is None else _with_others(RankFailure(**word.failure), others)
    if ending.text and not mine.order[0]:
        text = f"{text}\non this node: {ending.text}"
    return JobEnd(word.exit_code, text, when=word.when, failure=failure)


def _with_others(failure: RankFailure | None, others: Mapping[str, str]) -> RankFailure | None:
    """Adds how ranks of all nodes ended."""
    if failure is None:
        return None
    told = {**others, **failure.others}
    told.pop(str(failure.rank), None)
    return replace(failure, others=dict(sorted(told.items(), key=lambda one: int(one[0]))))
