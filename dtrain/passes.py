"""A pass over a split: where it is, the batches on their device, and the whole of validation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dtrain.batches import takes_fixed_parts
from dtrain.bounds import Limits, Start
from dtrain.checks import check_first_batch, check_order, check_takes
from dtrain.compiling import CompileClock
from dtrain.dealing import BatchMode, Dealing, Share
from dtrain.draws import StepDraws
from dtrain.errors import StopRequested, UsageError
from dtrain.launch.heartbeat import Heartbeat
from dtrain.learning import Task
from dtrain.metrics import MeanTable, PassResult, Value
from dtrain.progress import PassFacts, Progress, RunFacts
from dtrain.sharding import ShardedLoader
from dtrain.steps import Step, StepValues, no_grad_step
from dtrain.stopping import Stopping
from dtrain.world import World


@dataclass
class Place:
    """Where a run is: what an error message and a watchdog want to know."""

    rank: int
    epoch: int = 0
    split: str = ""
    step: int = 0
    updates: int = 0  # optimizer steps since the run began; the same number on all ranks
    taken: int = 0  # of these, in the last train step
    compared: bool = False  # whether the ranks' first batches were found equal
    heartbeat: Heartbeat | None = None  # where a supervisor reads the same

    def __str__(self) -> str:
        """Words such as "rank 1, epoch 2, train step 7"."""
        where = f"{self.split} step {self.step}" if self.step else self.split
        return f"rank {self.rank}, epoch {self.epoch}, {where}"

    def passed(self, every: int) -> bool:
        """Whether the last train step came to a multiple of so many optimizer steps, or went past one."""
        return self.updates % every < max(self.taken, 1)

    def enter(self, split: str, epoch: int) -> None:
        """A pass begins."""
        self.split, self.epoch, self.step = split, epoch, 0
        if self.heartbeat is not None:
            self.heartbeat.enter(split, epoch)

    def advance(self) -> None:
        """The next step begins."""
        self.step += 1
        if self.heartbeat is not None:
            self.heartbeat.step(self.step)

    def retreat(self) -> None:
        """There was no such step: the one before was the last."""
        self.step -= 1
        if self.heartbeat is not None:
            self.heartbeat.step(self.step)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """While inside, another pass may run; then the run is where it was. An error is left at its own place."""
        split, epoch, step = self.split, self.epoch, self.step
        stopped = None
        try:
            yield
        except StopRequested as error:
            stopped = error
        self.enter(split, epoch)
        self.step = step
        if self.heartbeat is not None:
            self.heartbeat.step(step)
        if stopped is not None:
            raise stopped


def shares_on_device(  # noqa: PLR0913, PLR0917 - called at one place with all of them
    loader: ShardedLoader,
    world: World,
    place: Place,
    skip: int = 0,
    ready: Callable[[], None] | None = None,
    done: Callable[[], bool] = lambda: False,
    draws: StepDraws | None = None,
) -> Iterator[Share]:
    """Yields the rank's shares of the epoch that the place names, on its device; keeps the place up to date.

    Args:
        loader: the rank's view of a loader.
        world: the ranks.
        place: where the run is.
        skip: so many of the first shares are left out.
        ready: called once the iteration has begun, before the first share is fetched.
        done: whether the pass ends before its loader does; asked before each share is fetched.
        draws: leads the random numbers between a share and the next one; None leaves them alone.
    """
    shares = loader.shares(place.epoch) if ready is None else loader.shares(place.epoch, skip, ready)
    place.step = skip
    if draws is not None:
        draws.begin(place.split, place.epoch, skip)
    # Once, before the first step, where a difference between the ranks could still hang them.
    compare = place.split == "train" and not place.compared
    while not done():
        place.advance()  # also while its batch is fetched
        share = next(shares, None)
        if compare:
            check_first_batch(world, loader.fingerprint, place.split)
            compare, place.compared = False, True
        if share is None:
            place.retreat()
            return
        share.batch = to_device(share.batch, world)
        if draws is None:
            yield share
            continue
        draws.enter(share)
        try:
            yield share
        finally:
            draws.leave()


def seconds_since(started: float, world: World) -> float:
    """Returns the duration of work that is done, not only sent to the device.

    Args:
        started: `time.perf_counter()` at the beginning.
        world: the rank's device.
    """
    if world.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def to_device(batch: Any, world: World) -> Any:
    """Returns a nested batch on the rank's device; from pinned memory without waiting for it."""
    if world.device.type == "cpu":
        return batch
    from accelerate.utils import send_to_device

    return send_to_device(batch, world.device, non_blocking=True)


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

    def begin(self, start: Start) -> None:
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

    def timed(self, learn: Callable[[Share], dict[str, Value]], share: Share, clock: CompileClock) -> dict[str, Value]:
        """Takes a train step; one in which the net is compiled is left out, with its waits for other ranks."""
        started = self.so_far
        clock.take()  # what a validation compiled
        values = learn(share)
        if clock.take():
            self._leave_out(self.so_far - started)
            self.untimed += share.count
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
        stopping: tells whether a rank was asked to stop; a pass is then left before its end.
        around: returns what a pass runs in: where the net is sharded, it is gathered meanwhile.
        in_step: whether every rank takes part in every step, one without a sample with weight 0, since calls of the
            net are collectives.
        looks: called on each rank with the values' names after the first batch that it ever has.
        draws: leads the steps' random numbers; None leaves them alone.
    """

    module: nn.Module
    step: Step
    loader: ShardedLoader
    world: World
    metrics: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] | None = None
    stopping: Stopping | None = None
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    in_step: bool = False
    looks: list[Callable[[tuple[str, ...]], None]] = field(default_factory=list)
    draws: StepDraws | None = None

    def run(
        self, epoch: int, place: Place, progress: Progress, facts: RunFacts | None = None, *, within: bool = False
    ) -> PassResult:
        """Validates once.

        Args:
            epoch: 1 or more; the order of a shuffled loader is derived from it.
            place: is kept up to date.
            progress: is told of each step.
            facts: of the run, where there is more of it than this pass.
            within: whether a train pass goes on afterwards.

        Returns:
            the means over all samples of all ranks, equal on all of them.

        Raises:
            StepError: the step breaks the contract.
            DataError: the loader yields nothing.
            StopRequested: a rank was asked to stop meanwhile; all ranks raise it.
        """
        self.module.eval()
        place.enter("valid", epoch)
        self.loader.sources.enter(epoch)
        table = MeanTable("valid", self.names, self.metrics)
        steps, facts = self.loader.steps(), facts or RunFacts(ranks=self.world.size)
        progress.begin(PassFacts("valid", epoch, steps, samples=lambda: table.samples, within=within, run=facts))
        values_of = StepValues(self.module, "valid", self.metrics)
        started = time.perf_counter()
        with self.around():
            for share in shares_on_device(self.loader, self.world, place, draws=self.draws):
                first = table.steps == 0 and self.names is None
                if first:
                    check_takes(self.step, share.batch, "valid")
                returned = no_grad_step(self.step, self.module, share.batch)
                table.add(values_of(returned), share.count)
                if first:
                    self._look(table.names or ())
                progress.step(table)
                if self.stopping is not None and self.stopping.asked and not self.in_step:
                    table.left = True
                    break
        order = self.loader.fingerprint
        result, sums = table.reduce(self.world, seconds_since(started, self.world), (order, order**2))
        self.names = tuple(result.means)
        check_order(sums[0], sums[1], self.world.size, "valid")
        return result

    def _look(self, names: tuple[str, ...]) -> None:
        for look in self.looks:
            look(names)


def valid_pass(  # noqa: PLR0913 - keyword-only
    task: Task,
    world: World,
    *,
    batch: BatchMode,
    seed: int,
    limits: Limits | None = None,
    fetch_batches: bool = True,
    in_step: bool = False,
) -> ValidPass | None:
    """Returns a task's validation, None where it has no validation loader; usable without its train loader."""
    if task.dl_valid is None or task.valid_step is None:
        return None
    limits = limits or Limits()
    how = Dealing(world.rank, world.size, batch, fill=in_step, limit=limits.valid, merge=limits.merge)
    read: dict[str, Any] = {"functions": task.batches, "fixed": takes_fixed_parts(task.valid_step)}
    loader = ShardedLoader(task.dl_valid, how, seed, "valid", fetch_batches=fetch_batches, **read)
    return ValidPass(task.module, task.valid_step, loader, world, task.metrics, in_step=in_step)


def check_starts_anew(epochs: int, *loaders: Any) -> None:
    """Whether loaders can be read in each epoch.

    Raises:
        UsageError: one is used up after the first.
    """
    if epochs > 1 and any(isinstance(loader, Iterator) for loader in loaders):
        raise UsageError(
            f"a loader is used up after one epoch, and there are {epochs}: it is an iterator or a generator. "
            "Give a DataLoader, or an object whose __iter__ starts anew."
        )


def train_facts(  # noqa: PLR0913, PLR0917 - called at one place with all of them
    epoch: int, steps: int | None, start: Start, table: MeanTable, watch: PassWatch, run: RunFacts
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


def train_loader(  # noqa: PLR0913 - keyword-only
    task: Task,
    world: World,
    *,
    batch: BatchMode,
    seed: int,
    accumulation: int,
    limits: Limits,
    fetch_batches: bool,
) -> ShardedLoader:
    """Returns the rank's view of a task's training loader; the arguments are the engine's."""
    how = Dealing(world.rank, world.size, batch, fill=True, group=accumulation, limit=limits.train, merge=limits.merge)
    read: dict[str, Any] = {"functions": task.batches, "fixed": takes_fixed_parts(task.train_step)}
    return ShardedLoader(task.dl_train, how, seed, "train", fetch_batches=fetch_batches, same_order=limits.same, **read)
