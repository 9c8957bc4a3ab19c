"""What dtrain does after a declarative train step: backward, and the optimizer's step at the end of a group.

Also in mixed precision with float16, where the loss is scaled up before backward and the gradients down again before
they are clipped and stepped on (torch's GradScaler; a step with gradients that overflowed is left out, on all ranks).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from dtrain.data.partition import RankBatch
from dtrain.distributed.world import World
from dtrain.engine.metrics import Mean, Value
from dtrain.engine.nan_guard import FiniteLoss
from dtrain.engine.optimizer_switch import check_without_closure, follow, no_optimizer
from dtrain.engine.step_contract import has_graph, scaled_gradients
from dtrain.errors import StepError
from dtrain.model.gradient_hooks import GradientHooks
from dtrain.model.gradients.averaging import GradientAveraging
from dtrain.model.sync_batchnorm import SyncedBatchNorm

if TYPE_CHECKING:
    from dtrain.engine.train_step import Task


class BackwardStep:
    """Goes down the gradient of the losses that a task's train step returns.

    Args:
        task: the user's objects.
        world: the ranks.
        finite: looks at the losses.
        synced: has BatchNorm's statistics taken over all ranks; None where each rank has its own.
        scaler: float16's; None else.
        leaves: returns the tensors at which gradients arrive, where these are not the parameters.
        settle: called after the last backward pass of an optimizer step; returns once the gradients are averaged.
        gradients: averages the gradients of whole nets over several ranks; None else.
    """

    def __init__(  # noqa: PLR0913 - keyword-only after the task, the ranks and the losses
        self,
        task: Task,
        world: World,
        finite: FiniteLoss,
        *,
        synced: SyncedBatchNorm | None = None,
        scaler: GradScaler | None = None,
        leaves: Callable[[], Iterable[Tensor]] | None = None,
        settle: Callable[[], None] | None = None,
        gradients: GradientAveraging | None = None,
    ) -> None:
        self._task = task
        self._world = world
        self._finite = finite
        self._synced = synced
        self._scaler = scaler
        self._leaves = leaves or (lambda: parameters_of(task))
        self._settle = settle
        self._counted: Tensor | None = None
        self._stepped = self._within = self._begun = False
        self._scale = 1.0
        self._gradients = gradients
        self._hooks = None if gradients is None else gradients.hooks

    def __call__(self, loss: Value | None, rank_batch: RankBatch) -> None:
        """Backward, and after the last micro-batch of a group the optimizer's step.

        Raises:
            StepError: there is nothing to go down on, or nothing that steps.
            NotFiniteError: the loss is not, and the run shall stop then.
        """
        before = self._task.optimizer
        follow(self._task, self._world.size)
        optimizer = self._task.optimizer
        if optimizer is None:
            raise no_optimizer(self._task.module)
        if not has_graph(loss):
            raise StepError(
                "the train step returned a loss without a graph, after returning one with a graph before. "
                "Return the loss itself at every step, without .item() or .detach()."
            )
        self._finite.check(loss, rank_batch)
        if not self._begun:
            self._begin()
        if optimizer is not before or not self._stepped:
            check_without_closure(optimizer)
        self._scale = rank_batch.scale
        if rank_batch.first:
            optimizer.zero_grad()
        elif optimizer is not before:
            self._check_switched(optimizer, before)
        if isinstance(loss, Mean):
            self._total(loss, rank_batch)
        else:
            self._mean(loss, rank_batch.scale)  # type: ignore[arg-type]
        if rank_batch.last:
            self._step(optimizer)

    def take_hooks(self) -> None:
        """Has the user's hooks found; on several ranks, what averages gradients has them."""
        if self._world.size == 1:
            self._hooks = self._hooks or GradientHooks(lambda: self._within, lambda: self._scale)
            self._hooks.take(self._task.module)

    def _begin(self) -> None:
        """From now on the user's hooks are called with the gradients that the optimizer steps on."""
        self._begun = True
        self.take_hooks()
        if self._hooks is not None:
            self._hooks.held = True

    def close(self) -> None:
        """Lets go of the user's hooks."""
        if self._hooks is not None and self._world.size == 1:
            self._hooks.close()

    def _check_switched(self, optimizer: Optimizer, before: Optimizer | None) -> None:
        """In the midst of a group, what the new one holds besides may have gradients of earlier groups."""
        held = {id(p) for group in (before.param_groups if before is not None else ()) for p in group["params"]}
        if any(p.grad is not None and id(p) not in held for group in optimizer.param_groups for p in group["params"]):
            raise StepError(
                "model.optimizer was changed between two micro-batches of one optimizer step, for one with other "
                "parameters. Change it before an epoch or at the first of train.accumulation batches."
            )

    def _step(self, optimizer: Optimizer) -> None:
        """The optimizer's step, once the gradients of the group are whole."""
        if self._settle is not None:
            self._settle()
        self._stepped = True
        hooks = None if self._hooks is None or self._hooks.first is None else self._hooks
        if self._finite.refuses_step():
            self._counted = None
            if hooks is not None:
                hooks.call_waiting(skipped=True)
            return
        if self._counted is not None:
            self._divide_by_count(optimizer)
        if hooks is not None:
            hooks.call_waiting()
        if self._scaler is None:
            optimizer.step()
            return
        self._scaler.unscale_(optimizer)  # now, since an optimizer that does so itself would do it after the clipping
        if not self._overflows(optimizer):
            self._scaler.step(optimizer)
        self._scaler.update()

    def _overflows(self, optimizer: Optimizer) -> bool:
        """Whether the step is to be left out by an optimizer that would else do so within its own kernel.

        Its step would then look like one that was taken. The others' are left out by the scaler, which looks as well.
        """
        if self._scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
            return False
        found = self._scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        return any(bool(inf) for inf in found.values())

    def _mean(self, loss: Tensor, scale: float) -> None:
        """A plain loss is weighted where an imperative step's is, so that the two kinds agree to the last bit."""
        if self._synced is not None:
            self._synced.scale = scale
        if scale == 1.0:
            self._backward(loss)
            return
        with scaled_gradients(self._leaves(), scale):
            self._backward(loss)

    def _total(self, loss: Mean, rank_batch: RankBatch) -> None:
        """What a `Mean` counted in the whole group is known at its end alone: till then its total is descended on."""
        if self._synced is not None:
            self._synced.scale = 1.0
        how: dict[str, Any] = {"dtype": self._world.sum_dtype, "device": self._world.device}
        # A number is written by a kernel: to copy it to a GPU would wait for the GPU.
        count = loss.count.detach().to(**how) if isinstance(loss.count, Tensor) else torch.full((), loss.count, **how)
        count = count * (rank_batch.count > 0)
        self._counted = count if self._counted is None else self._counted + count
        if self._hooks is not None:
            self._hooks.counted = True
        self._backward(loss.total * (self._world.size if rank_batch.count else 0.0))  # type: ignore[arg-type]

    def _backward(self, loss: Tensor) -> None:
        self._within = True
        if self._gradients is not None:
            self._gradients.deferred = True
        try:
            torch.autograd.backward(loss if self._scaler is None else self._scaler.scale(loss))
        finally:
            self._within = False
            if self._gradients is not None:
                self._gradients.deferred = False

    def _divide_by_count(self, optimizer: Optimizer) -> None:
        everywhere = self._world.sum_(self._counted)  # type: ignore[arg-type]
        self._counted = None
        divisor = torch.where(everywhere == 0, 1, everywhere)  # nothing counted: the gradients are zero as they are
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(divisor)


def parameters_of(task: Task) -> Iterator[nn.Parameter]:
    """Yields all that learns: the net's parameters, and on one rank others that the optimizer may hold besides."""
    yield from task.module.parameters()
    if task.optimizer is not None:
        own = {id(parameter) for parameter in task.module.parameters()}
        for group in task.optimizer.param_groups:
            yield from (parameter for parameter in group["params"] if id(parameter) not in own)
