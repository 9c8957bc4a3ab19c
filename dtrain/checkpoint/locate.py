"""The last checkpoint that is good, read by rank 0 and told to all: no rank needs to see the folder but that one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.checkpoint.extra import extra_of
from dtrain.checkpoint.folder import MANIFEST, Saved, check_place, read_manifest, verify
from dtrain.checkpoint.left_out import left_out_of
from dtrain.checkpoint.rows import read_rows
from dtrain.checkpoint.state import State
from dtrain.checkpoint.tensors import read_tensors
from dtrain.checkpoint.tree import unflatten
from dtrain.checkpoint.weights import WEIGHTS
from dtrain.distributed.world import World
from dtrain.errors import CheckpointError, UsageError
from dtrain.files import read_below
from dtrain.layout import checkpoints_in

RUN, RANKS = "state", "ranks"
FILES = (WEIGHTS, *(f"{part}.{kind}" for part in (RUN, RANKS) for kind in ("json", "safetensors")))
ROWS, LINES = ("rows", "validations"), ".jsonl"  # of the state, in files of their own; since format 2
_FORMATS = (1, 2)


@dataclass(frozen=True)
class ResumePoint:
    """What is gone on from.

    Attributes:
        saved: the checkpoint.
        newer: those after it, which are damaged or skipped.
        words: what a person shall be told of them.
    """

    saved: Saved
    newer: tuple[Path, ...] = ()
    words: tuple[str, ...] = ()


def find_good(folder: Path, usable: Callable[[Saved], str] = lambda _: "") -> ResumePoint | None:
    """Returns the last good checkpoint of a folder, None where there is none at all.

    Args:
        folder: of all checkpoints.
        usable: returns why an intact one is skipped, or nothing.

    Raises:
        CheckpointError: there are some, and none is good; each is named with what is wrong.
    """
    newer: list[Path] = []
    words: list[str] = []
    for path, place in reversed(checkpoints_in(folder).items()):
        try:
            saved = read_saved(path, *place)
            reason = usable(saved)
        except CheckpointError as error:
            reason = str(error)
        if not reason:
            return ResumePoint(saved, tuple(newer), tuple(words))
        newer.append(path)
        words.append(reason)
    if newer:
        raise CheckpointError(f"no valid checkpoint in {folder}, which is left unchanged: {'; '.join(words)}.")
    return None


def read_saved(path: Path, epoch: int, step: int | None) -> Saved:
    """Verifies one checkpoint, all its bytes.

    Raises:
        CheckpointError: it is damaged, or holds weights alone.
    """
    facts = read_manifest(path)
    check_place(path, facts)
    verify(path)
    missing = [name for name in FILES if name not in facts["files"]]
    if missing or facts.get("format") not in _FORMATS:
        raise CheckpointError(f"{path} has no state to resume from ({', '.join(missing) or 'another format'})")
    return Saved(path, epoch, step, facts)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory, on every rank.

    Manifest, the net's state, the parts of `dtrain.checkpoint.state`, and what the net's state lacks on purpose.
    """

    path: Path
    facts: dict[str, Any]
    weights: dict[str, Any]
    run: State
    ranks: list[State]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class Parts:
    """A checkpoint's files as they are, on rank 0; nothing yet elsewhere."""

    path: str = ""
    files: tuple[bytes, ...] = (b"",) * (1 + len(FILES) + len(ROWS))

    def shared(self, world: World) -> Parts:
        """Returns rank 0's parts on every rank."""
        path = world.share_bytes(self.path.encode()).decode()
        return Parts(path, tuple(world.share_bytes(data) for data in self.files))

    def loaded(self) -> Loaded:
        """Makes tensors and states of the files.

        Raises:
            CheckpointError: they are not what dtrain writes.
        """
        manifest, weights, *states, rows, validations = self.files
        run, ranks = (_tree(states[n], read_tensors(states[n + 1])[0]) for n in (0, 2))
        if "rows" not in run:
            run |= {name: read_rows(lines) for name, lines in zip(ROWS, (rows, validations), strict=True)}
        tensors, metadata = read_tensors(weights)
        net, lacks = tensors | extra_of(metadata), left_out_of(metadata)
        return Loaded(Path(self.path), json.loads(manifest), net, run, ranks, lacks)


def read(path: Path) -> Parts:
    """Reads a verified checkpoint.

    Raises:
        OSError: a file cannot be read.
    """
    rows = (f"{name}{LINES}" for name in ROWS)  # older checkpoints have none
    return Parts(
        str(path),
        (
            *(_bytes_of(path, name) for name in (MANIFEST, *FILES)),
            *(_bytes_of(path, name) if (path / name).exists() else b"" for name in rows),
        ),
    )


def _bytes_of(path: Path, name: str) -> bytes:
    return read_below(path.parent, f"{path.name}/{name}", sys.maxsize - 1)


def _tree(data: bytes, tensors: dict[str, Any]) -> Any:
    try:
        return unflatten(json.loads(data), tensors)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"a checkpoint has an invalid state: {error}") from None


def checkpoint_at(path: Path) -> Saved:
    """Returns the one checkpoint that a path names, verified.

    Raises:
        UsageError: the path is none.
        CheckpointError: it is damaged.
    """
    place = checkpoints_in(path.parent).get(path)
    if place is None:
        raise UsageError(f"--resume {path}: no such run or checkpoint.")
    return read_saved(path, *place)
