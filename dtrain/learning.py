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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.accumulation import CLIP, TOUCHED, HeldBack, refusal
from dtrain.attributes import check_materialized
from dtrain.batches import BatchFunctions
from dtrain.batchnorm import SyncedBatchNorm
from dtrain.checks import batches_alike, check_optimizers, check_takes
from dtrain.clipping import UNLIMITED, Clipping, Limit
from dtrain.compiling import Compile, wanted
from dtrain.counting import StepCounter
from dtrain.ddp import Replica
from dtrain.dealing import Share
from dtrain.descent import Descent, parameters_of
from dtrain.errors import UsageError
from dtrain.finite import FiniteLoss, WhenNan
from dtrain.fsdp.replica import ShardedReplica, check_values, refuse_averaging, refuse_compiling, refuse_others
from dtrain.fsdp.settings import Sharding
from dtrain.gradient_averaging import Way
from dtrain.kinds import check_planned, refuse_loss_as_layer, refuse_scaling, refuse_weights
from dtrain.metrics import Value
from dtrain.optimizers import place_states
from dtrain.precision import Precision, chosen, scaler_of
from dtrain.recomputing import refuse_synced_batchnorm
from dtrain.steps import (
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
from dtrain.switching import follow
from dtrain.world import World

logger = logging.getLogger(__name__)

Interval = Literal["epoch", "step"]

_LOST_STEPS = 100  # a scale of float16's own that is far too large costs some tens
_IDLE_STEPS = 5  # train steps that may leave their batch out before there was one that did not

_NOTHING = contextlib.nullcontext()


@dataclass
class Task:
    """What is to be trained: the user's objects.

    Attributes:
        module: the net.
        train_step: see `dtrain.steps`.
        dl_train: loader of training batches.
        valid_step: like train_step, without learning; needed where there is a `dl_valid`.
        dl_valid: loader of validation batches, or None.
        optimizer: by default `module.optimizer`; an imperative step may bring its own.
        scheduler: a torch learning-rate scheduler, or None.
        interval: whether the scheduler counts epochs or optimizer steps.
        monitor: the column that ReduceLROnPlateau watches; None for `val_loss`, else `loss`.
        metrics: name -> torchmetrics object; a step's value of that name is what the object is updated with.
        batches: what the user says of the batches of loaders without indices.
        others: name -> more that has a state to go on from (`state_dict`, `load_state_dict`): a weight average, say.
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
    others: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Takes the optimizer from the net and puts it there, so that steps find it."""
        if self.dl_valid is not None and self.valid_step is None:
            raise UsageError("there is a validation loader but no valid_step. Define one, or leave the loader out.")
        check_materialized(self.module)
        refuse_loss_as_layer(self.module)
        found = getattr(self.module, "optimizer", None)
        # Such as a mapping of several optimizers, which the step finds there.
        self.keeps_others = found is not None and not hasattr(found, "param_groups") and self.optimizer is None
        if self.optimizer is None and hasattr(found, "param_groups"):
            self.optimizer = found
        elif self.optimizer is not None and found is not self.optimizer:
            self.module.optimizer = self.optimizer  # type: ignore[assignment]


class Learner:
    """Takes a task's train steps.

    Args:
        task: the user's objects; an optimizer that only the step knows is put there once it was seen.
        world: the ranks.
        accumulates: whether several micro-batches make one optimizer step.
        sync_batchnorm: whether BatchNorm takes its statistics over all ranks.
        nan: what is done about a loss that is not finite.
        precision: in which the net's forward computes; by default that of Accelerate's settings.
        clip: how long a gradient may be.
        compile: as for `dtrain.ddp.Replica`.
        sharding: how the net is sharded, where there are several ranks; None for a whole net on each.
        averaging: how the gradients of whole nets are averaged; see `dtrain.gradient_averaging`.

    Attributes:
        kind: the kind of the train step, known after the first one that learns.
        told_kind: called with it, before the optimizer steps where that is dtrain's to do.
        finite: looks at the losses.
        steps: counts the optimizer steps.
        planned: what rests on one optimizer step for each batch (or group of them), in words; nothing else.
        first: the task's optimizer as it was before the first step.
        scaler: float16's, None with another precision.
    """

    def __init__(  # noqa: PLR0913 - keyword-only after the task and the ranks
        self,
        task: Task,
        world: World,
        *,
        accumulates: bool,
        sync_batchnorm: bool = False,
        nan: WhenNan = "ignore",
        precision: Precision | None = None,
        clip: Limit = UNLIMITED,
        compile: Compile | None = None,
        sharding: Sharding | None = None,
        averaging: Way = "auto",
    ) -> None:
        self.kind: Kind | None = None
        self.told_kind: list[Callable[[Kind], None]] = []
        self.finite = FiniteLoss(nan, task.module, world)
        self._task = task
        self._world = world
        self._accumulates = accumulates
        self._alone = world.size == 1 and not accumulates  # each share has the weight 1 and its own optimizer step
        in_use = chosen(precision, world)
        self._replica: Replica | ShardedReplica
        if sharding is not None and world.size > 1:
            refuse_others(task.others.items())
            refuse_compiling(wanted(compile, world))
            refuse_averaging(averaging)
            self._replica = ShardedReplica(task.module, world, in_use, sharding)
        else:
            self._replica = Replica(task.module, world, in_use, compile, averaging)
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
        self._held: HeldBack | None = None
        self._clip = clip
        self._clipping: Clipping | None = None
        self._values_of = StepValues(task.module, "train", task.metrics)
        self._synced = SyncedBatchNorm(world) if sync_batchnorm and world.size > 1 else None
        if self._synced is not None:
            self._refuse_beside_synced()
        self._descend = Descent(
            task,
            world,
            self.finite,
            synced=self._synced,
            scaler=self.scaler,
            leaves=self._leaves,
            settle=self._replica.settle,
        )

    def learn(self, share: Share) -> dict[str, Value]:
        """Takes one train step and returns its values by name; the first one shows which kind it is.

        Raises:
            StepError: the step breaks the step contract.
            NotFiniteError: the loss is not, and the run shall stop then.
        """
        if self.finite.skips:
            self.finite.begin(share)
        self.steps.begin()
        values = self._learn(share)
        if self.kind == "imperative":  # the other kind is looked at before backward
            self._followed(values, share)
        self.steps.end()
        if len(self.steps.seen) != self._checked:
            self._check_optimizers()
        if self.planned and self.kind == "imperative" and not self._accumulates:
            check_planned(self.planned, self.steps.taken, came=self.steps.waiting.came_last)
        return values

    def _learn(self, share: Share) -> dict[str, Value]:
        if self._alone and self.kind is not None:  # the same as below, without what is then idle
            values = self._values_of(call_step(self._task.train_step, self._task.module, share.batch))
            if self.kind == "declarative":
                self._descend(self._loss_of(values), share)
            return values
        with self._replica.averaging(share), self._synced or _NOTHING:
            if self.kind is None:
                return self._learn_first(share)
            if self.kind == "imperative":
                return self._imperative(share)
            values = self._call(share)
            self._descend(self._loss_of(values), share)
            return values

    def _loss_of(self, values: dict[str, Value]) -> Value:
        if "loss" not in values:
            raise missing_loss(values)
        return values["loss"]

    def _followed(self, values: dict[str, Value], share: Share) -> None:
        """After an imperative step: its loss, what it was held back from, and whether it changed the optimizer."""
        self.finite.check(values.get("loss"), share)
        if self._held is not None:
            self._held.end(share)
        elif not self.steps.seen:
            self._expect_step()
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
        if not stepped:
            raise never_steps("the whole epoch")
        check_optimizers(stepped, self._task.module, self._world.size)
        if self._task.optimizer is None:
            self._task.optimizer = stepped[0]

    def _expect_step(self) -> None:
        """Ends, long before a long epoch does, what only computes gradients.

        Raises:
            StepError: no optimizer has stepped in so many train steps, and the gradients of each were cleared.
        """
        lost = self._lost()
        if lost >= _LOST_STEPS:
            raise never_steps(f"{lost} train steps")

    def _check_optimizers(self) -> None:
        """An optimizer has stepped for the first time, in whatever epoch."""
        self._checked = len(self.steps.seen)
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
        for watcher in (self.steps, self._clipping, self._held):
            if watcher is not None:
                watcher.close()

    def _learn_first(self, share: Share) -> dict[str, Value]:
        task = self._task
        if not self._idle:
            self._begin(share)
        with watch_backward(task.module) as (backward, touched):
            values = self._imperative(share)
        if not has_graph(values.get("loss")):  # a rank that did nothing hears first of those that did
            self._replica.settle(strict=True)
        stepped = bool(self.steps.seen) or (self._held is not None and self._held.asked)
        self.kind = kind_of(stepped, bool(backward), values)
        if self.kind is None:
            self._was_idle(values, share)
            return values
        logger.info("the train step is %s", self.kind)
        for tell in self.told_kind:
            tell(self.kind)
        if self.kind == "declarative":
            self.steps.waiting.leave()
            if self._held is not None:
                self._held.close()
                self._held = None
            self._descend(values.get("loss"), share)
        check_optimizers(self.steps.seen, task.module, self._world.size)
        if self.kind == "imperative":
            self.finite.refuse_imperative()
            refuse_scaling(self.scaler)
            refuse_weights(values.get("loss"), several=self._accumulates or self._world.size > 1)
            if self._accumulates and not share.last and touched():
                raise refusal(TOUCHED, CLIP)
        return values

    def _begin(self, share: Share) -> None:
        """Before the first train step."""
        task = self._task
        check_takes(task.train_step, share.batch, "train")
        if task.valid_step is not None and batches_alike(task.dl_train, task.dl_valid):
            check_takes(task.valid_step, share.batch, "valid")  # now, not after a whole epoch
        if self._clip:
            self._clipping = Clipping(self._clip, parameters_of(task))
        if self._accumulates:
            leaves = list(self._replica.leaves()) if self._replica.sharded else None
            self._held = HeldBack(task, leaves, averaged=self._world.size > 1)
            self.steps.waiting.leave()  # what a step leaves behind is refused
        else:
            self.steps.waiting.always |= bool(self.planned)
            self.steps.waiting.watch()

    def _was_idle(self, values: dict[str, Value], share: Share) -> None:
        """The step has learnt nothing from a batch, and its kind is not known yet: it may leave a few out."""
        self._idle, self._idle_values = self._idle + 1, values
        if self._idle >= _IDLE_STEPS or (self._accumulates and not (share.first and share.last)):
            raise never_learns(values, self._idle, accumulates=self._accumulates)

    def _refuse_beside_synced(self) -> None:
        refuse_synced_batchnorm(self._task.module)
        if self._replica.clock is not None:
            raise UsageError(
                "train.compile and train.sync_batchnorm do not go together: compiled BatchNorm layers have no place "
                "where the ranks could meet. Leave one of the two out."
            )

    def _imperative(self, share: Share) -> dict[str, Value]:
        if self._synced is not None:
            self._synced.scale = share.scale
        # What is held back weights the gradients itself.
        with self._held(share) if self._held is not None else scaled_gradients(self._leaves(), share.scale):
            values = self._call(share)
        if isinstance(self._replica, ShardedReplica):
            self._replica.apart()  # what a call after its backward gathered
        return values

    def _leaves(self) -> Iterable[Tensor]:
        """Where the gradients of what learns arrive."""
        return self._replica.leaves() if self._replica.sharded else parameters_of(self._task)

    def _call(self, share: Share) -> dict[str, Value]:
        if self._synced is not None:
            self._synced.counts = share.count > 0
        with self._replica.training() as model:
            returned = call_step(self._task.train_step, model, share.batch)
        values = self._values_of(returned)
        if self._replica.sharded:
            check_values(values.values())
        return values
