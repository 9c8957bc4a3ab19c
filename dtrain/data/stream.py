"""What a loader without indices yields, on its way to the ranks: counted, looked at, and compared with what it said."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any, TypeVar

from torch import Tensor

from dtrain.data.batches import BatchFunctions, BatchReader
from dtrain.data.collate import Collated, collates_by_default, noting
from dtrain.data.constant_parts import refuse_constants
from dtrain.data.fingerprints import first_bytes
from dtrain.data.partition import BatchOps, RankBatch, ShardSpec
from dtrain.errors import DataError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MOST_HELD = 5  # batches that are looked at before the first step


class Stream:
    """The batches of a loader without indices.

    Args:
        loader: the user's.
        how: how they are dealt.
        split: the loader's name.
        functions: what the user says of its batches.
        fixed: as for `dtrain.data.batches.BatchReader`.

    Attributes:
        loader: what is iterated over: the user's, or a copy that notes what is known of its batches.
        reader: counts and cuts them.
        form: the same for `dtrain.data.partition.shard_batches`.
        fingerprint: a number that stands for the first batch of the last epoch; 0 on one rank.
    """

    def __init__(
        self, loader: Any, how: ShardSpec, split: str, functions: BatchFunctions | None, *, fixed: bool
    ) -> None:
        self.loader = noting(loader)
        self.reader = BatchReader(functions, how.size, split, fixed=fixed, collated=collates_by_default(loader))
        self.form: BatchOps[Any] = BatchOps(self.reader.size_of, self.reader.cut, self.reader.join)
        self.fingerprint = 0.0
        self._noting = self.loader is not loader
        self._how = how
        self._split = split
        self._looked = False

    def noted(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Takes a fingerprint of the first batch on its way, and looks at it."""
        self.fingerprint = 0.0
        if isinstance(self.loader, (list, tuple)) and not self._looked:
            for batch in self.loader:  # before the first step, since they are all there
                self.reader.size_of(batch)
        if self._held == 1:
            self._looked = True
            yield from batches
            return
        iterator = iter(batches)
        first = list(islice(iterator, 1))
        sums = [1 + zlib.crc32(first_bytes(batch)) for batch in first]
        self.fingerprint = float(sum(sums)) if self._how.size > 1 else 0.0
        if not self._looked:
            self._look(first, sums, iterator)
        yield from chain(first, iterator)

    @property
    def changes(self) -> str:
        """What is wrong with a loader that changes a batch which was not used yet."""
        return (
            f"the {self._split} loader changes a batch after yielding it. Yield new tensors: "
            "dtrain holds a batch while it reads the next one."
        )

    @property
    def _held(self) -> int:
        """How many batches may be in use at once."""
        how = self._how
        return how.merge * how.group * (how.size if how.mode == "per_rank" else 1) + (how.size > 1)

    def _look(self, first: list[Any], sums: list[int], rest: Iterator[Any]) -> None:
        """Adds the next batches to the first one, before it is dealt, and compares them."""
        self._looked = True
        for batch in islice(rest, min(self._held, _MOST_HELD) - 1):
            first.append(batch)
            sums.append(1 + zlib.crc32(first_bytes(batch)))
        if sums != [1 + zlib.crc32(first_bytes(batch)) for batch in first]:
            raise DataError(self.changes)
        if self._how.mode == "global" and self._how.size > 1 and len(first) > 1:
            refuse_constants(self.reader, first[0], first[1])

    def plain(self, iter_batches: Iterator[RankBatch]) -> Iterator[RankBatch]:
        """Returns the shares with the user's own batches."""
        return map(_plain, iter_batches) if self._noting else iter_batches


def _plain(rank_batch: RankBatch) -> RankBatch:
    if type(rank_batch.batch) is Collated:
        rank_batch.batch = rank_batch.batch.batch
    return rank_batch


class LengthCheck:
    """Compares how many batches a loader yields with its length, and says once that it differs.

    Args:
        split: the loader's name.
        rank: rank 0 says it.
    """

    def __init__(self, split: str, rank: int) -> None:
        self._split = split
        self._silent = rank != 0

    def checked(self, batches: Iterable[T], sized: Any) -> Iterator[T]:
        """Iterates over the batches of one epoch.

        Args:
            batches: what is yielded.
            sized: what has the length; of what has none, nothing is said.
        """
        said = length_of(sized)
        number = 0
        for number, batch in enumerate(batches, start=1):
            if number - 1 == said:
                self._log(said, "more")
            yield batch
        if said is not None and number < said:
            self._log(said, str(number))

    def _log(self, said: int, yielded: str) -> None:
        if not self._silent:
            logger.warning(
                "the %s loader's length is %d, and it yielded %s batches: progress, time left and a schedule's end "
                "are wrong. Correct its __len__, or remove it.",
                self._split,
                said,
                yielded,
            )
        self._silent = True


class DroppedSamplesCheck:
    """Looks for samples that a user's `collate_fn` leaves out, and says once that they count.

    Args:
        split: the loader's name.
        rank: rank 0 says it.
        size: the user's `batch_size`, of which it says, too, where it differs for the first batch.
    """

    def __init__(self, split: str, rank: int, size: Callable[[Any], int] | None = None) -> None:
        self._split = split
        self._silent = rank != 0
        self._size = None if self._silent else size

    def look(self, rank_batch: RankBatch) -> None:
        """Compares the number of indices with the rows, where all parts are tensors of as many."""
        if self._size is not None:
            self._compare(self._size(rank_batch.batch), len(rank_batch.indices))
        parts = rank_batch.batch.values() if isinstance(rank_batch.batch, dict) else rank_batch.batch
        if (
            self._silent
            or not isinstance(rank_batch.batch, (dict, tuple, list))
            or len(rank_batch.batch) == len(rank_batch.indices)
        ):
            return  # which may also be a list of samples
        rows = {part.shape[0] if isinstance(part, Tensor) and part.ndim else -1 for part in parts}
        if len(rows) == 1 and 0 <= (left := rows.pop()) < (drawn := len(rank_batch.indices)):
            self._silent = True
            logger.warning(
                "a batch of the %s loader has %d indices and %d rows; it counts as %d samples. Where collate_fn drops "
                "some, return dtrain.Mean(total, count) from the steps, or drop them from the dataset.",
                *(self._split, drawn, left, drawn),
            )

    def _compare(self, size: int, drawn: int) -> None:
        self._size = None
        if size != drawn:
            self._silent = True
            logger.warning(
                "batch_size(batch) is not asked for batches of the %s loader, which are of indices: one is of %d "
                "indices and counts as %d samples, and batch_size says %d. For another mean return "
                "dtrain.Mean(total, count) from the steps.",
                *(self._split, drawn, drawn, size),
            )


def length_of(sized: Any) -> int | None:
    """Returns a length; None for what has none."""
    try:
        return len(sized)
    except TypeError:
        return None
