"""Starts a whole job again, with new processes, after a rank failed; a run goes on from its last checkpoint.

In-place restarts of single ranks, as torchrun's `--max-restarts` makes them, can hang on what the old ones left.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dtrain.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_STOPPED, EXIT_USAGE, WorldError
from dtrain.launch.monitor.postmortem import STACKS_NAME, last_checkpoint
from dtrain.launch.nodes.base import MissingNodesError
from dtrain.launch.signals.escalation import signals_caught
from dtrain.launch.signals.stop_request import STOP_SIGNALS
from dtrain.launch.supervisor import JobEnd
from dtrain.launch.terminal.guarded import say
from dtrain.layout import CHECKPOINTS, FAILURE, HISTORY, checkpoints_in

_FINAL = (EXIT_OK, EXIT_USAGE, EXIT_STOPPED, EXIT_INTERRUPTED)  # starting again would change nothing, or is not wanted
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds
_POLL_SECONDS = 0.05

Progress = tuple[float, float, int]


def run_with_retries(attempt: Callable[[Path | None], JobEnd], most: float, *, follows: bool = False) -> JobEnd:
    """Makes attempts until one does not fail, or too many have failed one after the other without progress.

    Progress is a row more in the run's history, or a later checkpoint. An attempt to which a node does not come back
    in time is a failure as any other. Each failure's `failure.json` is kept under a
    name of its own.

    Args:
        attempt: starts the job and waits for its end; gets the folder of the run that is to go on, None at first.
        most: so many failures without progress are followed by another attempt.
        follows: whether this is not the first of several nodes: that one decides, and this one comes back as long as
            it does.

    Returns:
        how the last attempt ended.
    """
    run: Path | None = None
    failures, best = 0, (0.0, 0.0, 0)
    last: JobEnd | None = None
    for count in itertools.count(1):
        try:
            ending = attempt(run)
        except MissingNodesError as error:
            if last is None:
                raise
            ending = replace(last, text=f"dtrain: error: {error}")
        except WorldError:
            if last is None or not follows:
                raise
            return last  # the first node has not come back
        if not may_try_again(ending) or not most:
            return ending
        run = ending.run or run
        now = progress(run)
        failures = 1 if now > best else failures + 1
        best = max(best, now)
        if failures > most and not follows:
            return replace(ending, text=f"{ending.text}\n{_given_up(failures)}")
        set_aside(run, count)
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (failures - 1))
        say(f"{ending.text}\ndtrain: attempt {count} failed; retrying in {pause:g} s.")
        number = _pause(pause)
        if number is not None:
            return _stopped(number, run)
        last = ending
    raise AssertionError  # itertools.count() has no end


def may_try_again(ending: JobEnd) -> bool:
    """Whether a job failed in a way that another attempt may not: not where it was misused, or somebody ended it."""
    return ending.signal is None and ending.exit_code not in _FINAL


def progress(run: Path | None) -> Progress:
    """Returns what grows as a run goes on: its newest checkpoint's epoch and step, and the rows of its history."""
    if run is None:
        return (0.0, 0.0, 0)
    places = checkpoints_in(run / CHECKPOINTS).values()
    saved = [(float(epoch), math.inf if step is None else float(step)) for epoch, step in places]
    try:
        rows = (run / HISTORY).read_bytes().count(b"\n")
    except OSError:
        rows = 0
    return (*max(saved, default=(0.0, 0.0)), rows)


def goes_on(argv: Sequence[str], run: Path | None = None) -> list[str]:
    """Returns a command line of `dtrain train` that goes on with what there is in the run's folder.

    Args:
        argv: what was started first.
        run: the folder. Where a run or checkpoint was named by --resume, it is named in its place as soon as it has a
            checkpoint, since such a command need name no config.
    """
    end = list(argv).index("--") if "--" in argv else len(argv)
    words = [*argv[:end]]
    given = [after for word, after in itertools.pairwise(words) if word == "--resume"]
    given += [word.partition("=")[2] for word in words if word.startswith("--resume=")]
    named = run is not None and any(one not in ("auto", "never") for one in given) and last_checkpoint(run)
    return [*words, "--resume", str(run) if named else "auto", *argv[end:]]  # the last --resume holds


def run_variables(run: Path) -> dict[str, str]:
    """Returns the variables that name a run's folder, for a config that leaves the name to the time of the start."""
    return {"DTRAIN_RUN__NAME": run.name}


def set_aside(run: Path | None, number: int) -> None:
    """Gives what an attempt's failure left a name that no later one takes: failure-1.json."""
    for name in (FAILURE, STACKS_NAME):
        if run is not None and os.path.lexists(run / name):
            stem, _, suffix = name.partition(".")
            free = (run / f"{stem}-{taken}.{suffix}" for taken in itertools.count(number))
            (run / name).rename(next(path for path in free if not os.path.lexists(path)))


def _given_up(failures: int) -> str:
    return f"dtrain: giving up after {failures} failure{'s' if failures > 1 else ''} without progress."


def _stopped(number: int, run: Path | None) -> JobEnd:
    """How the job ends for a signal that comes between two attempts; a run can be started again, as it is."""
    code = EXIT_STOPPED if run is not None and number in STOP_SIGNALS else 128 + number
    return JobEnd(code, f"dtrain: stopped by {signal.Signals(number).name} before the next attempt.", number)


def _pause(seconds: float) -> int | None:
    """Waits; returns the signal that came meanwhile, if one did."""
    until = time.monotonic() + seconds
    with signals_caught(stoppable=True) as caught:
        while not caught:
            if time.monotonic() >= until:
                return None
            time.sleep(_POLL_SECONDS)
    return caught[0]
