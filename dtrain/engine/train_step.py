"""One train step, of either kind, on one rank.

::

    imperative:   train_step(model, *batch)                  # does backward, step and zero_grad itself
    declarative:  loss = train_step(model, *batch)
                  before the first micro-batch of a group: optimizer.zero_grad()
                  loss.backward()
                  after the last micro-batch of a group: optimizer.step()

The weight makes the average over ranks and the sum over a group's micro-batches the gradient of the mean over all
samples. It is applied to the gradients on their way into `param.grad`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.data.batches import BatchFunctions
from dtrain.data.partition import RankBatch
from dtrain.distributed.consistency import check_optimizers, check_takes
from dtrain.distributed.fsdp_settings import Sharding
from dtrain.distributed.world import World
from dtrain.engine import refusals as kinds
from dtrain.engine.accumulation import CLIP, TOUCHED, GradientAccumulator, OwnChanges, refusal
from dtrain.engine.backward import BackwardStep, parameters_of
from dtrain.engine.hooks import Hook
from dtrain.engine.loss_form import LossForm
from dtrain.engine.metrics import Value
from dtrain.engine.nan_guard import FiniteLoss, WhenNan
from dtrain.engine.optimizer_switch import follow, is_optimizer
from dtrain.engine.options import RunOptions
from dtrain.engine.step_contract import (
    Kind,
    LostGradients,
    Step,
    StepValues,
    call_step,
    has_graph,
    kind_of,
    missing_loss,
    never_learns,
    never_steps,
    scaled_gradients,
    watch_backward,
)
from dtrain.engine.step_counter import StepCounter
from dtrain.engine.valid_loaders import check_valid_takes, train_steps
from dtrain.engine.value_counts import ToldForms, ValueCounts
from dtrain.errors import UsageError
from dtrain.model.attributes import check_materialized
from dtrain.model.clip import Clipping
from dtrain.model.compile import wanted
from dtrain.model.ddp import Replica
from dtrain.model.fsdp import ShardedReplica, check_values, refuse_averaging, refuse_compiling, refuse_others
from dtrain.model.optimizers import place_states
from dtrain.model.precision import chosen, scaler_of
from dtrain.model.untracked_batchnorm import synced_training
from dtrain.provenance.code import Code

logger = logging.getLogger(__name__)

Interval = Literal["epoch", "step"]
Taking = Callable[[RankBatch], dict[str, Value]]

_IDLE_STEPS = 5  # train steps that may leave their batch out before there was one that did not

_NOTHING = contextlib.nullcontext()


@dataclass
class Task:
    """What is to be trained: the user's objects.

    Attributes:
        module: the net.
        train_step: see `dtrain.engine.step_contract`.
        dl_train: loader of training batches.
        valid_step: like train_step, without learning; needed where there is a `dl_valid`.
        dl_valid: loader of validation batches, or a mapping of names to several; or None.
        optimizer: by default `module.optimizer`; an imperative step may bring its own.
        scheduler: a torch learning-rate scheduler, or None.
        interval: whether the scheduler counts epochs or optimizer steps.
        monitor: the column that ReduceLROnPlateau watches; None for `val_loss`, else `loss`.
        metrics: name -> torchmetrics object; a step's value of that name is what the object is updated with.
        batches: what the user says of the batches of loaders without indices.
        hooks: what the user has called in a run.
        valid_together: whether every rank takes part in every step of validation, so that it may have collectives.
        others: name -> more that has a state to go on from (`state_dict`, `load_state_dict`): a weight average, say.
        code: the sources that a recipe was loaded from; None where there is no recipe.
    """

    module: nn.Module
    train_step: Step
    dl_train: Any
    valid_step: Step | None = None
    dl_valid: Any = None
    optimizer: Optimizer | None = None
    scheduler: Any = None
    interval: Interval = "epoch"
    monitor: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    batches: BatchFunctions = field(default_factory=BatchFunctions)
    others: dict[str, Any] = field(default_factory=dict)
    hooks: Sequence[Hook] = ()
    valid_together: bool = False
    code: Code | None = None

    def __post_init__(self) -> None:
        """Takes the optimizer from the net and puts it there, so that steps find it."""
        if self.dl_valid is not None and self.valid_step is None:
            raise UsageError("there is a validation loader but no valid_step. Define one, or remove the loader.")
        check_materialized(self.module)
        kinds.refuse_loss_as_layer(self.module)
        found = getattr(self.module, "optimizer", None)
        # Such as a mapping of several optimizers, which the step finds there.
        self.keeps_others = found is not None and not is_optimizer(found) and self.optimizer is None
        if self.optimizer is None and is_optimizer(found):
            self.optimizer = found
        elif self.optimizer is not None and found is not self.optimizer:
            self.module.optimizer = self.optimizer  # type: ignore[assignment]


class Learner:
    """Takes a task's train steps.

    Args:
        task: the user's objects; an optimizer that only the step knows is put there once it was seen.
        world: the ranks.
        options: how the run computes.
        nan: what is done about a loss that is not finite.
        sharding: how the net is sharded, where there are several ranks; None for a whole net on each.

    Attributes:
        kind: the kind of the train step, known after the first one that learns.
        told_kind: called with it, before the optimizer steps where that is dtrain's to do.
        finite: looks at the losses.
        steps: counts the optimizer steps.
        planned: what rests on one optimizer step for each batch (or group of them), in words; nothing else.
        first: the task's optimizer as it was before the first step.
        scaler: float16's, None with another precision.
    """

    def __init__(
        self,
        task: Task,
        world: World,
        options: RunOptions,
        *,
        nan: WhenNan = "ignore",
        sharding: Sharding | None = None,
    ) -> None:
        self.kind: Kind | None = None
        self.told_kind: list[Callable[[Kind], None]] = []
        self.finite = FiniteLoss(nan, task.module, world)
        self._task, self._steps = task, train_steps(task.train_step, task.dl_train)
        self._world = world
        self._accumulates = options.accumulation > 1
        self._alone = world.size == 1 and not self._accumulates  # each share has the weight 1 and its own step
        in_use = chosen(options.precision, world)
        self._replica: Replica | ShardedReplica
        if sharding is not None and world.size > 1:
            refuse_others(task.others.items())
            refuse_compiling(wanted(options.compile, world))
            refuse_averaging(options.average)
            self._replica = ShardedReplica(task.module, world, in_use, sharding)
        else:
            self._replica = Replica(task.module, world, in_use, options.compile, options.average)
        eager = self._replica.clock is None and not self._replica.sharded
        told = (ValueCounts(world), ToldForms(world)) if world.size > 1 else (None, None)
        self._form = LossForm(task.module, *told, averaged=not self._alone, warns=world.is_main, eager=eager)
        self.scaler = scaler_of(in_use, world)
        place_states(task.module, [] if task.optimizer is None else [task.optimizer])
        self.steps = StepCounter(task)
        self.planned = ""
        self.first = task.optimizer
        self._checked = 0  # of the optimizers seen, those that were found right
        self._idle, self._idle_values = 0, dict[str, Value]()
        self._learnt = False
        self._known: list[Optimizer] = []
        self._lost = LostGradients(task.module)
        self._held: GradientAccumulator | None = None
        self._own: OwnChanges | None = None
        self._clip = options.clip
        self._clipping: Clipping | None = None
        self._values_of = StepValues(task.module, "train", task.metrics)
        compiled = self._replica.clock is not None
        self._synced = synced_training(task.module, world, options.sync_batchnorm, compiled=compiled)
        gradients = None if isinstance(self._replica, ShardedReplica) else self._replica.gradients
        self._descend = BackwardStep(
            task,
            world,
            self.finite,
            synced=self._synced,
            scaler=self.scaler,
            leaves=self._leaves,
            settle=self._replica.settle,
            gradients=gradients,
        )

    def learn(self, rank_batch: RankBatch, way: Taking | None = None) -> dict[str, Value]:
        """Takes one train step and returns its values by name; the first one shows which kind it is.

        Args:
            rank_batch: this rank's part of the batch.
            way: takes it in place of `take`: with `compute`, or by a graph of it.

        Raises:
            StepError: the step breaks the step contract.
            NotFiniteError: the loss is not, and the run shall stop then.
        """
        if self.finite.skips:
            self.finite.begin(rank_batch)
        self.steps.begin()
        values = self.take(rank_batch) if way is None else way(rank_batch)
        if self.kind == "imperative":  # the other kind is looked at before backward
            self._followed(values, rank_batch)
        self.steps.end()
        if self.steps.found != self._checked:
            self._check_optimizers()
        if self.planned and self.kind == "imperative" and not self._accumulates:
            kinds.check_planned(self.planned, self.steps.taken, came=self.steps.waiting.came_last)
        return values

    def compute(self, rank_batch: RankBatch) -> dict[str, Value]:
        """What the device does in a declarative step of one rank, without what is looked at in first steps only."""
        values = self._values_of(call_step(self._steps[rank_batch.loader], self._task.module, rank_batch.batch))
        if "loss" not in values:
            raise missing_loss(values)
        self._descend(values["loss"], rank_batch)
        return values

    def take(self, rank_batch: RankBatch) -> dict[str, Value]:
        """Takes the step itself, without what follows its optimizer's steps."""
        if self._alone and self.kind is not None:  # the same as below, without what is then idle
            values = self._values_of(call_step(self._steps[rank_batch.loader], self._task.module, rank_batch.batch))
            if self.kind == "declarative":
                self._go_down(values, rank_batch)
            return values
        with self._replica.averaging(rank_batch), self._synced or _NOTHING:
            if self.kind is None:
                return self._learn_first(rank_batch)
            if self.kind == "imperative":
                return self._imperative(rank_batch)
            with self._own(rank_batch) if self._own is not None else _NOTHING:
                values = self._call(rank_batch)
            self._go_down(values, rank_batch)
            return values

    def _go_down(self, values: dict[str, Value], rank_batch: RankBatch) -> None:
        if self.steps.stepped and self.steps.counted:
            raise kinds.changed_kind()
        if "loss" not in values:
            raise missing_loss(values)
        if not self._alone:
            self._form.look_at(values["loss"], rank_batch)
        self._descend(values["loss"], rank_batch)

    def _followed(self, values: dict[str, Value], rank_batch: RankBatch) -> None:
        """After an imperative step: its loss, what it was held back from or left out, and whose optimizer it is."""
        self.finite.check(values.get("loss"), rank_batch)
        if self._held is not None:
            self._held.end(rank_batch)
        elif not self.steps.counted:
            kinds.refuse_unused_loss(values.get("loss"))
            if not self.steps.found:
                self._lost.expect_step()
        follow(self._task, self._world.size)

    def check_learnt(self) -> None:
        """After the first epoch: some optimizer must have stepped by then, whoever made it.

        Raises:
            StepError: none has.
        """
        if self._learnt:
            return
        if self.kind is None and self._idle:
            raise never_learns(self._idle_values, self._idle)
        self._learnt = True
        stepped = self.steps.seen
        if self.kind != "imperative":  # its optimizer is dtrain's to step, which some reason may have forbidden
            return
        if not self.steps.found:
            raise never_steps("the whole epoch")
        check_optimizers(stepped, self._task.module, self._world.size)
        if self._task.optimizer is None and stepped:
            self._task.optimizer = stepped[0]

    def _check_optimizers(self) -> None:
        """An optimizer has stepped for the first time, in whatever epoch."""
        self._checked = self.steps.found
        check_optimizers(self.steps.seen, self._task.module, self._world.size)

    def optimizers(self) -> list[Optimizer]:
        """Returns the task's optimizer and those that were seen to step besides."""
        own = [] if self._task.optimizer is None else [self._task.optimizer]
        return list({id(optimizer): optimizer for optimizer in (*own, *self._known, *self.steps.seen)}.values())

    def knows(self, optimizers: list[Optimizer]) -> None:
        """Tells of optimizers that step besides the task's."""
        self._known += optimizers

    @property
    def replica(self) -> Replica | ShardedReplica:
        """The rank's copy of the net."""
        return self._replica

    def close(self) -> None:
        """Lets go of the net and of what watches the optimizers."""
        self._replica.close()
        for watcher in (self.steps, self._clipping, self._held, self._descend):
            if watcher is not None:
                watcher.close()

    def _learn_first(self, rank_batch: RankBatch) -> dict[str, Value]:
        task = self._task
        if not self._idle:
            self._begin(rank_batch)
        with watch_backward(task.module) as (backward, touched):
            values = self._imperative(rank_batch)
        if not has_graph(values.get("loss")):  # a rank that did nothing hears first of those that did
            self._replica.settle(strict=True)
        stepped = bool(self.steps.found) or (self._held is not None and self._held.asked)
        self.kind = kind_of(stepped, bool(backward), values)
        if self.kind is None:
            self._was_idle(values, rank_batch)
            return values
        logger.info("the train step is %s", self.kind)
        for tell in self.told_kind:
            tell(self.kind)
        if self.kind == "declarative":
            self.steps.waiting.leave()
            if self._held is not None:
                self._held.close()
                self._held, self._own = None, OwnChanges(task)
            self._form.look_at(values.get("loss"), rank_batch)
            self._descend(values.get("loss"), rank_batch)
        check_optimizers(self.steps.seen, task.module, self._world.size)
        if self.kind == "imperative":
            self.finite.refuse_imperative()
            kinds.refuse_scaling(self.scaler)
            kinds.refuse_weights(values.get("loss"), several=self._accumulates or self._world.size > 1)
            if self._accumulates and not rank_batch.last and touched():
                raise refusal(TOUCHED, CLIP)
        return values

    def _begin(self, rank_batch: RankBatch) -> None:
        """Before the first train step."""
        task = self._task
        self._descend.take_hooks()
        check_takes(self._steps[rank_batch.loader], rank_batch.batch, "train")
        check_valid_takes(task.valid_step, task.dl_train, task.dl_valid, rank_batch.batch)  # not after a whole epoch
        if self._clip:
            self._clipping = Clipping(self._clip, parameters_of(task))
        if self._accumulates:
            leaves = list(self._replica.leaves()) if self._replica.sharded else None
            self._held = GradientAccumulator(task, leaves, averaged=self._world.size > 1)
            self.steps.waiting.leave()  # what a step leaves behind is refused
        else:
            self.steps.waiting.always |= bool(self.planned)
            self.steps.waiting.watch()

    def _was_idle(self, values: dict[str, Value], rank_batch: RankBatch) -> None:
        """The step has learnt nothing from a batch, and its kind is not known yet: it may leave a few out."""
        self._idle, self._idle_values = self._idle + 1, values
        if self._idle >= _IDLE_STEPS or (self._accumulates and not (rank_batch.first and rank_batch.last)):
            raise never_learns(values, self._idle, accumulates=self._accumulates)

    def _imperative(self, rank_batch: RankBatch) -> dict[str, Value]:
        if self._synced is not None:
            self._synced.scale = rank_batch.scale
        # What is held back weights the gradients itself.
        held = self._held(rank_batch) if self._held is not None else scaled_gradients(self._leaves(), rank_batch.scale)
        with held:
            values = self._call(rank_batch)
        if isinstance(self._replica, ShardedReplica):
            self._replica.apart()  # what a call after its backward gathered
        return values

    def _leaves(self) -> Iterable[Tensor]:
        """Where the gradients of what learns arrive."""
        return self._replica.leaves() if self._replica.sharded else parameters_of(self._task)

    def _call(self, rank_batch: RankBatch) -> dict[str, Value]:
        if self._synced is not None:
            self._synced.counts = rank_batch.count > 0
        with self._replica.training() as model, self._form.of_step(rank_batch):
            returned = call_step(self._steps[rank_batch.loader], model, rank_batch.batch)
        values = self._values_of(returned)
        if self._replica.sharded:
            check_values(values.values())
        return values
