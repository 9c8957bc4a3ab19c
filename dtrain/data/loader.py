"""One rank's view of a loader: its own part of each batch, in an order that is the same on any number of ranks.

How batches are dealt out is in `dtrain.data.partition`; here is what they are dealt from: a map-style DataLoader, of
which the indices are dealt, so that a rank fetches its own samples alone, or any other iterable of batches.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from dtrain.data.batches import BatchFunctions
from dtrain.data.dataloaders import has_indices
from dtrain.data.device_data import DeviceStore
from dtrain.data.fingerprints import sample_fingerprints
from dtrain.data.indexed import IndexedBatches, under
from dtrain.data.loader_group import LoaderGroup
from dtrain.data.partition import BatchOps, RankBatch, ShardSpec, shard_batches
from dtrain.data.rank_shards import (
    NO_PARITY,
    DataSharding,
    refuse_global,
    says_whole,
    shards_itself,
    tell_rank,
    whole_read,
)
from dtrain.data.rank_stream import RankStream
from dtrain.data.sources import Sources
from dtrain.data.stream import LengthCheck, Stream, length_of
from dtrain.data.worker_seeds import let_workers_go
from dtrain.data.workers import WorkerStarter, check_workers_find_recipe, has_workers
from dtrain.distributed.seeding import CommonRandomness, derive
from dtrain.distributed.world import World
from dtrain.errors import UsageError

logger = logging.getLogger(__name__)

T = TypeVar("T")


def do_nothing() -> None:
    """Does nothing."""


class ShardedLoader:
    """One rank's view of a loader.

    Args:
        loader: a DataLoader, or any iterable of batches that starts anew each epoch.
        how: rank, size and mode.
        seed: the run's seed; the order is derived from it and the epoch.
        split: "train" or "valid".
        fetch_batches: whether whole batches are fetched at once where that gives the same.
        same_order: whether every epoch has the first one's order.
        functions: what the user says of the batches of a loader without indices.
        fixed: whether a batch that is a list is known to be parts; see `dtrain.data.batches`.
        sharding: who shards a loader without indices; see `dtrain.data.rank_shards`.
        world: the ranks; None where only questions are asked, or every rank reads the same.
        store: keeps the data on the rank's device; None where they stay where they are.

    Attributes:
        prefetch: whether its batches are copied to the device by the side; see `dtrain.engine.device_copy`.
        on_device: in words, whether its data are on the device, or why not; "" where that is no question.
        own: whether the loader shards itself, so that each rank reads batches of its own.
        varied: whether the first global batch of the next passes is cut into unequal parts; see
            `dtrain.data.partition`.
        order_state: of each generator that the user gave the loader, by its id, the state as the pass began.
        on_pass: called with the number of a pass that begins within an epoch.
        position: where a loader that goes on over the ends of epochs is; None for one that begins anew.

    Raises:
        UsageError: the loader was already sharded by another library, or shards itself where that cannot be used.
    """

    def __init__(  # noqa: PLR0913 - keyword-only after what is dealt, and how
        self,
        loader: Any,
        how: ShardSpec,
        seed: int,
        split: str,
        *,
        fetch_batches: bool = True,
        same_order: bool = False,
        functions: BatchFunctions | None = None,
        fixed: bool = False,
        sharding: DataSharding = "auto",
        world: World | None = None,
        store: DeviceStore | None = None,
    ) -> None:
        self._same_order = same_order
        if type(loader).__module__.startswith("accelerate."):
            raise UsageError(
                f"the {split} loader was prepared by Accelerate already ({type(loader).__name__}) and would be "
                "sharded twice. Pass your own DataLoader, not the prepared one."
            )
        self.loader = loader
        self.varied = False
        self.prefetch = True
        self.on_device = ""
        self.order_state: dict[int, torch.Tensor] = {}
        self.on_pass: Callable[[int], object] = lambda _: None
        self._how = how
        self._seed = seed
        self._split = split
        if isinstance(loader, Dataset):
            raise UsageError(
                f"the {split} loader is a dataset ({type(loader).__name__}), which yields single samples. "
                "Wrap it: DataLoader(dataset, batch_size=32)."
            )
        if isinstance(loader, Mapping) or (isinstance(loader, (list, tuple)) and _holds_loaders(loader)):
            raise UsageError(
                f"the {split} data is a {type(loader).__name__} of {len(loader)} loaders, and should be one loader. "
                "Give several training loaders as a mapping of names to loaders, with train.combine (combine=). Or "
                "join the datasets: DataLoader(ConcatDataset([a, b]), ...), or StackDataset for pairs."
            )
        if not hasattr(loader, "__iter__"):
            raise UsageError(
                f"the {split} loader is a {type(loader).__name__}, which is not iterable. Use a DataLoader, or any "
                "iterable of batches."
            )
        self.sources = Sources(loader, same=same_order)
        self._length = LengthCheck(split, how.rank)
        self._stream = Stream(loader, how, split, functions, fixed=fixed)
        self._indexed = None
        indexed = has_indices(loader)
        sharding = "loader" if sharding == "auto" and functions is not None and functions.by_rank else sharding
        self.own = shards_itself(loader, how, split, sharding, indexed=indexed)
        self._alone = self._rank_stream(how, world)
        self._warns = how.rank == 0 and sharding == "auto" and not isinstance(loader, (list, tuple))
        placed = None
        if store is not None:
            dealt = indexed and not self.own
            placed, self.on_device = store.rows(loader, split, fetch_batches=fetch_batches, indexed=dealt)
        if indexed and not self.own:
            more: dict[str, Any] = {"functions": functions, "fetch_batches": fetch_batches, "placed": placed}
            self._indexed = IndexedBatches(loader, how, self.sources, self._length, split, **more)
        check_workers_find_recipe(loader, split)

    def _rank_stream(self, how: ShardSpec, world: World | None) -> RankStream | None:
        """Returns what reads all batches of the loader for this rank; None where it is shared out by dtrain."""
        loader, split = self.loader, self._split
        if self.own and how.merge > 1:
            raise UsageError(NO_PARITY.format(split, how.merge))
        if self.own and how.mode == "global" and how.size > 1 and split == "train":
            raise refuse_global(split)
        if self.own and (world is not None or how.size == 1):
            tell_rank(loader, how.rank, how.size)
        if (how.size > 1 and not (self.own and world is not None)) or how.merge > 1:
            return None
        if has_indices(loader) and not self.own:
            return None
        found = RankStream(self._stream, how, self.sources, self._length, split, world)
        return found if self.own or (found.keeps and how.fill) else None

    @property
    def place(self) -> Mapping[str, Any] | None:
        """Where this rank's own stream is, for a checkpoint; None for other loaders, which deal again up to there."""
        place = None if self._alone is None else self._alone.place
        return None if place is None else place.saved()

    def resume_at(self, place: Mapping[str, Any] | None) -> None:
        """Has the next pass that skips shares go on from a saved place."""
        if self._alone is not None:
            self._alone.resume = place

    @property
    def indexed(self) -> bool:
        """Whether its indices are dealt, so that each rank fetches its own samples alone."""
        return self._indexed is not None

    @property
    def reads_ahead(self) -> bool:
        """Whether a batch may be asked for before the step of the one before it, since nothing can tell the difference.

        Its workers read further ahead anyway, torch's own sampler draws from a generator of dtrain's, and no part of
        the loader has a state.
        """
        ends = self.position is None  # with its epoch; else a batch that was read ahead would be lost there
        return ends and self._indexed is not None and self._indexed.reads_ahead and not self.sources.stateful()

    @property
    def position(self) -> tuple[int, int] | None:
        """None: each epoch is a pass."""
        return None

    def resume(self, position: Any) -> None:
        """Goes on from a saved `position`, which is None."""

    def enter(self, epoch: int) -> None:
        """An epoch's pass begins: the parts are told of it, and states noted."""
        self.sources.enter(epoch)
        self.order_state = {id(generator): generator.get_state() for generator in self.generators()}

    def pass_of(self, epoch: int) -> int:
        """Returns the number of the pass over the loader that an epoch is in."""
        return epoch

    def ends(self, epoch: int, step: int, updates: int) -> bool:
        """Whether an epoch's pass is known to be over after a train step, the rank's shares being all that it has."""
        return step == self.steps()

    def expected(self, epoch: int, skip: int, updates: int, most: int | None) -> int | None:
        """Returns the rank's shares of an epoch, as far as they are known, with an optimizer step for each group.

        Args:
            epoch: 1 or more.
            skip: shares that are done.
            updates: optimizer steps that were taken so far.
            most: of the run; None for any.
        """
        steps = self.steps()
        if most is None:
            return steps
        bound = skip + (most - updates) * self._how.group
        return bound if steps is None else min(steps, bound)

    def close(self) -> None:
        """The run is over."""

    def steps(self) -> int | None:
        """Returns the number of steps of a pass, None where the loader cannot tell."""
        if self.own and self._how.size > 1:
            return None  # other ranks may have more
        batches = length_of(self.loader if self._indexed is None else self._indexed)
        if batches is None:
            return None
        batches = batches if self._how.limit is None else min(batches, self._how.limit)
        return batches if self._how.mode == "global" else -(-batches // self._how.size)

    def steps_of_epochs(self, epochs: int) -> list[int] | None:
        """Returns the steps of each epoch's pass, which `set_epoch` may change; None where the loader cannot tell."""
        found = self.sources.over_epochs(epochs, self.steps)
        return [steps for steps in found if steps is not None] if None not in found else None

    @property
    def fingerprint(self) -> float:
        """A number that stands for the order of this epoch's first samples; 0 where it is not known."""
        return self._stream.fingerprint if self._indexed is None else self._indexed.fingerprint

    def rows(self, rank_batch: RankBatch) -> list[int]:
        """Returns a fingerprint of each real sample of a share; of its index where it is not known what a sample is."""
        known = sample_fingerprints(self._stream.reader, rank_batch.batch, rank_batch.count) if rank_batch.count else []
        return known or self.index_rows(rank_batch)

    def index_rows(self, rank_batch: RankBatch) -> list[int]:
        """Returns a fingerprint of the index of each real sample of a share; none where the loader has no indices."""
        indices = rank_batch.indices.tolist() if isinstance(rank_batch.indices, torch.Tensor) else rank_batch.indices
        return [zlib.crc32(repr(index).encode()) for index in indices or () if rank_batch.count]

    def iter_batches(self, epoch: int, skip: int = 0, ready: Callable[[], None] = do_nothing) -> Iterator[RankBatch]:
        """Iterates over the rank's shares of one epoch.

        Args:
            epoch: counts from 1.
            skip: so many of the first ones are left out. A map-style loader deals their indices and reads no sample
                of them; any other is read up to there.
            ready: called when the iteration has begun, and drawn what it draws, before the first share is fetched.
        """
        if self.own:
            self._check_world()
            tell_rank(self.loader, self._how.rank, self._how.size)
        self.sources.begin(epoch)
        epoch = 1 if self._same_order else epoch
        seed = self._order(epoch)
        if self._indexed is not None:
            if skip and self.sources.replays:
                self.sources.rewind()
                return _after(self._indexed.iter_batches(seed, epoch, 0, do_nothing, varied=self.varied), skip, ready)
            return self._indexed.iter_batches(seed, epoch, skip, ready, varied=self.varied)
        if self._alone is not None:
            return self._alone.iter_batches(seed, epoch, skip, ready)
        varied = self.varied and self._how.mode == "global"  # other batches cannot always be joined and cut
        dealt = shard_batches(self._read(seed), self._how, self._stream.form, varied=varied)
        return _after(self._stream.plain(dealt), skip, ready)

    def _order(self, epoch: int, cycle: int = 0) -> int:
        """Returns the seed of an epoch's order, and of those with which it begins anew within it."""
        return derive(self._seed, "order", self._split, epoch, *([cycle] if cycle else []))

    def _read(self, seed: int) -> Iterator[Any]:
        """Returns the batches of a loader without indices."""
        if self._warns and self._how.size > 1 and not says_whole(self.loader):
            self._warns = False
            logger.warning(whole_read(self.loader, self._split, self._how.size))
        let_workers_go(self._stream.loader)
        source: Iterable[Any] = self._stream.loader
        source = WorkerStarter(source) if has_workers(source) else source  # type: ignore[arg-type]
        source = self.sources.restarting(source)
        if not isinstance(source, (list, tuple)):  # a list of batches draws nothing at random
            source = under(CommonRandomness(seed), source)
        return self._stream.noted(self._length.checked(source, self.loader))

    def source(self, epoch: int, cycle: int = 0) -> tuple[Iterator[Any], BatchOps[Any]]:
        """Returns a pass's batches, or the indices of these, before they are dealt, and what can be done with them.

        Args:
            epoch: counts from 1.
            cycle: how often the loader was begun anew within it.
        """
        seed = self._order(1 if self._same_order else epoch, cycle)
        return (self._read(seed), self._stream.form) if self._indexed is None else self._indexed.source(seed)

    def opened(self, epoch: int, column: Iterator[RankBatch], before: Callable[[], int]) -> Iterator[RankBatch]:
        """Begins an iteration over the rank's shares of `source`, at once.

        Args:
            epoch: counts from 1.
            column: the shares, as they are dealt.
            before: tells how many were left out, once the first one is asked for.
        """
        if self._indexed is None:
            return self._stream.plain(column)
        return self._indexed.opened(self._order(1 if self._same_order else epoch), epoch, column, before)

    def views(self, split: str) -> dict[str, ShardedLoader]:
        """Returns the loaders that it is made of, by what they are called: this one."""
        return {split: self}

    def _check_world(self) -> None:
        if self._alone is None:
            raise UsageError(
                f"the {self._split} loader shards itself by rank, so the order of its samples over {self._how.size} "
                "ranks is not known. Use one rank, or a loader that yields all samples on every rank."
            )

    def generators(self) -> list[torch.Generator]:
        """Returns the random generators that the user gave the loader or its sampler, which go on over epochs."""
        batches = getattr(self.loader, "batch_sampler", None)
        holders = (self.loader, getattr(self.loader, "sampler", None), batches, getattr(batches, "sampler", None))
        found = [getattr(holder, "generator", None) for holder in holders]
        users = [g for g in found if isinstance(g, torch.Generator) and not getattr(g, "of_dtrain", False)]
        return list({id(generator): generator for generator in users}.values())


def is_own(loader: Any, split: str, rank: int, size: int, sharding: DataSharding) -> bool:
    """Whether a loader shards itself, so that each rank reads batches of its own; see `dtrain.data.rank_shards`."""
    if isinstance(loader, LoaderGroup):
        return False
    how = ShardSpec(rank, size, "per_rank", fill=False)
    return shards_itself(loader, how, split, sharding, indexed=has_indices(loader))


def _after(iter_batches: Iterator[RankBatch], skip: int, ready: Callable[[], None]) -> Iterator[RankBatch]:
    """Reads the first shares and drops them."""
    next(islice(iter_batches, skip, skip), None)
    ready()
    yield from iter_batches


def _holds_loaders(things: Sequence[Any]) -> bool:
    return any(isinstance(thing, DataLoader) for thing in things[:1])
