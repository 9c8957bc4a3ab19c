"""Counts the optimizer steps of a run: the real ones of real optimizers.

What counts: each step of the task's optimizer (`model.optimizer`), and where there is none, of the first one that is
seen. In a train step in which that one takes no step but others of the net's parameters do (a second optimizer that
takes over), the steps of the first of these count. An optimizer of no parameter of the net never counts, nor does a
step that is left out (`train.nan=skip`, float16's overflow) or one outside of the train steps.

What follows a step (the count, the schedule, the average of the weights) is done when its train step is over, or
before the next counted one within the same train step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dtrain.engine.waiting_gradients import WaitingGradients

if TYPE_CHECKING:
    from dtrain.engine.train_step import Task


class StepCounter:
    """Follows the optimizers of a task from its first train step on, until it is closed.

    Args:
        task: the user's objects.

    Attributes:
        found: how many optimizers' step() ran.
        on_step: called for each step that counts.
        taken: the steps of the last train step that counted.
        stepped: whether any optimizer of the net stepped in the last train step.
        waiting: the gradients that no optimizer has stepped on.
    """

    def __init__(self, task: Task) -> None:
        self.found = 0
        self.on_step: Callable[[], None] | None = None
        self.taken = 0
        self.stepped = False
        self.waiting = WaitingGradients(task.module)
        self._task = task
        # Whether they hold parameters of the net, in the order of their first run. One that a train step makes anew for
        # each batch is gone after it, with its state.
        self._own: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()
        self._others: list[Optimizer] = []  # whose steps were taken in this train step, besides the one that counts
        self._owed = self._within = False
        self._handles: list[Any] = []

    def begin(self) -> None:
        """A train step begins."""
        if not self._handles:
            self._handles = [
                register_optimizer_step_pre_hook(self.before),
                register_optimizer_step_post_hook(self._after),
            ]
        self.taken = 0
        self.stepped = False
        self._within = True
        if self.waiting.watching:
            self.waiting.begin()

    @property
    def seen(self) -> list[Optimizer]:
        """The optimizers whose step() ran and that still exist, each once, in the order of their first run."""
        return list(self._own)

    @property
    def counted(self) -> bool:
        """Whether the optimizer whose steps count has stepped in this train step."""
        return self._owed or self.taken > 0

    def settle(self) -> None:
        """What follows the last counted step is done now, if it was not yet."""
        if self._owed:
            self._owed = False
            self.taken += 1
            if self.on_step is not None:
                self.on_step()

    def end(self) -> None:
        """The train step is over."""
        self._within = False
        if self._owed:
            self.settle()
        if self._others:
            if not self.taken:
                for _ in range(sum(one is self._others[0] for one in self._others)):
                    self._owed = True
                    self.settle()
            self._others.clear()
        self.waiting.end(self.stepped)

    def replayed(self) -> None:
        """The optimizer whose steps count has stepped, as part of a graph: its step() was not called."""
        self.stepped = self._owed = True

    def close(self) -> None:
        """Looks away; closing twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self.waiting.unwatch()

    def _counted(self) -> Optimizer | None:
        if self._task.optimizer is not None:
            return self._task.optimizer
        return next((one for one, own in self._own.items() if own), None)

    def before(self, optimizer: Optimizer, *_: Any) -> None:
        """An optimizer is about to step: what follows the last counted step comes before a second one."""
        if self._owed and optimizer is self._counted():
            self.settle()

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._within:
            return
        own = self._own.get(optimizer)
        if not own:  # a group may have been added
            self.found += own is None
            own = self._own[optimizer] = self._holds_own(optimizer)
        if not own:
            return
        self.stepped = True
        self.waiting.stepped(optimizer)
        if optimizer is self._counted():
            self._owed = True
        else:
            self._others.append(optimizer)

    def _holds_own(self, optimizer: Optimizer) -> bool:
        own = {id(parameter) for parameter in self._task.module.parameters()}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])
