"""Starts N ranks on this machine, watches them, and ends all when one fails."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from dtrain.errors import EXIT_FAILED, EXIT_OK
from dtrain.launch.lifeline import PARENT
from dtrain.launch.reports import REPORT_DIR, read_reports
from dtrain.launch.threads import usable_cores

_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.05
_LAUNCH = Path(__file__).resolve().parent


def dtrain_argv(arguments: Sequence[str]) -> list[str]:
    """Returns what follows the interpreter's name to run `dtrain ARGUMENTS`."""
    return [str(_LAUNCH.parent / "__main__.py"), *arguments]


def script_argv(script: str, arguments: Sequence[str]) -> list[str]:
    """Returns what follows the interpreter's name to run a user's script as a rank that reports its end."""
    return [str(_LAUNCH / "script_runner.py"), script, *arguments]


def start_local_ranks(argv: Sequence[str], size: int, environment: dict[str, str] | None = None) -> int:
    """Runs `python ARGV` as ranks 0 to size - 1 here and waits for them.

    Args:
        argv: what follows the interpreter's name; a program that leaves a report when it ends (`dtrain_argv`,
            `script_argv`), since an end without a word counts as a failure.
        size: number of ranks, at least 1.
        environment: further variables for every rank.

    Returns:
        0 where all ranks ended with 0, else the exit code of the rank that failed first;
        130 after Ctrl-C, 128 + N after another signal.
    """
    with tempfile.TemporaryDirectory(prefix="dtrain-") as reports:
        port = free_port()
        ranks: list[subprocess.Popen[bytes]] = []
        more = environment or {}
        with _signals_caught() as caught:
            try:
                ranks += (_start(argv, rank_environment(rank, size, port, reports) | more) for rank in range(size))
                silent = _watch(ranks, caught, Path(reports))
            finally:
                _end(ranks)
        return _tell(silent, ranks, Path(reports), caught)


def free_port() -> int:
    """Returns a TCP port that is free on this machine now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, size: int, port: int, reports: str) -> dict[str, str]:
    """Returns the variables that make a process one of `size` local ranks; a user's own values are kept."""
    ours = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        REPORT_DIR: reports,
        PARENT: str(os.getpid()),
    }
    defaults = {"OMP_NUM_THREADS": str(max(1, usable_cores() // size))}
    if sys.platform == "linux":
        # gloo would look the host's own name up, which fails or leads astray on a laptop behind a VPN.
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    return defaults | dict(os.environ) | ours


def _start(argv: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *argv],
        env=dict(environment),
        stdin=None if environment["RANK"] == "0" else subprocess.DEVNULL,
        # A terminal's Ctrl-C must come through the supervisor once, not to every rank besides.
        start_new_session=True,
    )


@contextlib.contextmanager
def _signals_caught() -> Iterator[list[int]]:
    """Notes SIGINT, SIGTERM and SIGHUP instead of dying of them."""
    caught: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        caught.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(ranks: list[subprocess.Popen[bytes]], caught: list[int], reports: Path) -> list[int]:
    """Waits until all ranks ended well, one failed, or a signal came.

    Returns:
        the ranks that ended without a word by then, although each rank leaves one, well or not.
    """
    while not caught:
        ended = {rank: code for rank, process in enumerate(ranks) if (code := process.poll()) is not None}
        told = {report.rank for report in read_reports(reports)}
        silent = [rank for rank in ended if rank not in told]
        if silent or any(ended.values()) or len(ended) == len(ranks):
            return silent
        time.sleep(_POLL_SECONDS)
    return []


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Ends what still runs: SIGTERM, and SIGKILL to the whole process group after a grace."""
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)  # its DataLoader workers included
        rank.wait()


def _tell(silent: list[int], ranks: list[subprocess.Popen[bytes]], reports: Path, caught: list[int]) -> int:
    """Prints why the job ended, once, and returns the exit code of the first cause.

    A rank that ended without a word is the cause before any that reported: its end is what tears the
    others' connections, and they report just that.
    """
    if caught:
        _say(f"dtrain: stopped by {signal.Signals(caught[0]).name}; all ranks are ended.")
        return 128 + caught[0]
    failed = [report for report in read_reports(reports) if report.exit_code != EXIT_OK]
    # An abort is how gloo ends a rank whose peer has gone; where that one told why, its word is the cause.
    aborted = silent and ranks[silent[0]].returncode == -signal.SIGABRT
    if silent and not (aborted and failed):
        code = ranks[silent[0]].returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
        hint = " The kernel does so when memory runs out (see dmesg)." if code == -signal.SIGKILL else ""
        _say(f"dtrain: error: rank {silent[0]} {how} and left no word of why; the other ranks were ended.{hint}")
        return code if code > 0 else EXIT_FAILED
    if failed:
        _say(failed[0].text)
        return failed[0].exit_code
    return EXIT_OK


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201
