"""The loop that all styles share.

::

    for epoch in 1 .. epochs:
        model.train()
        for share in train loader:            # this rank's part of the global batch
            values = learner.learn(share)     # train_step, and what it leaves to do; see `dtrain.engine.train_step`
            add the returned values, with the weight of the real samples
            after an optimizer step: validation, where it is due within the epoch
        sum over ranks, once; compare the ranks' weights
        net.eval()                            # the bare net, not DDP
        for share in valid loader: add valid_step(net, *batch)
        sum over ranks, once
        append a row to the history

What listens to it, from progress to checkpoints: `dtrain.engine.callback`, which says what is called where.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dtrain.data.device_data import device_store
from dtrain.data.loader_group import mixes
from dtrain.data.partition import RankBatch
from dtrain.distributed.consistency import check_order
from dtrain.distributed.fsdp_settings import Sharding
from dtrain.distributed.seeding import derive, seed_everything
from dtrain.distributed.world import World
from dtrain.engine.agreed_steps import AgreedSteps, check_counts
from dtrain.engine.averaged import follow, weight_average
from dtrain.engine.callback import Callbacks, each
from dtrain.engine.captured_step import captured_step
from dtrain.engine.device_errors import explain_errors
from dtrain.engine.device_memory import peak_memory
from dtrain.engine.facts import RunFacts
from dtrain.engine.lengths import check_epochs, run_updates
from dtrain.engine.loader_checks import check_loaders
from dtrain.engine.metrics import MeanTable, PassResult, Value
from dtrain.engine.modes import Modes
from dtrain.engine.nan_guard import WhenNan
from dtrain.engine.options import RunOptions
from dtrain.engine.passes import PassWatch, batches_on_device, train_facts, train_loader
from dtrain.engine.position import FinishedPass, Limits, StartPosition, TrainPosition
from dtrain.engine.random_draws import step_draws
from dtrain.engine.rates import Rates
from dtrain.engine.rows import epoch_row, warn_unused_metrics, with_columns
from dtrain.engine.step_contract import Kind
from dtrain.engine.synced_metrics import ready
from dtrain.engine.train_step import Learner, Task
from dtrain.engine.valid_loaders import by_name, first_loss
from dtrain.engine.valid_passes import valid_pass
from dtrain.engine.validation import within_epochs
from dtrain.errors import DtrainError, StopRequested, add_place, add_remark
from dtrain.launch.monitor.heartbeat import DONE, own_heartbeat
from dtrain.model.compile import CompileClock
from dtrain.rundir.history import History

Row = dict[str, Any]
_UNEQUAL = (
    "the ranks' parts of the first batch are unequal, to tell random numbers of rows from others. A step that needs "
    "equal ones, as with a state that it carries from batch to batch: train.same_draws=false"
)


@dataclass
class Engine:
    """Trains a task on the ranks of a world.

    Attributes:
        task: the user's objects.
        world: the ranks.
        epochs: passes over the training data.
        options: how it computes.
        limits: how much of the data is taken.
        nan: what is done about a train loss that is not finite; see `dtrain.engine.nan_guard`.
        sharding: how the net is sharded over several ranks; None for a whole net on each.
        val_every_steps: optimizer steps from one validation within an epoch to the next; None for none.
        max_steps: optimizer steps after which training ends, with the epoch's row; None where the epochs end it.
        epoch_steps: optimizer steps of an epoch, the next of which goes on with the loader; None for a pass over it.
        history: gets a row an epoch, on every rank.
        validations: gets a row a validation within an epoch, on every rank.
        callbacks: what listens, in its order.
        start: where training begins.
        place: where the engine is.
        table: the values of the train pass that runs; None outside of one.
        watch: the time of that pass.
        facts: what is told to who shows it.
        stopping: whether training ends with the present epoch.
        ended: why, in words, where a callback has ended it.
        ended_by: the key of the config that did; "" for a hook of the user's.
        began: what the task was at first; see `dtrain.checkpoint.trainable`.
    """

    task: Task
    world: World
    epochs: int
    options: RunOptions = field(default_factory=RunOptions)
    limits: Limits = field(default_factory=Limits)
    nan: WhenNan = "ignore"
    sharding: Sharding | None = None
    val_every_steps: int | None = None
    max_steps: int | None = None
    epoch_steps: int | None = None
    history: History = field(default_factory=History)
    validations: History = field(default_factory=History)
    callbacks: Callbacks = field(default_factory=Callbacks)
    start: StartPosition = field(default_factory=StartPosition)
    stopping: bool = False
    ended: str | None = None
    ended_by: str = ""
    began: Any = None

    def __post_init__(self) -> None:
        """Compares the ranks' tasks, deals the loaders out and readies the net."""
        self.place = TrainPosition(self.world.rank, heartbeat=own_heartbeat())
        if self.place.heartbeat is not None:
            self.place.heartbeat.computes_on(str(self.world.device))
        self.table: MeanTable | None = None
        self.watch = PassWatch(self.world)
        self.names: tuple[str, ...] | None = None
        self.rates, self.modes = Rates(self.task), Modes(self.task.module)
        self.facts = RunFacts(self.epochs, self.world.size, self.rates.now, lambda: self.place.updates)
        steps = (self.epoch_steps, lambda: self.place.updates)
        store = device_store(self.options.data_on_device, self.world.device)
        self.train_loader = train_loader(self.task, self.world, self.options, self.limits, *steps, store=store)
        in_step = self.sharding is not None and not self.sharding.validate_whole
        self.valid = valid_pass(self.task, self.world, self.options, self.limits, in_step=in_step, store=store)
        self.task.monitor = self.task.monitor or first_loss(self.task.dl_valid)
        check_epochs(self)
        passes = () if self.valid is None else self.valid.parts
        check_loaders(self.task, self.world, self.train_loader, passes)
        ready(self.task.metrics, self.world)
        self.learner = Learner(self.task, self.world, self.options, nan=self.nan, sharding=self.sharding)
        drawn = (self.options.seed, self.learner.replica, self.options.batch, self.options.same_draws)
        first, *draws = step_draws(self.world, *drawn, loaders=len(passes))
        self.draws = None if self.world.size > 1 and mixes(self.task.dl_train) else first  # else each rank has its own
        self.counts = AgreedSteps(self.world, self.place, self.max_steps, self.val_every_steps, self.epoch_steps)
        for one, own in zip(passes, draws, strict=True):
            one.around, one.draws = self.learner.replica.validating, own
        self.average = weight_average(self.task.module, self.task.optimizer, self.options, self.updates_in_all)
        if self.average is not None:
            self.callbacks.add(follow(self.average))
        self.callbacks.add(explain_errors(self), peak_memory(self.world))
        self.learner.told_kind.append(self._on_step_kind)
        self.captured = captured_step(self)
        known = (self.generators, self.averaged, lambda: self.validations, self.watch)
        self.within = within_epochs(self.val_every_steps, self.valid, self.world, self.place, *known)
        if self.learner.scaler is not None:
            self.task.others = {**self.task.others, "the scaler of float16": self.learner.scaler}

    def fit(self) -> History:
        """Runs all epochs.

        Returns:
            the history; its numbers are equal on all ranks.

        Raises:
            StepError: a step breaks the contract.
            NotFiniteError: a train loss is not finite, and `nan` is "stop".
            StopRequested: a callback asked for it at a save point.
            DataError: a loader yields nothing.
            Exception: whatever the user's code raises, with a note of rank, epoch and step.
        """
        seed_everything(derive(self.options.seed, "rank", self.world.rank))
        self.rates.begin()
        if self.start.randomness is not None and self.start.skip == 0:
            self.start.randomness()
        try:
            self._run_epochs()
        except BaseException as error:
            if not isinstance(error, StopRequested):
                add_place(error, self.place)
                if self.train_loader.varied and self.place.step <= 2 and not isinstance(error, DtrainError):
                    add_remark(error, _UNEQUAL)
            self.callbacks.fail(error)
            raise
        finally:
            self._end()
        self.counts.warn_unreached_limits(self.epochs, self.updates_in_all())
        return self.history

    @property
    def spent(self) -> bool:
        """Whether all optimizer steps that there were to be have been taken."""
        return self.max_steps is not None and self.place.updates >= self.max_steps

    def updates_in_all(self) -> int | None:
        """Returns the optimizer steps of the whole run; None where the loader cannot tell its length."""
        return run_updates(self.train_loader, self.epochs, self.options.accumulation, self.max_steps)

    @property
    def is_over(self) -> bool:
        """Whether the last epoch has been run to its end."""
        return self.place.split == "checkpoint" and (self.stopping or self.place.epoch == self.epochs)

    def stop(self, why: str, by: str = "") -> None:
        """Ends training with the present epoch; to be called on every rank alike.

        Args:
            why: in words.
            by: the key of the config that does; "" for a hook of the user's.
        """
        self.stopping = True
        if self.ended is None:  # the first reason holds
            self.ended, self.ended_by = why, by

    def _run_epochs(self) -> None:
        each(self.callbacks.on_train_start, self)
        for epoch in range(self.start.epoch, self.epochs + 1):
            if self.stopping:
                break
            self._run_epoch(epoch)
        if self.place.heartbeat is not None:
            self.place.heartbeat.enter(DONE)  # what comes now, the last checkpoint and trackers, may take its time
        each(self.callbacks.on_train_end)

    def _end(self) -> None:
        """Lets go of everything, whatever a part of it raises."""
        with contextlib.ExitStack() as ending:  # the last one first
            ending.callback(self.callbacks.close)
            ending.callback(self.validations.sync)
            ending.callback(self.history.sync)
            ending.callback(self.learner.close)
            ending.callback(self.train_loader.close)
            if self.draws is not None:
                ending.callback(self.draws.leave)

    def _run_epoch(self, epoch: int) -> None:
        self.modes.train(warns=epoch == self.start.epoch and self.world.is_main)
        each(self.callbacks.on_epoch_start, epoch)
        trained = self.start.trained if epoch == self.start.epoch else None
        if trained is None:
            trained = FinishedPass(self.train_pass(epoch), self.place.step)
        each(self.callbacks.on_train_pass_end, trained)
        train = trained.result
        self.stopping = self.stopping or self.spent
        valid = self._validated(epoch)
        row = epoch_row(epoch, train, valid, self.rates.of_row())
        for further in self.callbacks.on_epoch_row:
            row = with_columns(row, further(row) or {})
        if epoch == 1 and self.world.is_main:
            warn_unused_metrics(self.task.metrics, row, by_name(self.task.dl_valid) or ("",))
        self.rates.step("epoch", row)
        self.place.enter("checkpoint", epoch)
        self.history.append(row)
        row = self.history.rows[-1]  # with the columns of all rows
        each(self.callbacks.on_epoch_end, row)
        self._end_group(stepped=True)

    def _validated(self, epoch: int) -> PassResult | None:
        if self.valid is None:
            return None
        if self.within is not None and (known := self.within.taken_up()) is not None:
            return known
        with self.averaged():
            return self.valid.run(epoch, self.place, self.callbacks, self.facts)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """While inside, the net has the averaged weights, where there is an average."""
        return contextlib.nullcontext() if self.average is None else self.average.in_place()

    def _end_group(self, *, stepped: bool) -> None:
        each(self.callbacks.on_group_end, self.place)
        if stepped:
            each(self.callbacks.on_save_point, self.place)

    def _count_step(self) -> None:
        """An optimizer step that counts was taken."""
        self.rates.step("step")
        self.place.updates += 1
        for hook in self.callbacks.on_optimizer_step:
            hook()

    def _on_step_kind(self, kind: Kind) -> None:
        each(self.callbacks.on_step_kind, kind)

    # --- training -------------------------------------------------------------------------------------

    def train_pass(self, epoch: int) -> PassResult:
        """Runs one epoch of training.

        Args:
            epoch: 1 or more.

        Returns:
            the means over all samples of all ranks, equal on all of them.
        """
        self.modes.ensure()
        self.place.enter("train", epoch)
        start = self.start if epoch == self.start.epoch else StartPosition(epoch)
        self.train_loader.enter(epoch)
        self.table = table = MeanTable("train", self.names, self.task.metrics)
        if start.table is not None:
            table.load(start.table, self.world.device)
        clock, learner = self.learner.replica.clock, self.learner
        learner.steps.on_step = self._count_step
        self._begin_pass(epoch, start, table)
        compare = self.world.size > 1 and self.options.accumulation == 1
        ready, done = self._bounds(start)
        calls, unknown = self.callbacks, self.names is None
        add = table.add if self.captured is None else self.captured.add
        how = (start.skip, ready, done, self.draws, calls)
        for share in batches_on_device(self.train_loader, self.world, self.place, *how):
            if self.within is not None and self.within.is_due and self._is_last(self.place.step - 1):  # it was not
                self.within.run(calls, self.facts)
            values = self._learn(share, clock)
            add(values, share.count, share.start)
            self.place.taken = learner.steps.taken
            if compare and learner.kind == "imperative":
                self.counts.after()
            if unknown:
                unknown = False
                each(calls.on_values_known, "train", tuple(table.names or ()))
            for progress in calls.on_progress:
                progress(table)
            if table.asked is not None:
                learner.finite.check_running(table)
            if self.place.taken:
                self._end_step()
            if share.last:
                self._end_group(stepped=self.place.taken > 0)
        self.table = None
        self.modes.note()
        return self._end_pass(epoch, table)

    def _bounds(self, start: StartPosition) -> tuple[Callable[[], None] | None, Callable[[], bool]]:
        """Returns what is called once the iteration has begun, and what says that the pass ends before its loader."""
        # The streams are put back after the iteration has begun, which draws from them.
        ready = start.randomness if start.skip else None
        if self.epoch_steps is None:
            return ready, lambda: self.spent
        if ready is not None:
            ready()  # now: a loader that goes on leaves them as they are
        return None, lambda: self._is_last(self.place.step)

    def _learn(self, share: RankBatch, clock: CompileClock | None) -> dict[str, Value]:
        for start in self.callbacks.on_batch_start:
            start(share)
        learn = self.learner.learn if self.captured is None else self.captured.learn
        values = learn(share) if clock is None else self.watch.timed(learn, share, clock)
        if self.draws is not None:
            self.draws.leave()
        for end in self.callbacks.on_batch_end:
            end(share, values)
        return values

    def _end_step(self) -> None:
        each(self.callbacks.on_step_end, self.place)
        if self.within is not None and self.within.is_due and not self._is_last(self.place.step):
            self.within.run(self.callbacks, self.facts)

    def _is_last(self, step: int) -> bool:
        """Whether the epoch's own validation comes after a step."""
        return self.spent or self.train_loader.ends(self.place.epoch, step, self.place.updates)

    def _begin_pass(self, epoch: int, start: StartPosition, table: MeanTable) -> None:
        self.watch.begin(start)
        steps = self.train_loader.expected(epoch, start.skip, self.place.updates, self.max_steps)
        facts = train_facts(epoch, steps, start, table, self.watch, self.facts)
        each(self.callbacks.on_pass_start, facts)
        # Where a stop came into it:
        if self.within is not None and start.skip and self.within.is_due and not self._is_last(start.skip):
            if start.randomness is not None:
                start.randomness()
            self.place.step = start.skip
            self.within.run(self.callbacks, self.facts)

    def _end_pass(self, epoch: int, table: MeanTable) -> PassResult:
        module, world = self.task.module, self.world
        seconds, watch = self.watch.seconds(), self.watch
        order, updates = self.train_loader.fingerprint, self.place.updates
        extras = (order, order**2, watch.aside, watch.untimed, updates, updates**2)
        result, sums = table.reduce(world, seconds, extras)
        self.names = table.names
        self.learner.finite.check_mean(result.means.get("loss"), f"epoch {epoch}, over all ranks,")
        check_order(sums[0], sums[1], world.size, "train")
        if world.size * sums[5] != sums[4] ** 2:
            check_counts(world.gather_json(updates))
        self.learner.replica.compare()
        self.learner.check_learnt()
        # DDP keeps rank 0's buffers (BatchNorm's statistics) for all while it trains; so does what comes after.
        world.broadcast_(list(module.buffers()))
        return replace(result, aside=sums[2] / world.size, untimed=round(sums[3]))

    def generators(self) -> list[torch.Generator]:
        """Returns the generators that the user gave the loaders or their samplers."""
        loaders = [self.train_loader, *([] if self.valid is None else [one.loader for one in self.valid.parts])]
        return list({id(generator): generator for loader in loaders for generator in loader.generators()}.values())
