"""How a rank tells its supervisor how it ended: one small JSON file a rank, also when all went well."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dtrain.errors import cut
from dtrain.files import MODE, identity_of, write_below
from dtrain.launch.env.inherited import drop_inherited
from dtrain.launch.signals.exiting import pending_at_exit

REPORT_DIR = "DTRAIN_REPORT_DIR"
_RUN = "run.txt"
_WORD, _WORD_BYTES = ".word", 16384

PEER = "peer"  # a rank's connection to another was cut: the echo of that one's end


@dataclass(frozen=True)
class RankIdentity:
    """Which rank this process is, and whose.

    Attributes:
        rank: 0 without a launcher.
        size: number of ranks, 1 without a launcher.
        reports: the folder of a dtrain supervisor's reports; None without one.
        apart: whether that supervisor watches this rank alone, as another launcher has started each of them: then it
            cannot know how the others end, and each rank speaks for itself.
    """

    rank: int
    size: int
    reports: Path | None
    apart: bool = False


_fixed: list[RankIdentity] = []
_last_word: list[mmap.mmap] = []


def identity() -> RankIdentity:
    """Returns which rank this process is: by the environment, or by what `fix_identity` saw there."""
    if _fixed:
        return _fixed[0]
    drop_inherited()
    rank, size, reports = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", REPORT_DIR))
    return RankIdentity(
        int(rank) if rank.isdecimal() else 0,
        int(size) if size.isdecimal() else 1,
        Path(reports) if reports else None,
    )


def fix_identity(me: RankIdentity | None = None) -> None:
    """Holds fast which rank this process is, as its first act: the user's code may change the environment.

    Args:
        me: who it is; None for what the environment says.
    """
    if _fixed:
        return
    me = me or identity()
    _fixed.append(me)
    word = None if me.reports is None else _map_report(me.reports, me.rank)
    if word is not None:
        _last_word.append(word)


def is_first_to_warn(words: str) -> bool:
    """Whether no other rank of this node has said these words before: what has come to one has often come to all."""
    reports = identity().reports
    if reports is None:
        return True
    name = f"said-{hashlib.sha256(words.encode(errors='replace')).hexdigest()[:16]}"
    try:
        os.close(os.open(reports / name, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


@dataclass(frozen=True)
class ExceptionInfo:
    """What an exception tells, for programs to read.

    Attributes:
        cause: exception, out_of_memory, nan, exit, or `PEER`.
        type: the exception's class.
        message: its text.
        traceback: the user's own frames; those of dtrain, Accelerate and torch are folded away.
    """

    cause: str
    type: str
    message: str
    traceback: str


@dataclass(frozen=True)
class Report:
    """How one rank ended, in words.

    Attributes:
        rank: who.
        exit_code: what the job shall end with.
        text: what a person shall read; empty where all went well.
        when: seconds since the epoch; the earliest report is the cause, later ones are its echo.
        told: the same, in parts; None where no exception ended the rank.
        alone: whether it seems to have trained without joining the other ranks.
        waits_for: what the interpreter has to wait for before the process exits, in words.
    """

    rank: int
    exit_code: int
    text: str
    when: float
    told: ExceptionInfo | None = None
    alone: bool = False
    waits_for: Sequence[str] = ()

    @property
    def echo(self) -> bool:
        """Whether it tells of nothing but another rank's end."""
        return self.told is not None and self.told.cause == PEER


def supervised() -> bool:
    """Whether a dtrain supervisor watches this rank and reads its report."""
    return identity().reports is not None


def jointly_supervised() -> bool:
    """Whether that supervisor has all ranks of this machine, and prints the first cause of their end for all."""
    return supervised() and not identity().apart


def write_report(exit_code: int, text: str, told: ExceptionInfo | None = None, *, alone: bool = False) -> None:
    """Leaves this rank's report for the supervisor; whole or not at all.

    Where the user's code has left no way to write a file (no descriptors, a limit on sizes, a full disk), it is cut and
    goes into the file that was mapped into memory at the start.
    """
    me = identity()
    if me.reports is None:
        return
    report = Report(me.rank, exit_code, text, time.time(), told, alone, pending_at_exit())
    try:
        # The umask is the user's code's to change, and the supervisor must be able to read this.
        write_whole(me.reports / f"rank-{me.rank}.json", json.dumps(asdict(report)), 0o600)
    except OSError:
        if not _last_word:
            raise
        _write_report(_last_word[0], report)


def _write_report(word: mmap.mmap, report: Report) -> None:
    told = report.told
    short = (
        None
        if told is None
        else ExceptionInfo(told.cause, told.type, cut(told.message, 500), cut(told.traceback, 1500))
    )
    data = json.dumps(asdict(replace(report, text=cut(report.text, 2000), told=short, waits_for=()))).encode()
    if len(data) > _WORD_BYTES:  # other alphabets take six bytes a character
        data = json.dumps(asdict(replace(report, text=cut(report.text, 300), told=None, waits_for=()))).encode()
    word[:] = data[:_WORD_BYTES].ljust(_WORD_BYTES, b" ")


def _map_report(reports: Path, rank: int) -> mmap.mmap | None:
    """Makes the file for a last word, with its blocks on the disk: no later limit keeps it from being written."""
    try:
        descriptor = os.open(reports / f"rank-{rank}{_WORD}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, b" " * _WORD_BYTES)
            return mmap.mmap(descriptor, _WORD_BYTES)
        finally:
            os.close(descriptor)
    except (OSError, ValueError):
        return None


def single_rank_hint(reports: Sequence[Report], size: int) -> str:
    """Returns a warning where several ranks have each trained alone, which nothing else would show; else nothing.

    Args:
        reports: of ranks that ended well.
        size: number of ranks in the job.
    """
    if size == 1 or not reports or not all(report.alone for report in reports):
        return ""
    return (
        f"dtrain: warning: {size} processes each ran the whole script independently. To train together, call "
        "dtrain.prepare(...) before the loop over the batches (docs/script-style.md)."
    )


def read_reports(folder: Path) -> list[Report]:
    """Returns the reports that ranks left, the earliest first."""
    found: dict[int, Report] = {}
    for path in (*folder.glob("rank-*.json"), *folder.glob(f"rank-*{_WORD}")):
        report = _read(path)
        if report is not None:
            found.setdefault(report.rank, report)
    return sorted(found.values(), key=lambda report: report.when)


def _read(path: Path) -> Report | None:
    """Returns what a file holds; None where it is no report, as by code that writes into the folder."""
    try:
        with path.open("rb") as file:
            first = file.read(1)
            if first != b"{":  # there is no last word
                return None
            fields: dict[str, Any] = json.loads(first + file.read())
        told = fields.pop("told")
        return Report(**fields, told=None if told is None else ExceptionInfo(**told))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def name_run(folder: Path) -> None:
    """Tells the supervisor, if there is one, which folder is the run's, so that it can leave word there."""
    reports = identity().reports
    if reports is not None:
        place = folder.resolve()
        write_whole(reports / _RUN, json.dumps({"folder": str(place), "identity": identity_of(place)}), 0o600)


def named_run(reports: Path) -> Path | None:
    """Returns the run's folder, None where no rank has named one."""
    named = _named(reports)
    return None if named is None else named[0]


def present_run(reports: Path) -> Path | None:
    """Returns the run's folder if it is where it was; None where it was removed, moved or replaced since."""
    named = _named(reports)
    return named[0] if named is not None and named[1] is not None and identity_of(named[0]) == named[1] else None


def _named(reports: Path) -> tuple[Path, tuple[int, int] | None] | None:
    try:
        told = json.loads((reports / _RUN).read_text(encoding="utf-8"))
        return Path(told["folder"]), None if told["identity"] is None else tuple(told["identity"])
    except (OSError, ValueError, TypeError, KeyError):  # nothing yet, or a full disk
        return None


def write_whole(path: Path, text: str, mode: int = MODE) -> None:
    """Writes a file whole or not at all; a link of its name is replaced, not followed.

    Args:
        path: the file.
        text: what it shall hold.
        mode: its permissions, before the umask.
    """
    write_below(path.parent, path.name, text, mode=mode)


def part_of(path: Path) -> Path:
    """Returns the name under which `write_whole` writes a file, before it has its own."""
    return path.with_name(f".{path.name}.part")
