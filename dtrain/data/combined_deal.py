"""Deals the batches of several loaders, or the indices of these, out to one rank, step by step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from dtrain.data.partition import (
    BatchOps,
    RankBatch,
    ShardSpec,
    cut_to,
    merged,
    part_of,
    rank_share,
    shard_batches,
)
from dtrain.errors import DataError

if TYPE_CHECKING:
    from dtrain.data.loader import ShardedLoader


class Deal:
    """Deals the loaders' batches of one pass out to the rank, together.

    Args:
        loaders: name -> the rank's view of it.
        how: rank, size and mode, for each of them.
        epoch: counts from 1.
        skip: so many of the first steps are left out, once all loaders' iterations have begun.
    """

    def __init__(self, loaders: Mapping[str, ShardedLoader], how: ShardSpec, epoch: int, skip: int) -> None:
        self._loaders, self._how, self._epoch, self._skip = loaders, how, epoch, skip
        self._waiting: dict[str, deque[RankBatch]] = {name: deque() for name in loaders}
        self._order: deque[str] = deque()  # whose batches the steps have
        self._left_out = dict.fromkeys(loaders, 0)
        self._over = False

    def begin(self) -> None:
        """Leaves out the first shares, where that was not done by somebody who reads ahead."""
        shares, self._skip = self._skip, 0
        for _ in range(shares):
            if not self._pull():
                self._over = True
                return
            for name in self._names(self._order.popleft()):
                self._waiting[name].popleft()
                self._left_out[name] += 1

    def column(self, name: str) -> Iterator[RankBatch]:
        """Yields the rank's shares of one loader: of indices, or of batches. It may be ahead of the others."""
        while self._waiting[name] or self._next():
            if self._waiting[name]:
                yield self._waiting[name].popleft()

    def left_out(self, name: str) -> Callable[[], int]:
        """Returns what tells how many shares of a loader were left out, once the first one is asked for."""
        return lambda: self._left_out[name]

    def combined(self, opened: dict[str, Iterator[RankBatch]]) -> Iterator[RankBatch]:
        """Yields the rank's shares of the steps."""
        raise NotImplementedError

    def _next(self) -> bool:
        self.begin()
        self._over = self._over or not self._pull()  # after the end nothing more is drawn, whoever asks how often
        return not self._over

    def _names(self, step: str) -> Sequence[str]:
        """The loaders that a step has a batch of."""
        return (step,)

    def _pull(self) -> bool:
        """Deals the next step; returns whether there was one."""
        raise NotImplementedError

    def _source(self, name: str, cycle: int = 0) -> tuple[Iterator[Any], BatchOps[Any]]:
        """Returns the batches of a loader's pass, limited and joined as the pass is."""
        batches, form = self._loaders[name].source(self._epoch, cycle)
        batches = islice(batches, self._how.limit)
        return (merged(batches, self._how.merge, form) if self._how.merge > 1 else batches), form


class DealInTurn(Deal):
    """The loaders take turns, a global batch each; those that have ended are left out.

    Args:
        loaders, how, epoch, skip: as for `Deal`.
        varied: as for `dtrain.data.partition.shard_batches`, of the first loader.
    """

    def __init__(
        self, loaders: Mapping[str, ShardedLoader], how: ShardSpec, epoch: int, skip: int = 0, *, varied: bool = False
    ) -> None:
        super().__init__(loaders, how, epoch, skip)
        self._seen = 0
        alone = ShardSpec(self._how.rank, self._how.size, self._how.mode, fill=True)
        self._shares: dict[str, Iterator[RankBatch]] = {}
        for name, loader in loaders.items():
            batches, form = self._source(name)
            # As for the loader alone: other batches cannot always be joined and cut.
            varied = varied and (loader.indexed or how.mode == "global")
            self._shares[name] = shard_batches(batches, alone, form, varied=varied)
            varied = False
        self._turns = deque(self._shares)
        self._empty = set(self._shares)

    def _pull(self) -> bool:
        while self._turns:
            name = self._turns.popleft()
            share = next(self._shares[name], None)
            if share is None:
                if name in self._empty:
                    raise _is_empty(name)
                continue
            self._empty.discard(name)
            offset = share.start - share.whole_start
            share.loader, share.whole_start, share.start = name, self._seen, self._seen + offset
            self._seen += share.total
            self._turns.append(name)
            self._waiting[name].append(share)
            self._order.append(name)
            return True
        return False

    def combined(self, opened: dict[str, Iterator[RankBatch]]) -> Iterator[RankBatch]:
        """Yields the rank's shares of the steps."""
        while self._order or self._next():
            yield next(opened[self._order.popleft()])


class DealTogether(Deal):
    """A step has a global batch of each loader, of which each rank has the same share.

    Args:
        loaders, how, epoch, skip: as for `Deal`.
        cycles: whether the pass ends with the longest loader, and others begin anew; else with the shortest.
        idle: called with each loader's samples of a step, and the parts of one ratio that they can be cut into, where
            these are fewer than the ranks.
    """

    def __init__(  # noqa: PLR0913 - keyword-only after what it deals
        self,
        loaders: Mapping[str, ShardedLoader],
        how: ShardSpec,
        epoch: int,
        skip: int = 0,
        *,
        cycles: bool,
        idle: Callable[[Sequence[int], int], None],
    ) -> None:
        super().__init__(loaders, how, epoch, skip)
        self._cycle, self._idle = cycles, idle
        self._passes = {name: self._pass(name) for name in loaders}
        self._cycles = dict.fromkeys(loaders, 0)
        self._ended = set[str]()
        self._seen = dict.fromkeys(loaders, 0)

    def _names(self, step: str) -> Sequence[str]:
        return list(self._waiting)

    def _pass(self, name: str, cycle: int = 0) -> Iterator[tuple[list[Any], list[int], BatchOps[Any]]]:
        """Yields a loader's global batches: the batches that they are made of, the sizes of these, and the form."""
        batches, form = self._source(name, cycle)
        length, found = self._how.size if self._how.mode == "per_rank" else 1, False
        while some := list(islice(batches, length)):
            sizes = [form.size_of(batch) for batch in some]
            if sum(sizes):
                found = True
                yield some, sizes, form
        if not found:
            raise _is_empty(name, cycle)

    def _pull(self) -> bool:
        taken = {name: next(batches, None) for name, batches in self._passes.items()}
        self._ended.update(name for name, found in taken.items() if found is None)
        if len(self._ended) == len(taken) or (self._ended and not self._cycle):
            return False
        for name in [name for name, found in taken.items() if found is None]:
            self._cycles[name] += 1
            self._passes[name] = self._pass(name, self._cycles[name])
            taken[name] = next(self._passes[name])
        self._deal({name: found for name, found in taken.items() if found is not None})
        self._order.append("")
        return True

    def _deal(self, taken: dict[str, tuple[list[Any], list[int], BatchOps[Any]]]) -> None:
        size = self._how.size
        counts = {name: sizes + [0] * (size - len(sizes)) for name, (_, sizes, _) in taken.items()}
        if (self._how.mode == "per_rank" or size == 1) and _in_one_ratio(list(counts.values())):
            for name, (some, _, _) in taken.items():
                self._add_whole(name, some, counts[name])
            return
        totals = {name: sum(sizes) for name, sizes in counts.items()}
        units = math.gcd(*totals.values())
        if units < size:
            self._idle(list(totals.values()), units)
        for name, (some, _, form) in taken.items():
            times = totals[name] // units
            parts = (part_of(units, one, size) for one in range(size))
            counts_of = [(stop - start) * times for start, stop in parts]
            whole = form.join(some)
            self._add(name, cut_to(whole, counts_of, self._seen[name], self._how, form), totals[name])

    def _add_whole(self, name: str, some: list[Any], counts: list[int]) -> None:
        """Gives each rank one of a loader's batches."""
        mine = some[self._how.rank] if counts[self._how.rank] else None
        first = next(batch for batch, count in zip(some, counts, strict=False) if count)
        self._add(name, rank_share(mine, counts, first, self._seen[name], self._how), sum(counts))

    def _add(self, name: str, share: Iterator[RankBatch], total: int) -> None:
        self._waiting[name].append(next(share))
        self._seen[name] += total

    def combined(self, opened: dict[str, Iterator[RankBatch]]) -> Iterator[RankBatch]:
        """Yields the rank's shares of the steps."""
        one = self._how.size == 1
        while self._order or self._next():
            self._order.popleft()
            parts = {name: next(opened[name]) for name in opened}
            by_rank = () if one else [sum(some) for some in zip(*(p.counts for p in parts.values()), strict=True)]
            found = list(parts.values())
            whole = sum(part.whole_start for part in found)
            yield RankBatch(
                {name: part.batch for name, part in parts.items()},
                sum(part.count for part in found),
                sum(part.total for part in found),
                found[0].scale,
                start=whole + sum(part.start - part.whole_start for part in found),
                whole_start=whole,
                rows=sum(part.rows for part in found),
                counts=by_rank,
                parts=parts,
            )


def _in_one_ratio(counts: list[list[int]]) -> bool:
    """Whether each rank has the same share of every loader's samples."""
    first = counts[0]
    return all(
        one * sum(first) == known * sum(other) for other in counts[1:] for one, known in zip(other, first, strict=True)
    )


def _is_empty(name: str, cycle: int = 0) -> DataError:
    if cycle:
        return DataError(
            f"the training loader {name!r} is exhausted after one pass, and with train.combine=max_cycle it begins "
            "anew: it is an iterator or a generator. Use a DataLoader, or an object whose __iter__ starts over.",
            on_all_ranks=True,
        )
    return DataError(f"the training loader {name!r} yielded no batch.", on_all_ranks=True)
