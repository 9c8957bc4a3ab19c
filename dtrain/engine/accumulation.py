"""Gradient accumulation for imperative steps: the steps of a group's micro-batches make one optimizer step.

::

    first micro-batch:  zero_grad, backward            step() is held back
    the others:         backward                       zero_grad() is held back as well
    last one:           backward, step, zero_grad

What the gradients add up to is the joined batch's as long as each step does just that: one or more backward(), then
one step() of the task's optimizer. Whatever else a step may do with gradients, weights, optimizers and schedules is
found while it does it, and refused before the optimizer steps on it. The groups and their weights are made by
`dtrain.data.loader`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.autograd import Variable
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dtrain.data.partition import RankBatch
from dtrain.engine.accumulation_guard import Untouched
from dtrain.engine.backward import parameters_of
from dtrain.engine.own_counts import OwnCounts, Rates
from dtrain.errors import StepError
from dtrain.model.hooks import hook_gradient, scaled

if TYPE_CHECKING:
    from dtrain.engine.train_step import Task

RETURN = "Return the loss and leave backward, step and zero_grad to dtrain, or set train.accumulation=1."
TOUCHED = "changes the gradients after backward() (clips them?)"
ALONE = "Set train.accumulation=1."
CLIP = (
    "Return the loss and leave the rest to dtrain, which clips with train.clip_norm or train.clip_value; or set "
    "train.accumulation=1."
)
SCHEDULE = (
    'Give dtrain the schedule: build_scheduler(optimizer) returns (scheduler, "step"); or set train.accumulation=1.'
)


class GradientAccumulator:
    """Holds back what an imperative step does in the midst of a group, and finds what does not add up.

    Args:
        task: the user's objects.
        leaves: where gradients arrive, where that is not at the parameters (a sharded net); None else.
        averaged: whether backward averages the gradients over several ranks, at the end of a group.

    Raises:
        StepError: there is no optimizer to hold back.
    """

    def __init__(self, task: Task, leaves: list[Tensor] | None = None, *, averaged: bool = False) -> None:
        if task.optimizer is None:
            raise StepError(
                "train.accumulation needs to know the optimizer: define build_optimizer(model), or set model.optimizer."
            )
        self._task = task
        self._averaged = averaged
        self._untouched = None if leaves is not None else Untouched(_named(task))
        self._counts = OwnCounts(task)
        self._rates = Rates(task)
        self._share: RankBatch | None = None
        self._arrived = self._stepped = self._queued = False
        self._open = 0  # gradients that were computed and have not come to their parameter
        self._fault = self._hooked_after = ""
        self._handles: list[Any] = [register_optimizer_step_pre_hook(self._any_steps)]
        self._hooked: dict[int, int] = {}
        self._hooks: list[tuple[dict[int, Any], int, Any]] = []
        self._watch(leaves)

    def _watch(self, leaves: list[Tensor] | None) -> None:
        """Hooks in where gradients come, also those of what is frozen as yet."""
        for number, parameter in enumerate(leaves if self._untouched is None else self._untouched.parameters):  # type: ignore[arg-type]
            trained = parameter.requires_grad
            if not trained and not (parameter.is_floating_point() or parameter.is_complex()):
                continue
            parameter.requires_grad_(True)  # without which torch takes no hook
            self._check_hooks(parameter)
            self._handles.append(parameter.register_hook(self._before(number)))
            self._handles.append(hook_gradient(parameter, self._weighted))
            self._hooked[number] = len(parameter._backward_hooks or ())
            if self._untouched is not None:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._came(number)))
            parameter.requires_grad_(trained)

    @contextlib.contextmanager
    def __call__(self, rank_batch: RankBatch) -> Iterator[None]:
        """Holds back for one micro-batch what its place in the group does not allow."""
        if rank_batch.first and rank_batch.last:  # nothing is to be added up
            self._share = rank_batch
            try:
                yield
            finally:
                self._share = None
            return
        optimizer = self._task.optimizer
        if rank_batch.first and self._untouched is not None:
            self._untouched.begin()
        self._counts.begin()
        self._rates.begin()
        self._arrived = self._stepped = False
        self._open, self._fault = 0, self._hooked_after
        self._share = rank_batch
        if self._untouched is not None:
            self._untouched.within(True)
        try:
            with (
                _replaced(optimizer, "zero_grad", self._clears),
                _replaced(self._task.module, "zero_grad", self._clears),
                _replaced(optimizer, "step", self._steps),
            ):
                yield
        finally:
            self._share = None

    @property
    def asked(self) -> bool:
        """Whether the last step called `optimizer.step()`, held back or not."""
        return self._stepped

    def end(self, rank_batch: RankBatch) -> None:
        """A micro-batch's imperative step is over.

        Raises:
            StepError: it did something that does not add up.
        """
        if rank_batch.first and rank_batch.last:
            return
        try:
            self._end(rank_batch)
        finally:
            if self._untouched is not None:
                self._untouched.within(False)

    def _end(self, rank_batch: RankBatch) -> None:
        if not self._arrived and not self._stepped:
            raise refusal("left a batch out: it called neither backward() nor optimizer.step()", ALONE)
        if not self._stepped:
            raise refusal("calls backward() but not optimizer.step(), as if it accumulated itself", RETURN)
        self._check(whole=not rank_batch.last)
        if not rank_batch.last:
            self._counts.check()

    def _check(self, *, whole: bool) -> None:
        """Finds what was done since the step began; once the optimizer has really stepped, all is free."""
        fault = self._fault
        if not fault and self._open:
            fault = "takes gradients with torch.autograd.grad, of its own batch alone"
        if not fault and whole and self._untouched is not None:
            fault = self._untouched.changed()
        if fault:
            raise refusal(fault, CLIP if "gradients after" in fault else ALONE if _by_hand(fault) else RETURN)
        if whole:
            told = self._rates.changed()
            if told:
                raise refusal(told, SCHEDULE)

    # --- what the step calls ----------------------------------------------------------------------------

    def _clears(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        rank_batch = self._share
        if rank_batch is None:
            return original(*args, **kwargs)
        if self._stepped:
            return original(*args, **kwargs) if rank_batch.last else None
        if self._arrived:
            raise refusal(
                "clears the gradients between backward() and optimizer.step(), as steps of several phases do", ALONE
            )
        return original(*args, **kwargs) if rank_batch.first else None

    def _steps(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        rank_batch = self._share
        if rank_batch is None:
            return original(*args, **kwargs)
        if any(given is not None for given in (*args, *kwargs.values())):
            raise refusal("gives optimizer.step() a closure, which computes on its own batch alone", ALONE)
        if self._stepped:
            raise refusal("steps its optimizer twice", ALONE)
        if not self._arrived:
            raise refusal("calls optimizer.step() without a backward() before it", ALONE)
        self._check(whole=True)
        self._stepped = True
        if rank_batch.last:
            return original()
        if self._task.optimizer is not None and hasattr(original, "_wrapped_by_lr_sched"):
            self._task.optimizer._opt_called = True  # type: ignore[attr-defined]  # no reason for torch to warn
        return None

    def _any_steps(self, optimizer: Optimizer, *_: Any) -> None:
        """Before any optimizer steps: in the midst of a group it can be none but the task's, at its end."""
        rank_batch = self._share
        if (
            rank_batch is None
            or (rank_batch.first and rank_batch.last)
            or (self._stepped and optimizer is self._task.optimizer)
        ):
            return
        if optimizer is self._task.optimizer:
            raise refusal("steps its optimizer past optimizer.step()", RETURN)
        raise refusal(
            f"steps an optimizer ({type(optimizer).__name__}) whose steps train.accumulation cannot delay, since it "
            "is not model.optimizer",
            "Step model.optimizer alone, whose groups may hold all parameters, or set train.accumulation=1.",
        )

    # --- what backward calls ----------------------------------------------------------------------------

    def _before(self, number: int) -> Callable[[Tensor], None]:
        def before(_: Tensor) -> None:
            rank_batch = self._share
            if rank_batch is not None and not (rank_batch.first and rank_batch.last):
                self._comes(number)

        return before

    def _weighted(self, grad: Tensor) -> Tensor:
        rank_batch = self._share
        if rank_batch is None:
            return grad
        if grad.requires_grad and not self._fault:
            self._fault = "calls backward(create_graph=True), to compute with the gradients of its own batch alone"
        return grad if rank_batch.scale == 1.0 else scaled(grad, rank_batch.scale)

    def _comes(self, number: int) -> None:
        if self._stepped and not self._fault:
            self._fault = "calls backward() after optimizer.step()"
        self._arrived = True
        if self._untouched is None:
            return
        self._open += 1
        if len(self._untouched.parameters[number]._backward_hooks) != self._hooked[number] and not self._fault:
            self._fault = "has registered a hook on a parameter, which works on each micro-batch's gradient"
        if not self._fault:
            self._fault = self._untouched.before(number)
        if self._averaged and not self._queued and self._share is not None and self._share.last:
            self._queued = True
            Variable._execution_engine.queue_callback(self._after_backward)

    def _came(self, number: int) -> Callable[[Tensor], None]:
        def came(_: Tensor) -> None:
            if self._share is not None and self._untouched is not None and not (self._share.first and self._share.last):
                self._open -= 1
                self._untouched.came(number)

        return came

    def _after_backward(self) -> None:
        """Queued once more, so that it comes after what averages the gradients, which is queued within backward."""
        Variable._execution_engine.queue_callback(self._after_averaging)

    def _after_averaging(self) -> None:
        self._queued = False
        if self._untouched is not None:
            self._untouched.averaged()

    def _check_hooks(self, parameter: Any) -> None:
        """Has the user's own hooks on a parameter seen to: one that changes the gradient works on a part of it."""
        after = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        if any(not str(getattr(hook, "__module__", "") or "dtrain").startswith("dtrain") for hook in after.values()):
            self._hooked_after = "has a parameter with a hook of its own after its gradient has come"
        hooks = parameter._backward_hooks or {}
        for key, hook in list(hooks.items()):

            def seen(grad: Tensor, hook: Callable[[Tensor], Any] = hook) -> Any:
                changed = hook(grad)
                rank_batch = self._share
                if changed is not None and rank_batch is not None and not (rank_batch.first and rank_batch.last):
                    self._fault = self._fault or "has a hook that changes the gradient of each micro-batch"
                return changed

            hooks[key] = seen
            self._hooks.append((hooks, key, hook))

    def close(self) -> None:
        """Looks away; closing twice does no harm."""
        for handle in self._handles:
            handle.remove()
        for hooks, key, hook in self._hooks:
            if key in hooks:
                hooks[key] = hook
        self._hooks.clear()
        if self._untouched is not None:
            self._untouched.close()


class OwnChanges:
    """Finds what a declarative train step counts or changes by itself, as if it were called once for each step.

    Args:
        task: the user's objects.
    """

    def __init__(self, task: Task) -> None:
        self._counts = OwnCounts(task)
        self._rates = Rates(task)

    @contextlib.contextmanager
    def __call__(self, rank_batch: RankBatch) -> Iterator[None]:
        """Compares what is before a call of the step with what is after it; one that counts its calls is a warning.

        Raises:
            StepError: it moves what follows optimizer steps: weights of its own, or the learning rate.
        """
        if rank_batch.first and rank_batch.last:
            yield
            return
        self._counts.begin()
        self._rates.begin()
        yield
        self._counts.check(counters=False)
        told = self._rates.changed()
        if told:
            raise refusal(told, SCHEDULE)


def refusal(what: str, remedy: str) -> StepError:
    """Returns the error for a train step that cannot be taken once for each micro-batch.

    Args:
        what: it does, in words that follow "the train step".
        remedy: what helps.
    """
    return StepError(
        f"train.accumulation: the train step {what}. It is called once per "
        "micro-batch, and the gradients would not add "
        f"up to those of one step on the whole batch. {remedy}"
    )


def _by_hand(fault: str) -> bool:
    """Whether it is something that dtrain cannot do for the step."""
    return any(word in fault for word in ("weights", "hook", "autograd.grad", "create_graph", "after optimizer"))


def _named(task: Task) -> dict[str, Any]:
    names = {id(parameter): name for name, parameter in task.module.named_parameters()}
    others = (p for p in parameters_of(task))
    return {names.get(id(p), f"a parameter of shape {tuple(p.shape)}, number {n}"): p for n, p in enumerate(others)}


@contextlib.contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Has a function called with a method of one object in the method's place; a scheduler may have done so before."""
    before = owner.__dict__.get(name)
    original = getattr(owner, name)
    owner.__dict__[name] = functools.wraps(original)(lambda *args, **kwargs: function(original, *args, **kwargs))
    try:
        yield
    finally:
        if before is None:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = before
