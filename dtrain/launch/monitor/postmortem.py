"""Why a job of ranks failed: the first cause, how the others ended, and `failure.json` in the run's folder."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dtrain.errors import EXIT_FAILED, EXIT_HANG, EXIT_INTERRUPTED, EXIT_OK, EXIT_STOPPED, EXIT_USAGE
from dtrain.files import read_below
from dtrain.launch.monitor.exit_report import PEER, Report, named_run, present_run, read_reports, write_whole
from dtrain.launch.monitor.hang_watch import Hang
from dtrain.launch.monitor.heartbeat import SCRIPT, Beat, read_beat
from dtrain.launch.monitor.processes import out_of_memory_kills
from dtrain.launch.monitor.stack_dump import crash_text, users_part
from dtrain.layout import CHECKPOINTS, FAILURE, checkpoints_in

STACKS_NAME = "stacks.txt"
LOST = "lost"
_ECHO_SECONDS = 0.5  # within which ranks that lost their connection to another one have told so
_UNEQUAL = (
    " gloo aborts a rank whose collective gets a tensor of another size than on the other ranks. Where a step calls "
    "collectives itself (all_gather), ranks may have unequal parts of a batch: dtrain.gather() takes these."
)
_RESERVED = (EXIT_OK, EXIT_USAGE, EXIT_STOPPED, EXIT_HANG, EXIT_INTERRUPTED)
_CRASHES = {signal.SIGSEGV: "segfault", signal.SIGBUS: "segfault", signal.SIGKILL: "killed"}


@dataclass(frozen=True)
class RankFailure:
    """What `failure.json` holds.

    Attributes:
        rank: the first one that failed.
        local_rank: its number on its machine.
        host: its machine.
        device: where it computed; None where it is not known.
        epoch: None before the first one.
        step: None outside of the passes.
        phase: setup, train, valid or checkpoint.
        cause: exception, out_of_memory, nan, exit, killed, signal, segfault, hang, peer (a rank elsewhere went), or
            lost (a whole node).
        exception: its type and message; None where there was none.
        traceback: the user's own frames; empty where there are none.
        others: rank -> how it ended.
        checkpoint: the last whole one, or None.
        resume: the command that goes on; None, since there is none yet.
    """

    rank: int
    local_rank: int
    host: str
    device: str | None
    epoch: int | None
    step: int | None
    phase: str
    cause: str
    exception: Mapping[str, str] | None = None
    traceback: str = ""
    others: Mapping[str, str] = field(default_factory=dict)
    checkpoint: str | None = None
    resume: str | None = None

    @classmethod
    def of_lost_node(cls, node: int, ranks: range) -> RankFailure:
        """What is left to say of a node that is gone without a word."""
        others = dict.fromkeys(map(str, ranks[1:]), "lost with its node")
        return cls(ranks[0], 0, f"node {node}", None, None, None, "", LOST, others=others)

    @property
    def echo(self) -> bool:
        """Whether it tells of nothing but another rank's end."""
        return self.cause == PEER

    def write(self, run: Path) -> Path:
        """Writes `failure.json` into a run's folder."""
        write_whole(run / FAILURE, json.dumps(asdict(self), indent=1) + "\n")
        return run / FAILURE


def read_failure(run: Path) -> dict[str, Any] | None:
    """Returns what `failure.json` in a run's folder holds, None where there is none that can be read."""
    try:
        found = json.loads(read_below(run, FAILURE))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_told(run: Path) -> bool:
    """Whether `failure.json` tells of more than another rank's end."""
    return bool((read_failure(run) or {}).get("cause", PEER) != PEER)


def last_checkpoint(run: Path) -> str | None:
    """Returns the last whole checkpoint of a run's folder, None where there is none."""
    # A folder has this name once all that is in it is on the disk. Of one epoch, its end comes last.
    return next(map(str, reversed(checkpoints_in(run / CHECKPOINTS))), None)


def remarks(run: Path) -> list[str]:
    """Returns the lines that tell a person what a failed run has left."""
    return [f"last checkpoint: {last_checkpoint(run) or 'none yet'}", f"full report: {run / FAILURE}"]


@dataclass(frozen=True)
class SupervisorState:
    """What a supervisor saw when it stopped waiting for its ranks.

    Attributes:
        ended: rank -> exit code, of those that had ended by then.
        silent: those of them that left no word.
        hang: what stood still, or None.
        all_ran: when all ranks still ran, in seconds since the epoch.
    """

    ended: Mapping[int, int] = field(default_factory=dict)
    silent: tuple[int, ...] = ()
    hang: Hang | None = None
    all_ran: float = 0.0


@dataclass(frozen=True)
class JobOutcome:
    """How a job ended.

    Attributes:
        exit_code: what the supervisor ends with.
        text: what a person shall read, empty where all went well.
        when: the first cause, in seconds since the epoch.
        failure: for `failure.json`, None where there is none to be.
        ended: rank -> how it ended.
        reported: whether a rank has told of it itself.
    """

    exit_code: int = EXIT_OK
    text: str = ""
    when: float = field(default_factory=time.time)
    failure: RankFailure | None = None
    ended: Mapping[str, str] = field(default_factory=dict)
    reported: bool = False


class PostMortem:
    """Finds out why a job of local ranks failed.

    Args:
        folder: of the reports.
        ranks: the numbers of this machine's ranks.
        alone: whether the job has only one.
        apart: the number of the job's ranks, where nothing is known here of the others; else 0.
        local_rank: the number of the first of these ranks on its machine.
    """

    def __init__(self, folder: Path, ranks: range, *, alone: bool = False, apart: int = 0, local_rank: int = 0) -> None:
        self._alone, self._apart, self._local_rank = alone, apart, local_rank
        self._folder = folder
        self._ranks = ranks
        self._kills_before = out_of_memory_kills()

    def verdict(self, seen: SupervisorState) -> JobOutcome:
        """Tells how the job ended."""
        failed = [report for report in read_reports(self._folder) if report.exit_code != EXIT_OK]
        first = _first(seen, failed)
        if seen.hang is not None:
            code, text, failure = self._hang(seen.hang)
        elif isinstance(first, Report):
            code, text, failure = self._reported(first)
        elif first is not None:
            code, text, failure = self._silent(first, seen.ended[first])
        else:
            return JobOutcome(ended=_by_name(self._fates(seen, failed)))
        fates = self._fates(seen, failed)
        others = {rank: how for rank, how in fates.items() if rank != failure.rank}
        reported = seen.hang is None and isinstance(first, Report)
        when = first.when if reported and isinstance(first, Report) else time.time()
        if named_run(self._folder) is None or code == EXIT_USAGE:
            return JobOutcome(code, text, when, reported=reported)
        lines = [text, f"  on {failure.host}, device {failure.device or 'not known yet'}"]
        if failure.cause != "hang" and others:  # which tells of all ranks by itself
            lines.append(f"  the others: {_joined(others)}")
        unknown = {rank: "not known" for rank in range(self._apart) if rank != failure.rank}
        failure = replace(failure, others=_by_name(unknown | others))
        return JobOutcome(code, "\n".join(lines), when, failure, _by_name(fates), reported)

    def leave(self, failure: RankFailure) -> list[str]:
        """Leaves `failure.json` in the run's folder, where there is one here; returns further lines for a person.

        Where each rank does so for itself, the first one that comes does; one that tells of another's end gives way.
        """
        run = present_run(self._folder)
        if run is None or (self._apart and _is_told(run)):
            return []
        try:
            replace(failure, checkpoint=last_checkpoint(run)).write(run)
            if self._apart and not failure.echo:
                time.sleep(_ECHO_SECONDS)
                if not _is_told(run):  # one that looked before this was there has written over it
                    replace(failure, checkpoint=last_checkpoint(run)).write(run)
        except OSError as error:  # a full disk
            return [f"  {run / FAILURE} could not be written: {error.strerror}"]
        return [f"  {remark}" for remark in remarks(run)]

    def _reported(self, report: Report) -> tuple[int, str, RankFailure]:
        told = report.told
        cause = "exit" if told is None else told.cause
        exception = None if told is None else {"type": told.type, "message": told.message}
        trace = "" if told is None else told.traceback
        text = self._on_ended_scripts(report) or report.text
        return report.exit_code, text, self._failure(report.rank, cause, exception, trace)

    def _on_ended_scripts(self, report: Report) -> str:
        """Returns what to say of a cut connection where other ranks had come to the end of their script; else nothing.

        A run of dtrain's own has the ranks end together.
        """
        early = [
            other for other in read_reports(self._folder) if other.exit_code == EXIT_OK and other.when < report.when
        ]
        if not report.echo or not early or named_run(self._folder) is not None:
            return ""
        beat = read_beat(self._folder, report.rank)
        # An exception has left the loop, and with it the step, by now.
        where = f"in {beat}" if beat.phase != SCRIPT else f"in epoch {beat.epoch}" if beat.epoch else "in its own"
        ranks = sorted(other.rank for other in early)
        who = f"ranks {', '.join(map(str, ranks))}" if len(ranks) > 1 else f"rank {ranks[0]}"
        words = (
            f"dtrain: error: {who} had finished the script (exit code 0) while rank {report.rank} was {where}, waiting "
            "for all ranks. Every rank must run the whole script: do not skip a loop over a "
            "prepared loader, means() or save_weights() on some ranks, as with `if dtrain.is_main():`."
        )
        return "\n".join(filter(None, (report.told.traceback if report.told else "", words)))

    def _silent(self, rank: int, code: int) -> tuple[int, str, RankFailure]:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        cause, hint = self._cause_of_code(code)
        crash = crash_text(self._folder, rank)
        beat = read_beat(self._folder, rank)
        at = f"\n  at rank {rank}, {beat}" if beat.count else ""
        others = "" if self._alone or self._apart else "; the other ranks were terminated"
        text = f"dtrain: error: {self._name(rank)} {how} without reporting a cause{others}.{hint}{at}"
        text = f"{crash}\n{text}" if crash else text
        # The codes that mean something of dtrain's own are not the user's code's to give, by os._exit().
        return EXIT_FAILED if code < 0 or code in _RESERVED else code, text, self._failure(rank, cause, None, crash)

    def _cause_of_code(self, code: int) -> tuple[str, str]:
        """Returns one word for how a rank without a word ended, and a hint for a person."""
        if code >= 0:
            return "exit", ""
        if code == -signal.SIGABRT and not self._alone:
            return "signal", _UNEQUAL
        if code != -signal.SIGKILL:
            return _CRASHES.get(signal.Signals(-code), "signal"), ""
        here, machine = (now - before for now, before in zip(out_of_memory_kills(), self._kills_before, strict=True))
        if here > 0:
            return (
                "out_of_memory",
                " Out of memory: the cgroup's memory limit was reached. Use less memory, or raise the limit.",
            )
        if machine > 0:
            return (
                "out_of_memory",
                " The machine ran out of memory, and the kernel killed a process (see dmesg).",
            )
        return "killed", " The kernel does this when memory runs out (see dmesg)."

    def _hang(self, hang: Hang) -> tuple[int, str, RankFailure]:
        frames = users_part(hang.frames)
        rest = _joined({rank: why for rank, why in hang.why.items() if rank != hang.rank})
        others = f"\n  the others: {rest}" if rest else ""
        stack = f"Stack of rank {hang.rank}, innermost frame first:\n{frames}\n" if frames else ""
        text = (
            f"{stack}dtrain: error: a hang was stopped: {self._name(hang.rank)} has been {hang.why[hang.rank]}{others}"
        )
        run = present_run(self._folder)
        if run is not None:
            stacks = "\n".join(f"=== rank {rank}\n{told or '(no response)'}" for rank, told in hang.stacks.items())
            try:
                write_whole(run / STACKS_NAME, stacks)
                text += f"\n  stacks of all ranks: {run / STACKS_NAME}"
            except OSError as error:  # a full disk
                text += f"\n  {run / STACKS_NAME} could not be written: {error.strerror}"
        return EXIT_HANG, text, self._failure(hang.rank, "hang", None, frames)

    def _name(self, rank: int) -> str:
        return "the training process" if self._alone else f"rank {rank}"

    def _failure(self, rank: int, cause: str, exception: Mapping[str, str] | None, trace: str) -> RankFailure:
        beat: Beat = read_beat(self._folder, rank)
        return RankFailure(
            rank=rank,
            local_rank=self._local_rank + rank - self._ranks.start,
            host=socket.gethostname(),
            device=beat.device or None,
            epoch=beat.epoch or None,
            step=beat.step or None,
            phase=beat.phase or "setup",
            cause=cause,
            exception=exception,
            traceback=trace,
        )

    def _fates(self, seen: SupervisorState, failed: list[Report]) -> dict[int, str]:
        """Returns how each rank of this machine ended."""
        if seen.hang is not None:
            return dict(seen.hang.why)
        reports = {report.rank: report for report in failed}
        return {
            rank: _how(reports.get(rank), seen.ended.get(rank), read_beat(self._folder, rank)) for rank in self._ranks
        }


def _first(seen: SupervisorState, failed: list[Report]) -> Report | int | None:
    """Returns the first cause: a rank's report, or the number of a rank that left none.

    A rank that ended without a word is the cause before those that tell of a cut connection: its end is what cut it.
    """
    causes = [report for report in failed if not report.echo]
    if causes and causes[0].when < seen.all_ran:
        return causes[0]
    silent = sorted(seen.silent, key=lambda rank: seen.ended[rank] == -signal.SIGABRT)
    if silent:
        # An abort is how gloo ends a rank whose peer has gone; where that one told why, its word is the cause.
        aborted = seen.ended[silent[0]] == -signal.SIGABRT
        return causes[0] if causes and aborted else silent[0]
    return next(iter(causes or failed), None)


def _by_name(others: Mapping[int, str]) -> dict[str, str]:
    """The same as JSON has it."""
    return {str(rank): how for rank, how in others.items()}


def _how(report: Report | None, code: int | None, beat: Beat) -> str:
    """How a rank ended that was not the first."""
    if report is not None and report.told is not None:
        if report.told.cause == PEER:
            return f"lost its connection to a rank that exited, in {beat}"
        # An exception of dtrain's own has no traceback; what its class is called tells a person nothing.
        return f"{report.told.type} in {beat}" if report.told.traceback else f"failed in {beat}"
    if code is None:
        return f"terminated by dtrain, in {beat}"
    if code == 0:
        return "finished successfully"
    return f"killed by {signal.Signals(-code).name}, in {beat}" if code < 0 else f"exit code {code}, in {beat}"


def _joined(others: Mapping[int, str]) -> str:
    """Joins ranks of which the same is to be told: "rank 0: ...; ranks 2, 3: ..."."""
    by_text: dict[str, list[int]] = {}
    for rank, how in others.items():
        by_text.setdefault(how, []).append(rank)
    return "; ".join(f"rank{'s' if len(r) > 1 else ''} {', '.join(map(str, r))}: {how}" for how, r in by_text.items())
