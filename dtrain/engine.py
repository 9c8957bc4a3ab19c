"""The loop that all styles share.

::

    for epoch in 1 .. epochs:
        model.train()
        for share in train loader:            # this rank's part of the global batch
            values = learner.learn(share)     # train_step, and what it leaves to do; see `dtrain.learning`
            add the returned values, with the weight of the real samples
            after an optimizer step: the `after_update` functions; validation, where it is due within the epoch;
                the `after_step` functions
        sum over ranks, once; compare the ranks' weights
        net.eval()                            # the bare net, not DDP
        for share in valid loader: add valid_step(net, *batch)
        sum over ranks, once
        append a row to the history; tell trackers; the `after_step` functions once more
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dtrain.averaging import WeightAverage
from dtrain.bounds import Limits, Start, Trained
from dtrain.checks import check_order, check_same_task, check_validation
from dtrain.clipping import UNLIMITED, Limit
from dtrain.compiling import Compile
from dtrain.dealing import BatchMode
from dtrain.errors import StopRequested, UsageError, add_place
from dtrain.finite import WhenNan
from dtrain.fsdp.settings import Sharding
from dtrain.gradient_averaging import Way
from dtrain.history import History
from dtrain.launch.heartbeat import DONE, own_heartbeat
from dtrain.learning import Learner, Task
from dtrain.metrics import MeanTable, PassResult
from dtrain.passes import PassWatch, Place, shares_on_device, train_loader, valid_pass
from dtrain.precision import Precision
from dtrain.progress import PassFacts, Progress, RunFacts, Silent
from dtrain.rates import Rates
from dtrain.rows import epoch_row, tell_unused_metrics
from dtrain.seeding import derive, seed_everything
from dtrain.stopping import Stopping
from dtrain.synced import ready
from dtrain.validating import within_epochs
from dtrain.world import World

Row = dict[str, Any]


@dataclass
class Engine:
    """Trains a task on the ranks of a world.

    Attributes:
        task: the user's objects.
        world: the ranks.
        epochs: passes over the training data.
        seed: order of samples, and this rank's random stream, are derived from it.
        batch: whose batch size the loaders' is.
        accumulation: micro-batches that make one optimizer step.
        limits: how much of the data is taken.
        sync_batchnorm: whether BatchNorm takes its statistics over all ranks while it trains.
        fetch_batches: whether whole batches are fetched at once where that gives the same; see `dtrain.fetching`.
        nan: what is done about a train loss that is not finite; see `dtrain.finite`.
        precision: in which the net's forward computes; by default that of Accelerate's settings.
        compile: whether, or in which mode of torch.compile, the net is compiled; by default as Accelerate's say.
        clip: how long a gradient may be.
        sharding: how the net is sharded over several ranks; None for a whole net on each.
        averaging: how gradients are averaged over several ranks; see `dtrain.gradient_averaging`.
        ema_decay: of an average of the weights, with which is validated; None for no average.
        val_every_steps: optimizer steps from one validation within an epoch to the next; None for none.
        max_steps: optimizer steps after which training ends, with the epoch's row; None where the epochs end it.
        history: gets a row an epoch, on every rank.
        validations: gets a row a validation within an epoch, on every rank.
        progress: what a person sees.
        after_epoch: called on every rank with each new row.
        after_update: called on every rank right after each optimizer step, before a validation that is due there; they
            look on, and none of them ends training.
        after_step: called on every rank after each optimizer step and once after each epoch, where `place.split` is
            no longer "train": at the same places on all ranks. One that raises `StopRequested`, on all ranks alike,
            ends training there.
        after_train: called on every rank after each epoch's train pass, before validation.
        save: saves all that is needed to go on from where the engine is, on every rank; called before a
            `StopRequested` leaves the engine.
        start: where training begins.
        place: where the engine is.
        table: the values of the train pass that runs; None outside of one.
        watch: the time of that pass.
        facts: what is told to who shows it.
        order_state: the states of the users' own generators that draw the order, as they were when it began.
        stopping: set by an `after_epoch` function, on every rank alike, to end after that epoch.
        ended: why such a function did so, in words.
    """

    task: Task
    world: World
    epochs: int
    seed: int = 42
    batch: BatchMode = "per_rank"
    accumulation: int = 1
    limits: Limits = field(default_factory=Limits)
    sync_batchnorm: bool = False
    fetch_batches: bool = True
    nan: WhenNan = "ignore"
    precision: Precision | None = None
    compile: Compile | None = None
    clip: Limit = UNLIMITED
    sharding: Sharding | None = None
    averaging: Way = "auto"
    ema_decay: float | None = None
    val_every_steps: int | None = None
    max_steps: int | None = None
    history: History = field(default_factory=History)
    validations: History = field(default_factory=History)
    progress: Progress = field(default_factory=Silent)
    after_epoch: list[Callable[[Row], None]] = field(default_factory=list)
    after_update: list[Callable[[Place], None]] = field(default_factory=list)
    after_step: list[Callable[[Place], None]] = field(default_factory=list)
    after_train: Callable[[Trained], None] | None = None
    save: Callable[[], object] | None = None
    start: Start = field(default_factory=Start)
    stopping: bool = False
    ended: str | None = None

    def __post_init__(self) -> None:
        """Compares the ranks' tasks, deals the loaders out and readies the net."""
        self.place = Place(self.world.rank, heartbeat=own_heartbeat())
        if self.place.heartbeat is not None:
            self.place.heartbeat.computes_on(str(self.world.device))
        self.table: MeanTable | None = None
        self.watch = PassWatch(self.world)
        self.order_state: list[torch.Tensor] = []
        self.names: tuple[str, ...] | None = None
        self.rates = Rates(self.task)
        self.facts = RunFacts(self.epochs, self.world.size, self.rates.now, lambda: self.place.updates)
        self.train_loader = train_loader(
            self.task.dl_train,
            self.world,
            batch=self.batch,
            seed=self.seed,
            accumulation=self.accumulation,
            limits=self.limits,
            fetch_batches=self.fetch_batches,
        )
        self.valid = valid_pass(
            self.task,
            self.world,
            batch=self.batch,
            seed=self.seed,
            limits=self.limits,
            fetch_batches=self.fetch_batches,
            in_step=self.sharding is not None and not self.sharding.validate_whole,
        )
        valid = self.task.dl_valid
        if self.epochs > 1 and any(isinstance(loader, Iterator) for loader in (self.task.dl_train, valid)):
            raise UsageError(
                f"a loader is used up after one epoch, and there are {self.epochs}: it is an iterator or a generator. "
                "Give a DataLoader, or an object whose __iter__ starts anew."
            )
        loaders = {"train": self.task.dl_train} | ({} if valid is None else {"valid": valid})
        check_same_task(self.world, self.task.module, loaders)
        check_validation(self.task.valid_step, valid)
        ready(self.task.metrics, self.world)
        self.learner = Learner(
            self.task,
            self.world,
            accumulates=self.accumulation > 1,
            sync_batchnorm=self.sync_batchnorm,
            nan=self.nan,
            precision=self.precision,
            compile=self.compile,
            clip=self.clip,
            sharding=self.sharding,
            averaging=self.averaging,
        )
        if self.valid is not None:
            self.valid.around = self.learner.replica.validating
        self.average = None if self.ema_decay is None else WeightAverage(self.task.module, self.ema_decay)
        self.within = within_epochs(
            self.val_every_steps,
            self.valid,
            self.world,
            self.place,
            self.generators,
            self._averaged,
            lambda: self.validations,
        )
        if self.learner.scaler is not None:
            self.task.others = {**self.task.others, "the scaler of float16": self.learner.scaler}

    def fit(self) -> History:
        """Runs all epochs.

        Returns:
            the history; its numbers are equal on all ranks.

        Raises:
            StepError: a step breaks the contract.
            NotFiniteError: a train loss is not finite, and `nan` is "stop".
            StopRequested: an `after_step` function asked for it; all is saved where there is a `save`.
            DataError: a loader yields nothing.
            Exception: whatever the user's code raises, with a note of rank, epoch and step.
        """
        seed_everything(derive(self.seed, "rank", self.world.rank))
        if self.task.scheduler is not None and self.task.optimizer is not None:
            # The order is the engine's own. torch would else warn of it where the first step is left out (float16's
            # scale is still too large), or was taken before the run was cut off.
            self.task.optimizer._opt_called = True  # type: ignore[attr-defined]
        if self.start.randomness is not None and self.start.skip == 0:
            self.start.randomness()
        try:
            for epoch in range(self.start.epoch, self.epochs + 1):
                if self.stopping:
                    break
                self._run_epoch(epoch)
        except StopRequested:
            if self.save is not None:
                self.save()
            raise
        except (Exception, SystemExit) as error:
            add_place(error, str(self.place))
            raise
        finally:
            self.progress.close()
            self.learner.close()
            self.history.sync()
            self.validations.sync()
        if self.place.heartbeat is not None:
            self.place.heartbeat.enter(DONE)  # what comes now is the caller's own
        return self.history

    @property
    def spent(self) -> bool:
        """Whether all optimizer steps that there were to be have been taken."""
        return self.max_steps is not None and self.place.updates >= self.max_steps

    def updates_in_all(self) -> int | None:
        """Returns the optimizer steps of the whole run; None where the loader cannot tell its length."""
        steps = self.train_loader.steps()
        total = None if steps is None else -(-steps // self.accumulation) * self.epochs
        if self.max_steps is None:
            return total
        return self.max_steps if total is None else min(total, self.max_steps)

    @property
    def is_over(self) -> bool:
        """Whether the last epoch has been run to its end."""
        return self.place.split == "checkpoint" and (self.stopping or self.place.epoch == self.epochs)

    def heed(self, stopping: Stopping) -> None:
        """Lets a request to stop end training: after an optimizer step or an epoch, or within validation."""
        self.after_step.insert(0, stopping.step)
        if self.valid is not None:
            self.valid.stopping = stopping
        if self.within is not None:
            self.within.heed(stopping)

    def look_at_validation(self, look: Callable[[tuple[str, ...]], None]) -> None:
        """Has the names of the values that validation returns looked at, after its first batch."""
        if self.valid is not None:
            self.valid.looks.append(look)  # the same list as of validation within epochs

    def _run_epoch(self, epoch: int) -> None:
        trained = self.start.trained if epoch == self.start.epoch else None
        if trained is None:
            trained = Trained(self.train_pass(epoch), self.place.step)
        if self.after_train is not None:
            self.after_train(trained)
        train = trained.result
        self.stopping = self.stopping or self.spent
        valid = self._validated(epoch)
        row = epoch_row(epoch, train, valid, self.rates.of_row())
        if epoch == 1 and self.world.is_main:
            tell_unused_metrics(self.task.metrics, row)
        self.rates.step("epoch", row)
        self.place.enter("checkpoint", epoch)
        self.history.append(row)
        self.progress.end_epoch(row)
        for tell in self.after_epoch:
            tell(row)
        self._tell_step()

    def _validated(self, epoch: int) -> PassResult | None:
        if self.valid is None:
            return None
        known = None if self.within is None else self.within.taken_up()
        if known is not None:
            return known
        with self._averaged():
            return self.valid.run(epoch, self.place, self.progress, self.facts)

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.average is None else self.average.in_place()

    def _tell_step(self) -> None:
        for tell in self.after_step:
            tell(self.place)

    # --- training -------------------------------------------------------------------------------------

    def train_pass(self, epoch: int) -> PassResult:
        """Runs one epoch of training.

        Args:
            epoch: 1 or more.

        Returns:
            the means over all samples of all ranks, equal on all of them.
        """
        self.task.module.train()
        self.place.enter("train", epoch)
        start = self.start if epoch == self.start.epoch else Start(epoch)
        self.order_state = [generator.get_state() for generator in self.generators()]
        self.table = table = MeanTable("train", self.names, self.task.metrics)
        if start.table is not None:
            table.load(start.table, self.world.device)
        most = self._most_shares(start)
        steps, clock = self._begin_pass(epoch, start, table, most), self.learner.replica.clock
        # The streams are put back after the iteration has begun, which draws from them.
        ready = start.randomness if start.skip else None
        for share in shares_on_device(self.train_loader, self.world, self.place, start.skip, ready, most):
            values = self.learner.learn(share) if clock is None else self.watch.timed(self.learner.learn, share, clock)
            table.add(values, share.count)
            if share.last:
                self.rates.step("step")
                self.place.updates += 1
                if self.average is not None:
                    self.average.update()
            self.progress.step(table)
            if table.asked is not None:
                self.learner.finite.check_running(table)
            if share.last:
                for look in self.after_update:
                    look(self.place)
                if self.within is not None and self.within.is_due and self.place.step != steps:
                    with self.watch.stopped():
                        self.within.run(self.progress, self.facts)
                self._tell_step()
        self.table = None
        return self._end_pass(epoch, table)

    def _begin_pass(self, epoch: int, start: Start, table: MeanTable, most: int | None) -> int | None:
        """Returns this rank's steps of the pass, where they are known."""
        steps = self.train_loader.steps()
        if most is not None:
            steps = most if steps is None else min(steps, most)
        self.watch.begin(start)
        facts = PassFacts(
            "train",
            epoch,
            steps,
            start.skip,
            start.seconds,
            samples=lambda: table.samples - self.watch.untimed,
            run=self.facts,
            aside=lambda: self.watch.aside,
        )
        self.progress.begin(facts)
        if self.within is not None and start.skip not in (0, steps) and self.within.is_due:  # a stop came into it
            if start.randomness is not None:
                start.randomness()
            self.place.step = start.skip
            with self.watch.stopped():
                self.within.run(self.progress, self.facts)
        return steps

    def _end_pass(self, epoch: int, table: MeanTable) -> PassResult:
        module, world = self.task.module, self.world
        seconds, watch = self.watch.seconds(), self.watch
        order = self.train_loader.fingerprint
        result, sums = table.reduce(world, seconds, (order, order**2, watch.aside, watch.untimed))
        self.names = tuple(result.means)
        self.learner.finite.check_mean(result.means.get("loss"), f"epoch {epoch}, over all ranks,")
        check_order(sums[0], sums[1], world.size, "train")
        self.learner.replica.compare()
        self.learner.check_learnt()
        # DDP keeps rank 0's buffers (BatchNorm's statistics) for all while it trains; so does what comes after.
        world.broadcast_(list(module.buffers()))
        return replace(result, aside=sums[2] / world.size, untimed=round(sums[3]))

    def _most_shares(self, start: Start) -> int | None:
        """Returns after how many shares of the epoch the last optimizer step of the run is taken, if in this one."""
        if self.max_steps is None:
            return None
        return start.skip + (self.max_steps - self.place.updates) * self.accumulation

    def generators(self) -> list[torch.Generator]:
        """Returns the generators that the user gave the loaders or their samplers."""
        loaders = [self.train_loader] + ([] if self.valid is None else [self.valid.loader])
        found = [generator for loader in loaders for generator in loader.generators()]
        return list({id(generator): generator for generator in found}.values())
