"""Which dimension of a random tensor goes along the batch: known by how its shape follows the number of rows.

A shape alone does not say it: 64 numbers may be one for each of a rank's 64 samples, or one for each of 64 features.
So for each place in the code that draws, shapes are kept with the rows that the rank had. Two of them tell::

    33 rows: (33, 8)    31 rows: (31, 8)     one number or more for each row
    33 rows: (64, 8)    31 rows: (64, 8)     common to the batch: the same numbers on all ranks

Two are there before the first numbers are drawn, as the first batch is cut into unequal parts, and the ranks tell each
other their shapes while they take that step. Later on a batch of another size may show that a shape was misjudged;
that is an error.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.distributed_c10d import _get_default_store
from torch.overrides import handle_torch_function

from dtrain.distributed.standing import words_of
from dtrain.distributed.world import World
from dtrain.errors import StepError

logger = logging.getLogger(__name__)

Where = tuple[str, int, int, int]  # a function's file and first line, the place in it, and by which of torch's it draws
Shape = tuple[int, ...]
Unknown = Literal["unknown"]
UNKNOWN: Unknown = "unknown"

_MOST_SHAPES = 4  # of a place for one number of rows
_MOST_ROWS = 8  # different numbers of them
_TORCH = str(Path(torch.__file__).parent)
_OWN = tuple(str(Path(__file__).with_name(name)) for name in ("row_evidence.py", "row_rule.py", "random_rows.py"))
_NUMBERS = itertools.count()  # of meetings that a process makes, the same on all ranks


@dataclass(slots=True)
class _DrawnShape:
    """A shape that a place has drawn.

    Attributes:
        rows: that the rank had, or another one.
        shape: of what was drawn.
        taken: the dimension that was taken for the rows, None for none; unknown where another rank has drawn it.
    """

    rows: int
    shape: Shape
    taken: int | Unknown | None


class RowEvidence:
    """The shapes that the places of one split's steps have drawn."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Where, int], list[_DrawnShape]] = {}

    def dimension(self, where: Where, rows: int, shape: Shape) -> int | Unknown | None:
        """Returns which dimension goes along the batch, None where none does.

        Args:
            where: the place that draws.
            rows: that the rank has.
            shape: of what it draws.

        Raises:
            StepError: a shape was misjudged before, or two dimensions go along the batch.
        """
        found: dict[int | None, list[_DrawnShape]] = {}
        for seen in self._seen.get((where, len(shape)), ()):
            if seen.rows == rows:
                continue
            differ = [d for d, (here, there) in enumerate(zip(shape, seen.shape, strict=True)) if here != there]
            if len(differ) > 1 and all(shape[d] == rows and seen.shape[d] == seen.rows for d in differ):
                raise StepError(
                    f"same_draws: the random numbers of shape {shape} that {_shown(where)} draws are for pairs of the "
                    f"batch's {rows} samples, of which a rank has a part. {_OFF}"
                )
            if len(differ) > 1 or not all(_follows(shape[d], rows, seen.shape[d], seen.rows) for d in differ):
                continue  # its length is another one, too
            if differ or not _may_be_tokens(shape[0], rows, seen.rows):
                found.setdefault(differ[0] if differ else None, []).append(seen)
        if len(found) != 1:
            return UNKNOWN
        known, told = next(iter(found.items()))
        for seen in told:
            if seen.taken not in (known, UNKNOWN):
                raise _misjudged(where, seen, known, rows, shape)
        return known

    def note(self, where: Where, rows: int, shape: Shape, taken: int | Unknown | None) -> None:
        """Keeps a shape, and what was made of it."""
        known = self._seen.setdefault((where, len(shape)), [])
        alike = [seen for seen in known if seen.rows == rows]
        new = alike or len({seen.rows for seen in known}) < _MOST_ROWS
        if new and len(alike) < _MOST_SHAPES and all(seen.shape != shape for seen in alike):
            known.append(_DrawnShape(rows, shape, taken))

    def state(self) -> list[Any]:
        """Returns what was seen, of plain values, for a resumed run."""
        return [
            [*where, seen.rows, list(seen.shape), seen.taken]
            for (where, _), all_ in self._seen.items()
            for seen in all_
        ]

    def load(self, state: Iterable[Any]) -> None:
        """Puts back what `state` returned."""
        for file, line, place, way, rows, shape, taken in state:
            self.note((file, line, place, way), rows, tuple(shape), taken)


class ShapeExchange:
    """Has the ranks tell each other the shapes that they draw, past any collective that they may be in.

    The first and the last rank say theirs, which have different numbers of rows.

    Args:
        world: several ranks.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._key = f"dtrain/draws/{next(_NUMBERS)}/"
        self._over = f"{self._key}over/"  # said after the step
        self._drawn = 0
        self._compared: set[tuple[Where, Shape]] = set()
        self._speakers = (0, world.size - 1)
        self._alone = False

    def told(self, where: Where, rows: int, shape: Shape) -> list[tuple[int, Shape]]:
        """Returns the rows and shapes that those ranks have at the same draw, as far as they come there.

        Once for each place and shape, so that a place that draws for each sample in turn has no rank wait.
        """
        if self._alone or (where, shape) in self._compared:
            return []
        self._compared.add((where, shape))
        self._drawn += 1
        key, others = f"{self._key}{self._drawn}/", [rank for rank in self._speakers if rank != self._world.rank]
        if self._world.rank in self._speakers:
            self._say(key, [rows, list(shape)])
        said, missing = words_of(self._world, key, others, unless=self._over)
        if missing:
            self._alone = True
            logger.warning(
                "same_draws: in its first step rank %d draws random numbers %d times, and rank %d does not: their "
                "numbers are told from the batch's by their shapes alone.",
                *(self._world.rank, self._drawn, missing[0]),
            )
            return []
        return [(int(there), tuple(drawn)) for there, drawn in map(json.loads, said.values())]

    def differing(self, streams: dict[str, int]) -> list[str]:
        """Returns, on the first rank, which random streams are at another place on the last one after the step.

        Args:
            streams: name -> a checksum of the stream's state.
        """
        if self._world.rank in self._speakers:
            self._say(self._over, streams)
        if self._world.rank != 0 or self._alone:
            return []
        said, missing = words_of(self._world, self._over, self._speakers[1:])
        there = {} if missing else json.loads(said[self._speakers[1]])
        return [name for name, state in streams.items() if there and there.get(name) != state]

    def _say(self, key: str, what: object) -> None:
        _get_default_store().set(f"{key}{self._world.rank}", json.dumps(what))


def place_of(depth: int = 2) -> Where:
    """Returns the place in the code of the user, or of a library above torch, that draws.

    Args:
        depth: frames above this one that are dtrain's own.
    """
    frame: Any = sys._getframe(depth)
    last, way = frame, 0
    while frame is not None:
        frame = _below_modes(frame)
        last, code = frame, frame.f_code
        if not code.co_filename.startswith((_TORCH, *_OWN)):
            break
        way = (31 * way + 7 * code.co_firstlineno + frame.f_lasti) & 0xFFFFFFFF
        frame = frame.f_back
    return last.f_code.co_filename, last.f_code.co_firstlineno, last.f_lasti, way


def _below_modes(frame: Any) -> Any:
    """Returns the frame below those of a TorchFunctionMode, which may look at calls in some of the steps only.

    A function of torch's that is written in Python comes by twice then: it hands its call to the mode first.
    """
    while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:  # C++ may be below
        frame = frame.f_back
        if frame.f_code is handle_torch_function.__code__:
            frame = frame.f_back.f_back or frame.f_back
    return frame


def _follows(here: int, rows: int, there: int, other_rows: int) -> bool:
    """Whether two lengths are as many times the rows; or equal, which the caller knows to be so."""
    return here > 0 and here % rows == 0 and there % other_rows == 0 and here // rows == there // other_rows


def _may_be_tokens(length: int, rows: int, other_rows: int) -> bool:
    """Whether a length may be that of all tokens of a few long texts and of some more short ones."""
    return all(length > one and length % one == 0 for one in (rows, other_rows))


_OFF = "Set train.same_draws=false (same_draws=False in Python): each rank then draws its own random numbers."


def _misjudged(where: Where, seen: _DrawnShape, known: int | None, rows: int, shape: Shape) -> StepError:
    taken = "common to the batch" if seen.taken is None else "this rank's rows of the batch's"
    right = "common to the batch" if known is None else f"the batch's along dimension {known}"
    length = seen.shape[0]
    return StepError(
        f"same_draws: {_shown(where)} drew random numbers of shape {seen.shape} where the rank had {seen.rows} "
        f"samples, which were taken for {taken}, and {shape} where it has {rows}: so they are {right}, and were not "
        "those that one process draws. Draw some more than needed and leave them out, as in "
        f"torch.rand({length + 1})[:{length}], so that the shape does not look like the batch's. {_OFF}"
    )


def _shown(where: Where) -> str:
    file, line, *_ = where
    return f"the function at {file}:{line}"
