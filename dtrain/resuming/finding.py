"""The last checkpoint that is good, read by rank 0 and told to all: no rank needs to see the folder but that one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.checkpoint.extra import extra_of
from dtrain.checkpoint.folder import MANIFEST, Saved, named, verify
from dtrain.checkpoint.tensors import read_tensors
from dtrain.checkpoint.tree import unflatten
from dtrain.checkpoint.weights import WEIGHTS
from dtrain.errors import CheckpointError, UsageError
from dtrain.resuming.state import State
from dtrain.world import World

RUN, RANKS = "state", "ranks"
FILES = (WEIGHTS, *(f"{part}.{kind}" for part in (RUN, RANKS) for kind in ("json", "safetensors")))


@dataclass(frozen=True)
class Found:
    """What is gone on from.

    Attributes:
        saved: the checkpoint.
        newer: those after it, which are damaged or not gone on from.
        words: what a person shall be told of them.
    """

    saved: Saved
    newer: tuple[Path, ...] = ()
    words: tuple[str, ...] = ()


def find_good(folder: Path, usable: Callable[[Saved], str] = lambda _: "") -> Found | None:
    """Returns the last good checkpoint of a folder, None where there is none at all.

    Args:
        folder: of all checkpoints.
        usable: returns why one that is whole is not gone on from, or nothing.

    Raises:
        CheckpointError: there are some, and none is good; each is named with what is wrong.
    """
    newer: list[Path] = []
    words: list[str] = []
    for path, place in reversed(named(folder).items()):
        try:
            saved = read_saved(path, *place)
            reason = usable(saved)
        except CheckpointError as error:
            reason = str(error)
        if not reason:
            return Found(saved, tuple(newer), tuple(words))
        newer.append(path)
        words.append(reason)
    if newer:
        raise CheckpointError(f"there is no good checkpoint in {folder}, which is left as it is: {'; '.join(words)}.")
    return None


def read_saved(path: Path, epoch: int, step: int | None) -> Saved:
    """Verifies one checkpoint, all its bytes.

    Raises:
        CheckpointError: it is damaged, or holds weights alone.
    """
    facts = verify(path)
    missing = [name for name in FILES if name not in facts["files"]]
    if missing or facts.get("format") != 1:
        raise CheckpointError(f"{path} holds no state to go on from ({', '.join(missing) or 'another format'})")
    return Saved(path, epoch, step, facts)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory, on every rank: manifest, the net's state, and the parts of `dtrain.resuming.state`."""

    path: Path
    facts: dict[str, Any]
    weights: dict[str, Any]
    run: State
    ranks: list[State]


@dataclass(frozen=True)
class Parts:
    """A checkpoint's files as they are, on rank 0; nothing yet elsewhere."""

    path: str = ""
    files: tuple[bytes, ...] = (b"",) * (1 + len(FILES))

    def shared(self, world: World) -> Parts:
        """Returns rank 0's parts on every rank."""
        path = world.share_bytes(self.path.encode()).decode()
        return Parts(path, tuple(world.share_bytes(data) for data in self.files))

    def loaded(self) -> Loaded:
        """Makes tensors and states of the files.

        Raises:
            CheckpointError: they are not what dtrain writes.
        """
        manifest, weights, *states = self.files
        run, ranks = (_tree(states[n], read_tensors(states[n + 1])[0]) for n in (0, 2))
        tensors, metadata = read_tensors(weights)
        return Loaded(Path(self.path), json.loads(manifest), tensors | extra_of(metadata), run, ranks)


def read(path: Path) -> Parts:
    """Reads a verified checkpoint.

    Raises:
        OSError: a file cannot be read.
    """
    return Parts(str(path), tuple((path / name).read_bytes() for name in (MANIFEST, *FILES)))


def _tree(data: bytes, tensors: dict[str, Any]) -> Any:
    try:
        return unflatten(json.loads(data), tensors)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"a checkpoint holds a state that is none: {error}") from None


def checkpoint_at(path: Path) -> Saved:
    """Returns the one checkpoint that a path names, verified.

    Raises:
        UsageError: the path is none.
        CheckpointError: it is damaged.
    """
    place = named(path.parent).get(path)
    if place is None:
        raise UsageError(f"--resume {path}: there is neither a run nor a checkpoint here.")
    return read_saved(path, *place)
