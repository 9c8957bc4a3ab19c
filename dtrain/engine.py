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
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dtrain.agreed_steps import AgreedSteps, check_counts
from dtrain.averaging import WeightAverage
from dtrain.bounds import Limits, Start, Trained
from dtrain.checks import check_order, check_same_task, check_validation
from dtrain.clipping import UNLIMITED, Limit
from dtrain.compiling import Compile
from dtrain.dealing import BatchMode
from dtrain.draws import step_draws
from dtrain.errors import StopRequested, add_place
from dtrain.finite import WhenNan
from dtrain.fsdp.settings import Sharding
from dtrain.gradient_averaging import Way
from dtrain.history import History
from dtrain.launch.heartbeat import DONE, own_heartbeat
from dtrain.learning import Learner, Task
from dtrain.metrics import MeanTable, PassResult
from dtrain.passes import PassWatch, Place, check_starts_anew, shares_on_device, train_facts, train_loader, valid_pass
from dtrain.precision import Precision
from dtrain.progress import Progress, RunFacts, Silent
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
        same_draws: whether random numbers within steps are one process's; None: with batch "global".
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
        began: what the task was at first; see `dtrain.resuming.changed`.
    """

    task: Task
    world: World
    epochs: int
    seed: int = 42
    batch: BatchMode = "per_rank"
    same_draws: bool | None = None
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
    began: Any = None

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
        dealt: dict[str, Any] = {key: getattr(self, key) for key in ("batch", "seed", "limits", "fetch_batches")}
        self.train_loader = train_loader(self.task, self.world, accumulation=self.accumulation, **dealt)
        in_step = self.sharding is not None and not self.sharding.validate_whole
        self.valid = valid_pass(self.task, self.world, in_step=in_step, **dealt)
        valid = self.task.dl_valid
        check_starts_anew(self.epochs, self.task.dl_train, valid)
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
        self.draws, draws = step_draws(self.world, self.seed, self.learner.replica, self.batch, self.same_draws)
        self.counts = AgreedSteps(self.world, self.place, self.max_steps, self.val_every_steps)
        self.stopping_place: Callable[[Place], None] | None = None
        if self.valid is not None:
            self.valid.around, self.valid.draws = self.learner.replica.validating, draws
        self.average = None if self.ema_decay is None else WeightAverage(self.task.module, self.ema_decay)
        self.within = within_epochs(
            self.val_every_steps,
            self.valid,
            self.world,
            self.place,
            self.generators,
            self._averaged,
            lambda: self.validations,
            self.watch,
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
        self.rates.begin()
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
            if self.draws is not None:
                self.draws.leave()
            self.progress.close()
            self.learner.close()
            self.history.sync()
            self.validations.sync()
        self.counts.tell_unreached(self.epochs, self.updates_in_all())
        if self.place.heartbeat is not None:
            self.place.heartbeat.enter(DONE)  # what comes now is the caller's own
        return self.history

    @property
    def spent(self) -> bool:
        """Whether all optimizer steps that there were to be have been taken."""
        return self.max_steps is not None and self.place.updates >= self.max_steps

    def updates_in_all(self) -> int | None:
        """Returns the optimizer steps of the whole run; None where the loader cannot tell its length."""
        epochs = self.train_loader.steps_of_epochs(self.epochs)
        total = None if epochs is None else sum(-(-steps // self.accumulation) for steps in epochs)
        if self.max_steps is None:
            return total
        return self.max_steps if total is None else min(total, self.max_steps)

    @property
    def is_over(self) -> bool:
        """Whether the last epoch has been run to its end."""
        return self.place.split == "checkpoint" and (self.stopping or self.place.epoch == self.epochs)

    def heed(self, stopping: Stopping) -> None:
        """Lets a request to stop end training: after a group of train steps or an epoch, or in validation."""
        self.stopping_place = stopping.step
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
        self._tell_step(stepped=True)

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

    def _tell_step(self, *, stepped: bool) -> None:
        if self.stopping_place is not None:
            self.stopping_place(self.place)
        for tell in self.after_step if stepped else ():
            tell(self.place)

    def _count_step(self) -> None:
        """An optimizer step that counts was taken."""
        self.rates.step("step")
        self.place.updates += 1
        if self.average is not None:
            self.average.update()

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
        self.train_loader.sources.enter(epoch)
        self.order_state = [generator.get_state() for generator in self.generators()]
        self.table = table = MeanTable("train", self.names, self.task.metrics)
        if start.table is not None:
            table.load(start.table, self.world.device)
        clock, learner = self.learner.replica.clock, self.learner
        learner.steps.on_step = self._count_step
        self._begin_pass(epoch, start, table)
        compare = self.world.size > 1 and self.accumulation == 1
        # The streams are put back after the iteration has begun, which draws from them.
        ready = start.randomness if start.skip else None
        done = lambda: self.spent  # noqa: E731
        for share in shares_on_device(self.train_loader, self.world, self.place, start.skip, ready, done, self.draws):
            if self.within is not None and self.within.is_due and self._is_last(self.place.step - 1):  # it was not
                self.within.run(self.progress, self.facts)
            values = learner.learn(share) if clock is None else self.watch.timed(learner.learn, share, clock)
            if self.draws is not None:
                self.draws.leave()
            table.add(values, share.count)
            self.place.taken = learner.steps.taken
            if compare and learner.kind == "imperative":
                self.counts.after()
            self.progress.step(table)
            if table.asked is not None:
                learner.finite.check_running(table)
            if self.place.taken:
                self._after_update()
            if share.last:
                self._tell_step(stepped=self.place.taken > 0)
        self.table = None
        return self._end_pass(epoch, table)

    def _after_update(self) -> None:
        for look in self.after_update:
            look(self.place)
        if self.within is not None and self.within.is_due and not self._is_last(self.place.step):
            self.within.run(self.progress, self.facts)

    def _is_last(self, step: int) -> bool:
        """Whether the epoch's own validation comes after a step."""
        return self.spent or step == self.train_loader.steps()

    def _begin_pass(self, epoch: int, start: Start, table: MeanTable) -> None:
        self.watch.begin(start)
        self.progress.begin(train_facts(epoch, self._expected(start), start, table, self.watch, self.facts))
        # Where a stop came into it:
        if self.within is not None and start.skip and self.within.is_due and not self._is_last(start.skip):
            if start.randomness is not None:
                start.randomness()
            self.place.step = start.skip
            self.within.run(self.progress, self.facts)

    def _end_pass(self, epoch: int, table: MeanTable) -> PassResult:
        module, world = self.task.module, self.world
        seconds, watch = self.watch.seconds(), self.watch
        order, updates = self.train_loader.fingerprint, self.place.updates
        extras = (order, order**2, watch.aside, watch.untimed, updates, updates**2)
        result, sums = table.reduce(world, seconds, extras)
        self.names = tuple(result.means)
        self.learner.finite.check_mean(result.means.get("loss"), f"epoch {epoch}, over all ranks,")
        check_order(sums[0], sums[1], world.size, "train")
        if world.size * sums[5] != sums[4] ** 2:
            check_counts(world.gather_json(updates))
        self.learner.replica.compare()
        self.learner.check_learnt()
        # DDP keeps rank 0's buffers (BatchNorm's statistics) for all while it trains; so does what comes after.
        world.broadcast_(list(module.buffers()))
        return replace(result, aside=sums[2] / world.size, untimed=round(sums[3]))

    def _expected(self, start: Start) -> int | None:
        """Returns this rank's shares of the epoch, as far as they are known, with one optimizer step for each group."""
        steps = self.train_loader.steps()
        if self.max_steps is None:
            return steps
        most = start.skip + (self.max_steps - self.place.updates) * self.accumulation
        return most if steps is None else min(steps, most)

    def generators(self) -> list[torch.Generator]:
        """Returns the generators that the user gave the loaders or their samplers."""
        loaders = [self.train_loader] + ([] if self.valid is None else [self.valid.loader])
        return list({id(generator): generator for loader in loaders for generator in loader.generators()}.values())
