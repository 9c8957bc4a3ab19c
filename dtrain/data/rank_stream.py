"""Batches of which every rank reads its own: of a loader that shards itself, or of a stream on one rank.

The k-th batches of all ranks, without those that have no sample, are the k-th global batch. A rank's part may have any
number of batches, also none: one that is done takes part with weight 0 until all are. How many samples each rank has
is told a batch ahead (`dtrain.data.count_exchange`), so that each one's weight is known before its step. In
validation, where ranks may take different numbers of steps, nothing is told.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from dtrain.data.collate import Collated
from dtrain.data.count_exchange import CountExchange
from dtrain.data.fingerprints import edge_mark
from dtrain.data.libraries import begins_anew
from dtrain.data.partition import RANK_STRIDE, RankBatch, ShardSpec, in_groups
from dtrain.data.places import END, Place, begin_anew, keeper_of, mark_of, random_of, state_of
from dtrain.data.rank_shards import check_first_batches
from dtrain.data.sources import Sources, enter_epoch
from dtrain.data.stream import LengthCheck, Stream
from dtrain.data.worker_seeds import let_workers_go
from dtrain.data.workers import WorkerStarter, has_workers
from dtrain.distributed.seeding import CommonRandomness
from dtrain.distributed.world import World
from dtrain.errors import DataError

logger = logging.getLogger(__name__)


class RankStream:
    """A loader of which this rank reads all batches.

    Args:
        stream: its batches, counted.
        how: the ranks. `limit` is a number of batches of all ranks together.
        sources: the loader's parts.
        length: compares how many batches come with the loader's length.
        split: the loader's name.
        world: the ranks; None on one.

    Attributes:
        place: where the rank is after the share that was given last; None where nobody keeps it.
        resume: from where the next pass goes on, as `Place.saved` returned it.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what a ShardedLoader has
        self, stream: Stream, how: ShardSpec, sources: Sources, length: LengthCheck, split: str, world: World | None
    ) -> None:
        self.place: Place | None = None
        self.resume: Mapping[str, Any] | None = None
        self._stream, self._how, self._sources, self._length = stream, how, sources, length
        self._split, self._world = split, world
        self._keeper = keeper_of(stream.loader)
        self._exchange: CountExchange | None = None
        self._compared = False
        self._loaded = False
        self._warned = how.rank != 0

    @property
    def keeps(self) -> bool:
        """Whether the loader, or its dataset, knows where it is."""
        return self._keeper is not None

    def iter_batches(self, seed: int, epoch: int, skip: int, ready: Callable[[], None]) -> Iterator[RankBatch]:
        """Iterates over the rank's shares of one epoch; see `ShardedLoader.iter_batches`."""
        saved, self.resume = self.resume, None
        limited = self._how.limit is not None and self._sources.kept and not self._warned
        before = repr(state_of(self._keeper)) if limited else ""
        reading = self._begin(seed, epoch, saved if skip else None)
        shares = self._together(reading) if self._how.fill else self._apart(reading)
        if self._how.group > 1:
            shares = in_groups(shares, self._how)
        if saved is None:
            next(islice(shares, skip, skip), None)
        ready()
        for share in shares:
            self.place = share.place
            share.batch = _opened(share.batch)
            yield share
        if limited and self._keeper is not None and reading.is_cut:
            self._warn_of_left(before, reading)

    # --- reading ----------------------------------------------------------------------------------------

    def _begin(self, seed: int, epoch: int, saved: Mapping[str, Any] | None) -> _Reading:
        let_workers_go(self._stream.loader)
        if saved is not None and saved["state"] is not None and self._keeper is not None:
            reading = self._from_state(seed, saved)
            if reading is not None:
                return reading
            logger.info("the %s loader's state leads elsewhere: the epoch is read from its beginning", self._split)
            self._sources.load(self._sources.began)
            enter_epoch(self._stream.loader, epoch)
        if self._loaded and self._keeper is not None:
            begin_anew(self._keeper)
            self._loaded = False
        source = self._source()
        if self._how.size == 1:  # on several, a length may be the whole's or the part's
            source = self._length.checked(source, self._stream.loader)
        reading = self._reading(seed, source)
        if saved is not None:
            reading.skip(saved["read"])
            reading.seen = saved["seen"]
        return reading

    def _from_state(self, seed: int, saved: Mapping[str, Any]) -> _Reading | None:
        """Goes on from the loader's state; None where another batch comes next than did before."""
        self._keeper.load_state_dict(copy.deepcopy(saved["state"]))
        self._loaded = True
        self._sources.placed(at_end=not saved["next"])
        reading = self._reading(seed, self._source() if saved["next"] else ())
        reading.common.state = random_of(saved)  # now, since to begin draws from it
        reading.read, reading.seen = saved["read"], saved["seen"]
        if saved["next"] and reading.peek() != saved["next"]:
            reading.close()
            return None
        return reading

    def _source(self) -> Iterable[Any]:
        loader: Any = self._stream.loader
        return self._sources.restarting(WorkerStarter(loader) if has_workers(loader) else loader)

    def _reading(self, seed: int, source: Iterable[Any]) -> _Reading:
        limit = self._how.limit
        if limit is not None:  # of all ranks together, which take turns
            limit = max(0, -(-(limit - self._how.rank) // self._how.size))
        common = CommonRandomness(seed)
        keeps = self._sources.kept and self._how.fill
        return _Reading(source, common, self._stream.reader.size_of, limit, self._keeper, keeps=keeps)

    def _warn_of_left(self, before: str, reading: _Reading) -> None:
        """Tells of a state that stays within a pass which was left at `limit`: a resumed run may begin there."""
        within = repr(state_of(self._keeper))
        reading.close()
        if before != repr(state_of(self._keeper)) == within and not begins_anew(self._keeper):
            self._warned = True
            logger.warning(
                "the state of %s is still within the %s pass, which limit_batches has ended: a resumed run goes on "
                "there in the next epoch. If a new __iter__ begins at the start, have its state do so, too, once the "
                "iterator is closed: try/finally around the loop in __iter__ (docs/recipes.md#streams).",
                *(type(self._keeper).__name__, self._split),
            )

    # --- sharing out ------------------------------------------------------------------------------------

    def _together(self, reading: _Reading) -> Iterator[RankBatch]:
        """Every rank takes part in every step, until all are done."""
        how, exchange = self._how, self._meeting()
        mine, filler, rows, first = reading.fetch(), None, 0, True
        self._compare(mine)
        exchange.begin(None if mine is END else reading.count)
        while any(counts := exchange.end()):
            if first:  # what a rank takes part with once it is done; of another rank where it has nothing of its own
                filler, rows = exchange.shared(mine, counts, self._split)
            numbers = [count or 0 for count in counts]
            total, count, seen = sum(numbers), numbers[how.rank], reading.seen
            batch = mine if count else filler
            share = RankBatch(batch, count, total, count * how.size / total, start=seen + sum(numbers[: how.rank]))
            share.whole_start, share.rows, share.counts = seen, count or rows, numbers
            reading.seen += total
            mark = edge_mark(batch) if first and count else 0
            mine = reading.fetch()
            exchange.begin(None if mine is END else reading.count)
            if mark and mark != edge_mark(batch):
                raise DataError(self._stream.changes)
            share.place, first = reading.at, False
            yield share

    def _apart(self, reading: _Reading) -> Iterator[RankBatch]:
        """Ranks take as many steps as they have batches."""
        reading.seen = self._how.rank * RANK_STRIDE
        first = True
        while True:
            mine = reading.fetch()
            if first:
                self._compare(mine)
                first = False
            if mine is END:
                return
            count, start = reading.count, reading.seen
            reading.seen += count
            yield RankBatch(mine, count, count, 1.0, start=start, whole_start=start, rows=count)

    def _meeting(self) -> CountExchange | _Alone:
        if self._world is None or self._how.size == 1:
            return _Alone()
        if self._exchange is None:
            self._exchange = CountExchange(self._world)
        return self._exchange

    def _compare(self, first: Any) -> None:
        """Compares the ranks' first batches, once."""
        if self._compared or self._world is None or self._how.size == 1:
            return
        self._compared = True
        check_first_batches(self._world.gather_json(0 if first is END else edge_mark(first)), self._split)


class _Alone:
    """The exchange of one rank."""

    def begin(self, count: int | None) -> None:
        self._count = count

    def end(self) -> list[int | None]:
        return [self._count]

    def shared(self, batch: Any, counts: list[int | None], split: str) -> tuple[Any, int]:
        return batch, counts[0] or 0


class _Reading:
    """One pass over the rank's batches, one at a time; those without a sample are left out.

    Attributes:
        read: batches that were read.
        count: samples of the last one.
        seen: samples of all ranks in the global batches so far.
        at: where the stream was before the batch that was fetched last, and that batch; None where nobody keeps it.
        common: the generators' states while the loader draws, which are the same on all ranks as a pass begins.
    """

    def __init__(  # noqa: PLR0913 - keyword-only after what is read
        self,
        source: Iterable[Any],
        common: CommonRandomness,
        size_of: Callable[[Any], int],
        limit: int | None,
        keeper: Any,
        *,
        keeps: bool,
    ) -> None:
        self.read = self.count = self.seen = 0
        self.at: Place | None = None
        self.common, self._size_of, self._limit = common, size_of, limit
        self._keeper, self._keeps = keeper, keeps
        self._peeked: Any = None
        with common():
            self._iterator = iter(source)

    def fetch(self) -> Any:
        """Returns the next batch with samples; END after the last."""
        before = None
        if self._keeps:  # asked before the next batch is read, and before a peeked one
            before = self._first if self._peeked is not None else self._now()
            before.seen = self.seen
        found: Any = END
        while found is END and (self._limit is None or self.read < self._limit):
            batch = self._next()
            if batch is END:
                break
            self.read += 1
            self.count = self._size_of(batch)
            found = batch if self.count else END
        if before is not None:
            before.following = found
        self.at = before
        return found

    def peek(self) -> int:
        """Returns the mark of the next batch with samples, which stays the next one; 0 where there is none."""
        self._first = self._now()
        with_samples = END
        read = self.read
        while with_samples is END and (batch := self._next()) is not END:
            read += 1
            with_samples = batch if self._size_of(batch) else END
        self.read = read - (with_samples is not END)
        self._peeked = with_samples
        return mark_of(with_samples)

    def skip(self, count: int) -> None:
        """Reads so many batches for nothing."""
        while self.read < count and self._next() is not END:
            self.read += 1

    @property
    def is_cut(self) -> bool:
        """Whether it ended before the loader did."""
        return self._limit is not None and self.read >= self._limit

    def close(self) -> None:
        """Lets go of the iterator, with its workers."""
        self._iterator = iter(())

    def _now(self) -> Place:
        return Place(self.read, self.seen, state_of(self._keeper), self.common.state)

    def _next(self) -> Any:
        peeked, self._peeked = self._peeked, None
        if peeked is not None:
            return peeked
        with self.common():
            return next(self._iterator, END)


def _opened(batch: Any) -> Any:
    return batch.batch if type(batch) is Collated else batch
