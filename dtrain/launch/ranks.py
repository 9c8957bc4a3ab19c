"""The ranks of this node: their processes, their last words, and the end of those that have left it and stay."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dtrain.errors import EXIT_OK, EXIT_STOPPED
from dtrain.launch.monitor.exit_report import Report, read_reports
from dtrain.launch.monitor.hang_watch import ExitWatch
from dtrain.launch.signals.process_exit import did_not_exit
from dtrain.launch.terminal.guarded import say


class RankProcess(Protocol):
    """What a supervisor asks of a process that it has started: a `subprocess.Popen`, or a `ForkedRank`."""

    @property
    def pid(self) -> int:
        """Its process id, which is its session's, too."""

    def poll(self) -> int | None:
        """Returns its exit code; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end."""

    def send_signal(self, number: int, /) -> None:
        """Sends it a signal."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that run on this node.

    Attributes:
        first: the global number of the first one.
        processes: they themselves.
        reports: the folder where each leaves a word when it ends.
        exits: tells when one that has left its last word should have exited.
        alone: whether the job has only one.
        apart: whether the only one here has others beside it, which another launcher started and others watch.
        overdue: those that had left it and did not exit, and were ended.
    """

    first: int
    processes: list[RankProcess]
    reports: Path
    exits: ExitWatch
    alone: bool = False
    apart: bool = False
    overdue: set[int] = field(default_factory=set)

    def numbered(self) -> Iterator[tuple[int, RankProcess]]:
        """Yields each rank's global number and process."""
        return enumerate(self.processes, start=self.first)

    def words(self) -> dict[int, Report]:
        """Returns the last word of each rank that has left one."""
        return {report.rank: report for report in read_reports(self.reports)}

    def codes(self, words: Mapping[int, Report]) -> dict[int, int]:
        """Returns the exit codes of the ranks that have ended; of those that were overdue, the code that they meant."""
        found = {rank: words[rank].exit_code if rank in self.overdue else one.poll() for rank, one in self.numbered()}
        return {rank: code for rank, code in found.items() if code is not None}

    def end_overdue(self, words: Mapping[int, Report]) -> None:
        """Ends ranks that have left their last word and do not exit, and says so of those that finished
        successfully."""
        running = {rank: one for rank, one in self.numbered() if rank in words and one.poll() is None}
        well = {rank: words[rank].exit_code in (EXIT_OK, EXIT_STOPPED) for rank in running}
        for rank in self.exits.overdue({rank: one.pid for rank, one in running.items()}, well):
            if well[rank] and rank not in self.overdue:
                kept = "; ".join(words[rank].waits_for) or "an exit function, or code below Python"
                say(did_not_exit("the training process" if self.alone else f"rank {rank}", kept))
            self.overdue.add(rank)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running[rank].pid, signal.SIGKILL)  # with what it has started
