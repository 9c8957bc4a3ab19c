"""A pass over a split: where it is, the batches on their device, and the whole of validation."""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from dtrain.data.batches import takes_fixed_parts
from dtrain.data.combined import sharded
from dtrain.data.device_data import DeviceStore
from dtrain.data.loader import ShardedLoader
from dtrain.data.loader_group import mixes
from dtrain.data.partition import RankBatch, ShardSpec
from dtrain.distributed.consistency import (
    check_first_batch,
    check_order,
    check_takes,
)
from dtrain.distributed.world import World
from dtrain.engine.callback import Callbacks, each
from dtrain.engine.device_copy import mover_of
from dtrain.engine.facts import PassFacts, RunFacts
from dtrain.engine.metrics import MeanTable, PassResult, Value
from dtrain.engine.options import RunOptions
from dtrain.engine.position import Limits, StartPosition, TrainPosition
from dtrain.engine.random_draws import StepDraws
from dtrain.engine.step_contract import Step, StepValues, no_grad_step
from dtrain.engine.train_step import Task
from dtrain.engine.valid_loaders import column_of, split_of
from dtrain.errors import UsageError
from dtrain.model.compile import CompileClock
from dtrain.model.gather import PRESENT
from dtrain.model.sync_batchnorm import SyncedBatchNorm
from dtrain.model.untracked_batchnorm import PartStatistics

NOBODY = Callbacks()
_NOTHING = contextlib.nullcontext()


def batches_on_device(  # noqa: PLR0913, PLR0917 - called at one place with all of them
    loader: ShardedLoader,
    world: World,
    place: TrainPosition,
    skip: int = 0,
    ready: Callable[[], None] | None = None,
    done: Callable[[], bool] = lambda: False,
    draws: StepDraws | None = None,
    calls: Callbacks = NOBODY,
    *,
    together: bool = True,
) -> Iterator[RankBatch]:
    """Yields the rank's shares of the epoch that the place names, on its device; keeps the place up to date.

    Args:
        loader: the rank's view of a loader.
        world: the ranks.
        place: where the run is.
        skip: so many of the first shares are left out.
        ready: called once the iteration has begun, before the first share is fetched.
        done: whether the pass ends before its loader does; asked before each share is fetched.
        draws: leads the random numbers between a share and the next one; None leaves them alone.
        calls: are called around the wait for each share.
        together: whether every rank takes part in every step.
    """
    number = loader.pass_of(place.epoch)
    loader.varied = draws is not None and draws.varies(number)
    iter_batches = loader.iter_batches(place.epoch) if ready is None else loader.iter_batches(place.epoch, skip, ready)
    place.step = skip
    if draws is not None:
        draws.begin(place.split, number, skip if loader.position is None else loader.position[1])
        loader.on_pass = functools.partial(draws.begin, place.split)
    iter_batches, arrive = _on_the_way(iter_batches, loader, world, place)
    # Once, before the first step, where a difference between the ranks could still hang them.
    compare = place.split == "train" and not place.compared
    try:
        while not done():
            place.advance()  # also while its batch is fetched
            for hook in calls.on_fetch_start:
                hook()
            rank_batch = next(iter_batches, None)
            for fetched in calls.on_fetch_end:
                fetched(found=rank_batch is not None)
            if compare:
                check_first_batch(world, loader.fingerprint, place.split)
                compare, place.compared = False, True
            if rank_batch is None:
                place.undo_step()
                break
            if arrive is not None:
                arrive(rank_batch)
            PRESENT.rank_batch, PRESENT.together, PRESENT.interrupted = rank_batch, together, False
            if draws is None:
                yield rank_batch
                continue
            draws.enter(rank_batch)
            try:
                yield rank_batch
            finally:
                draws.leave()
    finally:
        PRESENT.rank_batch = None


def _on_the_way(
    shares: Iterator[RankBatch], loader: ShardedLoader, world: World, place: TrainPosition
) -> tuple[Iterator[RankBatch], Callable[[RankBatch], None] | None]:
    """Returns shares, and what has each one's batch on the device; None on the CPU, where they are."""
    mover = mover_of(world.device, prefetch=loader.prefetch)
    if mover is None:
        return shares, None
    ahead = loader.prefetch and loader.reads_ahead

    def arrive(rank_batch: RankBatch) -> None:
        place.recent.append((place.split, place.step, loader.loader, rank_batch.indices))
        if not ahead:
            rank_batch.batch = mover(rank_batch.batch)

    return mover.ahead(shares) if ahead else shares, arrive


def seconds_since(started: float, world: World) -> float:
    """Returns the duration of work that is done, not only sent to the device.

    Args:
        started: `time.perf_counter()` at the beginning.
        world: the rank's device.
    """
    if world.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


class PassWatch:
    """The time of a train pass without what is no part of it: validation within it, steps in which it is compiled.

    Args:
        world: the rank's device.

    Attributes:
        aside: seconds that were no part of it so far.
        untimed: this rank's samples in these.
    """

    def __init__(self, world: World) -> None:
        self.aside = 0.0
        self.untimed = 0
        self._world = world
        self._began = 0.0

    def begin(self, start: StartPosition) -> None:
        """The pass begins, or goes on."""
        self._began = time.perf_counter() - start.seconds
        self.aside, self.untimed = start.aside, start.untimed

    @property
    def so_far(self) -> float:
        """Seconds, by this process's clock."""
        return time.perf_counter() - self._began

    def seconds(self) -> float:
        """Returns the seconds until now, once the device has done what it was sent."""
        return seconds_since(self._began, self._world)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """While inside, what happens is no part of the pass."""
        started = self.seconds()
        try:
            yield
        finally:
            self._leave_out(self.seconds() - started)

    def timed(
        self, learn: Callable[[RankBatch], dict[str, Value]], rank_batch: RankBatch, clock: CompileClock
    ) -> dict[str, Value]:
        """Takes a train step; one in which the net is compiled is left out, with its waits for other ranks."""
        started = self.so_far
        clock.take()  # what a validation compiled
        values = learn(rank_batch)
        if clock.take():
            self._leave_out(self.so_far - started)
            self.untimed += rank_batch.count
        return values

    def _leave_out(self, seconds: float) -> None:
        self._began += seconds
        self.aside += seconds


@dataclass
class ValidPass:
    """Validation: each sample once, on however many ranks.

    It runs on the bare net: DDP's forward would broadcast buffers, which hangs on unequal step counts.

    Attributes:
        module: the net.
        step: the valid step.
        loader: the rank's view of the validation loader.
        world: the ranks.
        metrics: name -> torchmetrics object; the step's value of that name is what the object is updated with.
        names: the values' names, known after the first pass.
        around: returns what a pass runs in: where the net is sharded, it is gathered meanwhile.
        in_step: whether every rank takes part in every step, one without a sample with weight 0, since calls of the
            net are collectives.
        synced: what the steps run in, where BatchNorm takes a batch's statistics; every rank takes part in every
            step then.
        eager: whether calls of the net are not compiled by dtrain.
        draws: leads the steps' random numbers; None leaves them alone.
        name: of its loader, where there are several.
    """

    module: nn.Module
    step: Step
    loader: ShardedLoader
    world: World
    metrics: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] | None = None
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    in_step: bool = False
    draws: StepDraws | None = None
    synced: SyncedBatchNorm | None = None
    eager: bool = True
    name: str = ""

    @property
    def parts(self) -> Sequence[ValidPass]:
        """The passes that validation is made of: this one."""
        return (self,)

    def aside(self) -> ValidPass:
        """Returns a copy that may run within a train pass, which uses the metrics of this one."""
        return replace(self, metrics=copy.deepcopy(dict(self.metrics)))

    def run(
        self, epoch: int, place: TrainPosition, calls: Callbacks, facts: RunFacts | None = None, *, within: bool = False
    ) -> PassResult:
        """Validates once.

        Args:
            epoch: 1 or more; the order of a shuffled loader is derived from it.
            place: is kept up to date.
            calls: what listens.
            facts: of the run, where there is more of it than this pass.
            within: whether a train pass goes on afterwards.

        Returns:
            the means over all samples of all ranks, equal on all of them.

        Raises:
            StepError: the step breaks the contract.
            DataError: the loader yields nothing.
            StopRequested: a callback wanted to leave it, on some rank; all ranks raise it.
        """
        self.module.eval()
        place.enter("valid", epoch, self.name)
        self.loader.sources.enter(epoch)
        table = MeanTable(split_of(self.name), self.names, self.metrics)
        steps, facts = self.loader.steps(), facts or RunFacts(ranks=self.world.size)
        known: dict[str, Any] = {"loader": self.name, "within": within, "run": facts}
        about = PassFacts("valid", epoch, steps, samples=lambda: table.samples, **known)
        each(calls.on_pass_start, about)
        values_of = StepValues(self.module, "valid", self.metrics)
        started = time.perf_counter()
        with self.around():
            shares = batches_on_device(self.loader, self.world, place, draws=self.draws, together=self.in_step)
            for rank_batch in shares:
                first = table.steps == 0 and self.names is None
                if first:
                    check_takes(self.step, rank_batch.batch, "valid")
                with self._in_step(rank_batch, first=first) as under:
                    returned = no_grad_step(self.step, self.module, rank_batch.batch)
                if isinstance(under, PartStatistics):
                    under.warn(self.world)
                table.add(values_of(returned), rank_batch.count, rank_batch.start)
                for on_known in calls.on_values_known if first else ():
                    on_known("valid", tuple(column_of(self.name, name) for name in table.names or ()))
                for progress in calls.on_progress:
                    progress(table)
                for leave in () if self.in_step else calls.on_validation_step:
                    table.left = leave() or table.left
                if table.left:
                    break
        order = self.loader.fingerprint
        result, sums = table.reduce(self.world, seconds_since(started, self.world), (order, order**2))
        self.names = table.names
        check_order(sums[0], sums[1], self.world.size, split_of(self.name))
        return result

    def _in_step(self, rank_batch: RankBatch, *, first: bool) -> AbstractContextManager[Any]:
        """What one step runs in, for BatchNorm's statistics."""
        if self.synced is not None:
            return self.synced.of_part(rank_batch.count, rank_batch.scale)
        return PartStatistics() if first and self.eager and self.world.size > 1 else _NOTHING


def check_starts_anew(epochs: int, *loaders: Any) -> None:
    """Whether loaders can be read in each epoch.

    Raises:
        UsageError: one is used up after the first.
    """
    if epochs > 1 and any(isinstance(loader, Iterator) for loader in loaders):
        raise UsageError(
            f"a loader is exhausted after one epoch, but there are {epochs}: it is an iterator or a generator. "
            "Use a DataLoader, or an object whose __iter__ starts over."
        )


def train_facts(  # noqa: PLR0913, PLR0917 - called at one place with all of them
    epoch: int, steps: int | None, start: StartPosition, table: MeanTable, watch: PassWatch, run: RunFacts
) -> PassFacts:
    """Returns what is told of a train pass that begins."""
    return PassFacts(
        "train",
        epoch,
        steps,
        start.skip,
        start.seconds,
        samples=lambda: table.samples - watch.untimed,
        run=run,
        aside=lambda: watch.aside,
    )


def train_loader(  # noqa: PLR0913, PLR0917 - the engine's own
    task: Task,
    world: World,
    options: RunOptions,
    limits: Limits,
    epoch_steps: int | None = None,
    updates: Callable[[], int] = int,
    *,
    store: DeviceStore | None = None,
) -> ShardedLoader:
    """Returns the rank's view of a task's training loader; the arguments are the engine's."""
    how = ShardSpec(
        world.rank,
        world.size,
        options.batch,
        fill=True,
        group=options.accumulation,
        limit=limits.train,
        merge=limits.merge,
    )
    read: dict[str, Any] = {"functions": task.batches, "fixed": takes_fixed_parts(task.train_step)}
    read |= {"fetch_batches": options.fetch_batches, "same_order": limits.same}
    read |= {"sharding": options.data_sharding, "world": world, "store": store}
    if epoch_steps is not None:
        read |= {"steps": epoch_steps, "updates": updates, "device": world.device}
    view = sharded(task.dl_train, how, options.seed, "train", **read)
    view.prefetch = options.prefetch_to_device
    if options.same_draws and world.size > 1 and mixes(task.dl_train):
        raise UsageError(
            f"same_draws with train.combine={options.combine}: a step has batches of several loaders, and dtrain "
            "cannot tell which of its random numbers are rows of which. Remove same_draws, or use "
            "train.combine=alternate."
        )
    return view
