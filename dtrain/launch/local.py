"""Starts N ranks on this machine, watches them, and ends all when one fails."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from dtrain.launch.hangs import HangWatch
from dtrain.launch.lifeline import PARENT
from dtrain.launch.postmortem import PostMortem, Seen
from dtrain.launch.relay import RELAYED_ENVIRONMENT, Relay
from dtrain.launch.reports import REPORT_DIR, read_reports
from dtrain.launch.threads import usable_cores

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
    """

    exit_code: int
    text: str = ""
    signal: int | None = None


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
    ending = run_local_ranks(argv, size, environment, hang_seconds=hang_seconds)
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
            else they share its file descriptors.
        hang_seconds: how long a rank may stand still; 0 is for ever. See `dtrain.launch.hangs`.
    """
    relay = Relay() if relayed else None
    more = (RELAYED_ENVIRONMENT if relayed else {}) | (environment or {})
    with tempfile.TemporaryDirectory(prefix="dtrain-") as reports:
        port = free_port()
        hangs, post_mortem = HangWatch(Path(reports), hang_seconds), PostMortem(Path(reports), size)
        ranks: list[subprocess.Popen[bytes]] = []
        with _signals_caught() as caught:
            try:
                for rank in range(size):
                    ranks.append(_start(argv, rank_environment(rank, size, port, reports) | more, piped=relayed))
                    if relay is not None:
                        relay.add(rank, ranks[-1])
                seen = _watch(ranks, caught, Path(reports), hangs, relay.wait if relay else time.sleep)
            finally:
                _end(ranks)
                if relay is not None:
                    relay.close()
        return _ending(seen, post_mortem, caught)


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


def _start(argv: Sequence[str], environment: Mapping[str, str], *, piped: bool) -> subprocess.Popen[bytes]:
    output = subprocess.PIPE if piped else None
    return subprocess.Popen(
        [sys.executable, *argv],
        env=dict(environment),
        stdin=None if environment["RANK"] == "0" and not piped else subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        # A terminal's Ctrl-C must come through the supervisor once, not to every rank besides.
        start_new_session=True,
    )


@contextlib.contextmanager
def _signals_caught() -> Iterator[list[int]]:
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
    ranks: list[subprocess.Popen[bytes]],
    caught: list[int],
    reports: Path,
    hangs: HangWatch,
    wait: Callable[[float], None],
) -> Seen:
    """Waits until all ranks ended well, one failed, one hangs, or a signal came.

    Args:
        ranks: the processes.
        caught: gets the signals that come.
        reports: the folder of the ranks' reports.
        hangs: tells when they stand still.
        wait: lets some seconds pass, at most.
    """
    all_ran = 0.0
    while not caught:
        now = time.time()
        ended = {rank: code for rank, process in enumerate(ranks) if (code := process.poll()) is not None}
        told = {report.rank for report in read_reports(reports)}
        # Each rank leaves word, well or not: one that ended without it did not end well.
        silent = tuple(rank for rank in ended if rank not in told)
        if silent or any(ended.values()) or len(ended) == len(ranks):
            return Seen(ended, silent, all_ran=all_ran)
        hang = hangs.check({rank: process.pid for rank, process in enumerate(ranks) if rank not in ended})
        if hang is not None:
            return Seen(ended, hang=hang)
        all_ran = now if not ended else all_ran
        wait(_POLL_SECONDS)
    return Seen()


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
    """Tells why the job ended, with the exit code of the first cause."""
    if caught:
        name = signal.Signals(caught[0]).name
        return Ending(128 + caught[0], f"dtrain: stopped by {name}; all ranks are ended.", caught[0])
    code, text = post_mortem.verdict(seen)
    return Ending(code, text)
