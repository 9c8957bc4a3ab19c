"""Events, prefixes and the log: what a program reads of a run."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dtrain.callbacks.progress.events import Events, emit_end
from dtrain.cli.console import Console, LogFormat, LogLevel, Prefixed, asked_for_events, set_up_log
from dtrain.errors import UsageError
from dtrain.launch.supervisor import JobEnd


@pytest.fixture
def pipe() -> Any:
    ours, theirs = os.pipe()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def told(pipe: tuple[int, int]) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    text = os.read(pipe[0], 100_000).decode()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_numbers_keep_their_digits_and_what_json_has_not_is_text(pipe: tuple[int, int]) -> None:
    third = 0.1 + 0.2
    row = {"loss": third, "nan": float("nan"), "up": float("inf"), "down": -np.float64("inf"), "epoch": 3, "no": None}
    Events(pipe[1]).tell("epoch", row=row, path=os, ok=True)
    (event,) = told(pipe)
    assert event["row"] == {"loss": third, "nan": "nan", "up": "inf", "down": "-inf", "epoch": 3, "no": None}
    assert event["ok"] is True
    assert float(event["row"]["nan"]) != float(event["row"]["nan"])
    assert "rank" not in event


def test_each_event_is_one_write_and_names_its_rank(pipe: tuple[int, int]) -> None:
    events = Events(pipe[1])
    events.rank = 2
    events.tell("log", text="two\nlines")
    assert told(pipe)[0] | {"at": 0} == {"event": "log", "at": 0, "rank": 2, "text": "two\nlines"}


def test_whatever_else_is_printed_goes_to_standard_error() -> None:
    code = (
        "import os, subprocess, sys\nfrom dtrain.callbacks.progress.events import Events\n"
        "print('before')\nevents = Events()\nevents.take_stdout()\n"
        "print('words')\nos.write(1, b'of C\\n')\nsubprocess.run(['echo', 'of a child'], check=True)\nevents.tell('it')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    before, event = done.stdout.splitlines()
    assert before == "before"
    assert json.loads(event)["event"] == "it"
    assert done.stderr.splitlines() == ["words", "of C", "of a child"]


@pytest.mark.parametrize(("code", "event"), [(75, "stopped"), (1, "failed"), (130, "failed")])
def test_how_a_job_ended(pipe: tuple[int, int], code: int, event: str) -> None:
    emit_end(Events(pipe[1]), JobEnd(code, "why"))
    assert told(pipe)[0] | {"at": 0} == {"event": event, "at": 0, "exit_code": code, "text": "why"}


def test_one_that_ended_well_has_told_so_itself(pipe: tuple[int, int]) -> None:
    emit_end(Events(pipe[1]), JobEnd(0))
    emit_end(None, JobEnd(1, "why"))
    os.set_blocking(pipe[0], False)
    with pytest.raises(BlockingIOError):
        os.read(pipe[0], 1)


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["--log-format", "json"], True),
        (["digits", "--log-format=json", "epochs=3"], True),
        (["--log-format", "json", "--log-format", "plain"], False),
        (["--", "--log-format=json"], False),
        (["json"], False),
        ([], False),
    ],
)
def test_a_launcher_sees_what_it_passes_on(words: list[str], asked: bool) -> None:
    assert asked_for_events(words) is asked


def test_bars_of_several_ranks_are_refused() -> None:
    Console(LogFormat.PLAIN, all_ranks=True).check()
    with pytest.raises(UsageError, match="Use only one of the two"):
        Console(LogFormat.RICH, all_ranks=True).check()


class Writes(io.StringIO):
    """Counts writes."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def write(self, text: str) -> int:
        self.parts.append(text)
        return super().write(text)


def test_each_line_has_its_ranks_name_and_is_one_write() -> None:
    out = Writes()
    stream = Prefixed(out, 3)
    print("a", "b", sep=" ", file=stream)
    print("\r10%\r20%", end="", file=stream)
    stream.flush()
    print("\nthree\r\nfour\n", file=stream)
    print("[rank 3] itself", file=stream)
    print("no end", end="", file=stream)
    stream.close_line()
    lines = ["a b", "10%", "20%", "three", "four", "", "itself", "no end"]
    assert out.getvalue() == "".join(f"[rank 3] {line}\n" for line in lines)
    assert all(part.endswith("\n") for part in out.parts)


# --- the log ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_in_a_process_of_its_own() -> Iterator[None]:
    """Takes pytest's own handlers off, and puts all back as it was."""
    root, own = logging.getLogger(), logging.getLogger("dtrain")
    before = root.handlers, root.level, own.level, logging.lastResort
    root.handlers = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        try:
            yield
        finally:
            root.handlers, level, own_level, logging.lastResort = before
            root.setLevel(level)
            own.setLevel(own_level)


def say() -> None:
    for name in ("dtrain.trainer.train", "other"):
        for level in ("info", "warning"):
            getattr(logging.getLogger(name), level)("%s of %s", level, name)


@pytest.mark.parametrize(
    ("level", "rank", "all_ranks", "lines"),
    [
        (None, 0, False, ["warning of dtrain.trainer.train", "warning of other"]),
        (
            None,
            1,
            False,
            ["warning of dtrain.trainer.train", "warning of other"],
        ),  # what a rank warns of is seen, as ever
        (LogLevel.ERROR, 0, False, ["warning of other"]),
        (
            LogLevel.INFO,
            0,
            False,
            [
                "INFO dtrain.trainer.train: info of dtrain.trainer.train",
                "WARNING dtrain.trainer.train: warning of dtrain.trainer.train",
                "WARNING other: warning of other",
            ],
        ),
        (
            LogLevel.INFO,
            1,
            False,
            ["WARNING dtrain.trainer.train: warning of dtrain.trainer.train", "WARNING other: warning of other"],
        ),
        (
            LogLevel.INFO,
            1,
            True,
            [
                "INFO dtrain.trainer.train: info of dtrain.trainer.train",
                "WARNING dtrain.trainer.train: warning of dtrain.trainer.train",
                "WARNING other: warning of other",
            ],
        ),
    ],
)
def test_what_the_log_says(capsys: Any, level: LogLevel | None, rank: int, all_ranks: bool, lines: list[str]) -> None:
    with as_in_a_process_of_its_own():
        set_up_log(level, rank, None, all_ranks=all_ranks)
        say()
    assert capsys.readouterr().err.splitlines() == lines


def test_records_are_events(pipe: tuple[int, int], capsys: Any) -> None:
    with as_in_a_process_of_its_own():
        set_up_log(None, 1, Events(pipe[1]))
        say()
        warnings.warn("be warned", UserWarning, stacklevel=1)
    first, second, third = told(pipe)
    assert (first["logger"], first["level"], first["text"]) == (
        "dtrain.trainer.train",
        "warning",
        "warning of dtrain.trainer.train",
    )
    assert (second["logger"], second["of_rank"]) == ("other", 1)
    assert third["text"].endswith("UserWarning: be warned")
    assert capsys.readouterr().err == ""


def test_a_users_own_set_up_has_the_records_once(capsys: Any) -> None:
    mine = io.StringIO()
    with as_in_a_process_of_its_own():
        set_up_log(LogLevel.INFO, 0, None)
        logging.basicConfig(stream=mine, format="mine: %(message)s")
        say()
    lines = ["info of dtrain.trainer.train", "warning of dtrain.trainer.train", "warning of other"]
    assert mine.getvalue().splitlines() == [f"mine: {line}" for line in lines]
    assert capsys.readouterr().err == ""


def test_importing_dtrain_sets_no_logging_up() -> None:
    code = (
        "import logging, dtrain, dtrain.api.function, dtrain.api.keras\n"
        "assert not logging.getLogger().handlers and not logging.getLogger('dtrain').handlers\n"
        "assert logging.getLogger('dtrain').level == logging.NOTSET\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
