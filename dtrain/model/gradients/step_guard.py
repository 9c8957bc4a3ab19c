"""What several ranks hold each optimizer's step to: it steps on gradients that were averaged over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dtrain.distributed.consistency import check_optimizers
from dtrain.errors import StepError

if TYPE_CHECKING:
    from dtrain.model.gradients.averaging import GradientAveraging


class StepGuard:
    """Looks at every optimizer that steps on parameters of the nets, right before it does, until it is closed.

    Args:
        averaging: what averages their gradients.
    """

    def __init__(self, averaging: GradientAveraging) -> None:
        self._averaging = averaging
        self._sizes: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._handle = register_optimizer_step_pre_hook(self._before_step)

    def forget(self) -> None:
        """Has all optimizers looked at anew."""
        self._sizes.clear()

    def close(self) -> None:
        """Looks away; closing twice does no harm."""
        self._handle.remove()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before each optimizer's step: its gradients are those that were averaged."""
        if not self._averaging.open or not self._holds(optimizer):
            return None
        if torch._C._current_graph_task_id() != -1:
            raise StepError(
                "an optimizer steps within backward(), before the gradients are averaged over the ranks. Step after "
                "backward() has returned."
            )
        if not self._averaging.sync:
            raise StepError(
                "train.accumulation cannot hold back the optimizer that the train step steps, since it is not "
                "model.optimizer: its gradients are not averaged over the ranks yet. Use model.optimizer in the step, "
                "or return the loss."
            )
        self._averaging.drift.steps += 1
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            return self._with_closure(optimizer, closure, args, kwargs)
        self._averaging.drift.before_step(optimizer, self._averaging.watched.known)
        return None

    def _with_closure(
        self, optimizer: Optimizer, closure: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Has a closure return the loss of the whole global batch, by which line searches go alike on all ranks."""
        self._averaging.fit.misfit("the optimizer steps with a closure")
        if self._averaging.mode == "ddp":
            self._averaging.leave_ddp()

        def averaged() -> Any:
            loss = closure()
            self._averaging.drift.before_step(optimizer, self._averaging.watched.known)
            return self._mean(loss)

        if len(args) > 1:
            return (args[0], averaged, *args[2:]), kwargs
        return args, {**kwargs, "closure": averaged}

    def _mean(self, loss: Any) -> Any:
        """The mean of the ranks' losses with the weights of their samples."""
        if loss is None:
            return None
        kind = loss.dtype if isinstance(loss, Tensor) else self._averaging.world.sum_dtype
        mine = torch.as_tensor(loss, dtype=kind, device=self._averaging.world.device).detach()
        mean = self._averaging.world.sum_(mine * self._averaging.scale) / self._averaging.world.size
        return mean.to(loss.device) if isinstance(loss, Tensor) else float(mean)

    def _holds(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer holds parameters of the nets; then it may hold no other ones."""
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        if self._sizes.get(optimizer) == size:
            return True
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not any(id(parameter) in self._averaging.watched.known for parameter in held):
            return False
        nets = nn.ModuleList(replica.net for replica in self._averaging.watched.replicas)
        check_optimizers([optimizer], nets, self._averaging.world.size)
        names = {id(parameter): name for net in nets for name, parameter in net.named_parameters()}
        for parameter in held:
            if id(parameter) not in self._averaging.watched.known and parameter.requires_grad:
                raise StepError(
                    f"the parameter {names.get(id(parameter))} was added to the net during this pass, so that its "
                    "gradients are not averaged over the ranks. Create all parameters before training; freeze those "
                    "that are trained later with requires_grad_(False)."
                )
        self._sizes[optimizer] = size
        return True
