"""What a bench has found so far, in a file, so that it outlives ranks that end in a trial. Knows nothing of torch."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.errors import EXIT_FAILED
from dtrain.launch.monitor.exit_report import write_whole
from dtrain.tools.bench.advice import TrialResult

if TYPE_CHECKING:
    from dtrain.distributed.world import World

_ENDED = "a rank ended in it"


class Notes:
    """The file, as a rank sees it.

    Args:
        path: of the file.
        world: the ranks; rank 0 reads and writes.

    Attributes:
        content: what stands there.
    """

    def __init__(self, path: Path, world: World) -> None:
        self._path, self._world = path, world
        self.content: dict[str, Any] = world.gather_json(read_notes(path) if world.is_main else None)[0]

    def add(self, **more: Any) -> None:
        """Writes what has come besides."""
        self.content |= more
        if self._world.is_main:
            write_whole(self._path, json.dumps(self.content))

    def leave_word(self, why: str) -> None:
        """Says why this rank is about to end."""
        write_whole(_word_of(self._path, self._world.rank), why)


def read_notes(path: Path) -> dict[str, Any]:
    """Returns what stands in the file; nothing where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def skip_trial(path: Path, code: int, *, last: bool) -> bool:
    """After ranks have ended badly: where it was in a trial, notes why that failed.

    Args:
        path: the file.
        code: with which they have ended.
        last: whether nothing more is tried after that.

    Returns:
        whether it was a failure in a trial, and no request to stop.
    """
    notes = read_notes(path)
    words = [*path.parent.glob(_word_of(path, 0).name.replace("rank-0", "rank-*"))]
    words.sort(key=lambda word: word.stat().st_mtime_ns)  # the others' say that the first one has gone
    if not notes.get("trying") or not (words or code == EXIT_FAILED):
        return False
    why = words[0].read_text(encoding="utf-8") if words else _ENDED
    for word in words:
        word.unlink()
    done = notes["trials"]
    for number, one in enumerate(notes["candidates"][len(done) :]):
        if number and not last:
            break
        failed = TrialResult(one["name"], one["change"], one["note"], why="ranks ended too often" if number else why)
        done.append(asdict(failed))
    notes |= {"trying": None, "result": notes["result"] | {"trials": done}}
    write_whole(path, json.dumps(notes))
    return True


def _word_of(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.stem}.rank-{rank}.txt")
