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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.accumulation import HeldBack
from dtrain.batchnorm import SyncedBatchNorm
from dtrain.checks import check_optimizers, check_takes
from dtrain.ddp import Replica
from dtrain.dealing import Share
from dtrain.errors import StepError, UsageError
from dtrain.finite import FiniteLoss, WhenNan
from dtrain.metrics import Mean, Value
from dtrain.steps import (
    HOW_TO_LEARN,
    Kind,
    OptimizerWitness,
    Step,
    StepValues,
    call_step,
    has_graph,
    kind_of,
    scaled_gradients,
    watch_backward,
)
from dtrain.world import World

logger = logging.getLogger(__name__)

Interval = Literal["epoch", "step"]

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
        metrics: name -> torchmetrics object; a step's value of that name is what the object is updated with.
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
    metrics: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Takes the optimizer from the net and puts it there, so that steps find it."""
        if self.dl_valid is not None and self.valid_step is None:
            raise UsageError("there is a validation loader but no valid_step. Define one, or leave the loader out.")
        found = getattr(self.module, "optimizer", None)
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

    Attributes:
        kind: the kind of the train step, known after the first one.
        finite: looks at the losses.
    """

    def __init__(
        self, task: Task, world: World, *, accumulates: bool, sync_batchnorm: bool = False, nan: WhenNan = "ignore"
    ) -> None:
        self.kind: Kind | None = None
        self.finite = FiniteLoss(nan, task.module, world)
        self._task = task
        self._world = world
        self._accumulates = accumulates
        self._alone = world.size == 1 and not accumulates  # each share has the weight 1 and its own optimizer step
        self._replica = Replica(task.module, world)
        if task.optimizer is not None:
            _move_state(task.optimizer)
        self._witness: OptimizerWitness | None = None
        self._known: list[Optimizer] = []
        self._held: HeldBack | None = None
        self._counted: Tensor | None = None
        self._values_of = StepValues(task.module, "train", task.metrics)
        self._synced = SyncedBatchNorm(world) if sync_batchnorm and world.size > 1 else None

    def learn(self, share: Share) -> dict[str, Value]:
        """Takes one train step and returns its values by name; the first one shows which kind it is.

        Raises:
            StepError: the step breaks the step contract.
            NotFiniteError: the loss is not, and the run shall stop then.
        """
        if self.finite.skips:
            self.finite.begin(share)
        values = self._learn(share)
        if self.kind == "imperative":  # the other kind is looked at before backward
            self.finite.check(values.get("loss"), share)
        return values

    def _learn(self, share: Share) -> dict[str, Value]:
        if self._alone and self.kind is not None:  # the same as below, without what is then idle
            values = self._values_of(call_step(self._task.train_step, self._task.module, share.batch))
            if self.kind == "declarative":
                self._descend(values.get("loss"), share)
            return values
        with self._replica.averaging(share.last), self._synced or _NOTHING:
            if self.kind is None:
                return self._learn_first(share)
            if self.kind == "imperative":
                return self._imperative(share)
            values = self._call(share)
            self._descend(values.get("loss"), share)
            return values

    def check_learnt(self) -> None:
        """After the first epoch: some optimizer must have stepped by then, whoever made it.

        Raises:
            StepError: none has.
        """
        if self._witness is None:
            return
        self._witness.close()
        stepped, self._witness = self._witness.optimizers, None
        self.knows(stepped)
        if not stepped:
            raise StepError(
                "the train step calls backward(), but no optimizer's step() ran in the whole epoch: "
                f"nothing is learnt. {HOW_TO_LEARN}"
            )
        check_optimizers(stepped, self._task.module, self._world.size)
        if self._task.optimizer is None:
            self._task.optimizer = stepped[0]

    def optimizers(self) -> list[Optimizer]:
        """Returns the task's optimizer and those that were seen to step besides."""
        own = [] if self._task.optimizer is None else [self._task.optimizer]
        seen = [] if self._witness is None else self._witness.optimizers
        return list({id(optimizer): optimizer for optimizer in (*own, *self._known, *seen)}.values())

    def knows(self, optimizers: list[Optimizer]) -> None:
        """Tells of optimizers that step besides the task's."""
        self._known += optimizers

    @property
    def replica(self) -> Replica:
        """The rank's copy of the net."""
        return self._replica

    def close(self) -> None:
        """Lets go of the net and of what watches the optimizers."""
        self._replica.close()
        if self._witness is not None:
            self._witness.close()

    def _learn_first(self, share: Share) -> dict[str, Value]:
        task = self._task
        check_takes(task.train_step, share.batch, "train")
        self._witness = OptimizerWitness()
        if self._accumulates:
            self._held = HeldBack(task.optimizer, task.module)
        with watch_backward(task.module) as (backward, touched):
            values = self._imperative(share)
        stepped = bool(self._witness.optimizers) or (self._held is not None and self._held.asked)
        self.kind = kind_of(stepped, bool(backward), values.get("loss"))
        logger.info("the train step is %s", self.kind)
        if self.kind == "declarative":
            self._descend(values.get("loss"), share)
        check_optimizers(self._witness.optimizers, task.module, self._world.size)
        if self.kind == "imperative":
            self.finite.refuse_imperative()
            self._refuse_what_it_cannot_weight(share, values.get("loss"), touched())
        if self._accumulates and not share.last and self._witness.optimizers:
            raise StepError(
                "train.accumulation cannot hold back the optimizer that the train step steps, since it is not "
                "model.optimizer. Use model.optimizer in the step, or return the loss."
            )
        return values

    def _refuse_what_it_cannot_weight(self, share: Share, loss: Value | None, touched: bool) -> None:
        several = self._accumulates or self._world.size > 1
        if several and isinstance(loss, Mean):
            raise StepError(
                "the train step calls backward() itself and returns its loss as dtrain.Mean: on several ranks or with "
                "accumulation its gradient cannot be given that weight. Return the Mean with its graph and leave "
                "backward, step and zero_grad to dtrain."
            )
        if self._accumulates and not share.last and touched:
            raise StepError(
                "the train step changes the gradients after backward() (clips them?), which with train.accumulation "
                "are only a part of the batch's. Return the loss and leave the rest to dtrain, or set accumulation=1."
            )

    def _imperative(self, share: Share) -> dict[str, Value]:
        if self._synced is not None:
            self._synced.scale = share.scale
        held = self._held(share) if self._held is not None else _NOTHING
        with held, scaled_gradients(self._parameters(), share.scale):
            return self._call(share)

    def _call(self, share: Share) -> dict[str, Value]:
        if self._synced is not None:
            self._synced.counts = share.count > 0
        with self._replica.training() as model:
            returned = call_step(self._task.train_step, model, share.batch)
        return self._values_of(returned)

    # --- declarative ----------------------------------------------------------------------------------

    def _descend(self, loss: Value | None, share: Share) -> None:
        """Backward, and after the last micro-batch of a group the optimizer's step."""
        optimizer = self._task.optimizer
        if optimizer is None:
            raise StepError(
                "the train step returns a loss with its graph, for dtrain to step on, but there is no optimizer. "
                "Define build_optimizer(model), or set model.optimizer."
            )
        if not has_graph(loss):
            raise StepError(
                "the train step returned a loss without a graph, after returning one with a graph before. "
                "Return the loss itself at every step, without .item() or .detach()."
            )
        self.finite.check(loss, share)
        if share.first:
            optimizer.zero_grad()
        if isinstance(loss, Mean):
            self._descend_total(loss, share)
        else:
            self._descend_mean(loss, share.scale)  # type: ignore[arg-type]
        if share.last:
            self._step(optimizer)

    def _step(self, optimizer: Optimizer) -> None:
        """The optimizer's step, once the gradients of the group are whole."""
        if self.finite.refuses_step():
            self._counted = None
            return
        if self._counted is not None:
            self._divide_by_count(optimizer)
        optimizer.step()

    def _descend_mean(self, loss: Tensor, scale: float) -> None:
        """A plain loss is weighted where an imperative step's is, so that the two kinds agree to the last bit."""
        if self._synced is not None:
            self._synced.scale = scale
        if scale == 1.0:
            torch.autograd.backward(loss)
            return
        with scaled_gradients(self._parameters(), scale):
            torch.autograd.backward(loss)

    def _descend_total(self, loss: Mean, share: Share) -> None:
        """What a `Mean` counted in the whole group is known at its end alone: till then its total is descended on."""
        if self._synced is not None:
            self._synced.scale = 1.0
        how: dict[str, Any] = {"dtype": self._world.sum_dtype, "device": self._world.device}
        # A number is written by a kernel: to copy it to a GPU would wait for the GPU.
        count = loss.count.detach().to(**how) if isinstance(loss.count, Tensor) else torch.full((), loss.count, **how)
        count = count * (share.count > 0)
        self._counted = count if self._counted is None else self._counted + count
        torch.autograd.backward(loss.total * (self._world.size if share.count else 0.0))  # type: ignore[arg-type]

    def _parameters(self) -> Iterator[nn.Parameter]:
        """All that learns: the net's parameters, and on one rank others that the optimizer may hold besides."""
        yield from self._task.module.parameters()
        if self._task.optimizer is not None:
            own = {id(parameter) for parameter in self._task.module.parameters()}
            for group in self._task.optimizer.param_groups:
                yield from (parameter for parameter in group["params"] if id(parameter) not in own)

    def _divide_by_count(self, optimizer: Optimizer) -> None:
        everywhere = self._world.sum_(self._counted)  # type: ignore[arg-type]
        self._counted = None
        divisor = torch.where(everywhere == 0, 1, everywhere)  # nothing counted: the gradients are zero as they are
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(divisor)


def _move_state(optimizer: Optimizer) -> None:
    """Moves what an optimizer made before the net was moved (Adagrad's sums, say) to where its parameters are."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = value.to(parameter.device)
