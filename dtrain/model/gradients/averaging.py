"""Gradients averaged over the ranks, and known to have been.

Two ways, `step` and `ddp`::

    step:  backward() -> at its end the ranks tell each other which parameters got a gradient on some rank;
           exactly these are averaged: right for any number of calls, backward passes and parts of the net
    ddp:   DistributedDataParallel averages while backward runs: faster, and right for one call of the net and one
           backward pass, in which each trained parameter gets one gradient

`auto` takes the first train step in the first way, watches whether DDP would be right for it, and chooses; anew where
other parameters are trained than before. With DDP each later step is held to that: what it would not average is an
error before an optimizer steps on it.

Averaging a gradient twice does no harm: what is `averaged + this rank's new part` becomes right by averaging the whole
again. Ranks may run different numbers of backward passes where dtrain takes the optimizer's step: at the end of the
train step those that are done take part in the others' averages.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.autograd import Variable

from dtrain.errors import StepError, UsageError
from dtrain.model.gradient_hooks import GradientHooks
from dtrain.model.gradients.agreement import DONE, NO_BACKWARD, PASS, GradientAgreement, demand_all, unequal_passes
from dtrain.model.gradients.buffers import check_buffers
from dtrain.model.gradients.completion import REMEDY, PassCompletion
from dtrain.model.gradients.ddp_fit import DdpFit
from dtrain.model.gradients.drift import Drift, agreed, is_due
from dtrain.model.gradients.flat import average_dense, average_sparse, dense_and_sparse
from dtrain.model.gradients.step_guard import StepGuard
from dtrain.model.gradients.watched import NumberedParameters
from dtrain.model.hooks import warn_of_gradient_hooks

if TYPE_CHECKING:
    from dtrain.distributed.world import World
    from dtrain.model.ddp import Replica

logger = logging.getLogger(__name__)

Way = Literal["auto", "ddp", "step"]
Mode = Literal["watch", "ddp", "step"]

_MOST_CHANGES = 8  # of what is trained, after which DDP is not built again


def check_way(asked: object) -> None:
    """Refuses what is no way to average gradients.

    Raises:
        UsageError: it is none.
    """
    if asked not in get_args(Way):
        raise UsageError(f"average = {asked!r}: should be 'auto', 'ddp' or 'step'.")


class GradientAveraging:
    """Averages the gradients of the nets of a process over the ranks.

    Args:
        world: several ranks.
        way: how, or "auto" to find out.

    Attributes:
        mode: how it is done now.
        world: the ranks.
        watched: the nets and their parameters.
        fit: what DDP would make of the step that runs.
        drift: compares the ranks.
        open: micro-batches that run: none, one, or several of loops side by side.
        sync: whether the gradients of this micro-batch are averaged, with those that came before.
        scale: the weight of this rank's loss.
        deferred: whether the backward pass that runs is the train step's last one, after which `settle` averages.
    """

    def __init__(self, world: World, way: Way = "auto") -> None:
        self.mode: Mode = "step" if way == "step" else "watch"
        self.world, self._way = world, way
        self.watched = NumberedParameters(self._arrived)
        self._touched, self._ever = bytearray(), bytearray()
        self.fit, self.drift = DdpFit([]), Drift(world)
        self._queued: set[int] = set()
        self.open = self._evaluated = 0
        self.sync, self._fresh, self._settled = True, True, False
        self.scale, self.deferred = 1.0, False
        self._shares = self._changes = 0
        self._told: str | None = None
        self._by_ddp: list[Replica] = []
        self._retired: list[Any] = []  # a backward pass that runs may still call them
        self._guard = StepGuard(self)
        self.hooks = GradientHooks(lambda: self.open > 0, lambda: self.scale / world.size)
        self._completion = PassCompletion(world)
        self._meeting = GradientAgreement(world, 0, self._completion.at)

    def add(self, replica: Replica) -> None:
        """Takes a net's parameters for averaging; all ranks add the same nets in the same order."""
        self.watched.replicas.append(replica)
        self._take_up()
        if self._way != "ddp":
            self._take_hooks()
        elif self.world.is_main:
            warn_of_gradient_hooks(replica.net)

    def _take_hooks(self) -> None:
        """Has the user's own hooks wait for the average."""
        found = [self._way != "ddp" and self.hooks.take(replica.net) for replica in self.watched.replicas]
        if any(found) and self.mode == "ddp":
            self._without_ddp("step")

    def _take_up(self) -> None:
        self.watched.take_up()
        count = len(self.watched.names)
        self._touched, self._ever = bytearray(count), bytearray(count)
        self.fit, self._meeting = DdpFit(self.watched.names), GradientAgreement(self.world, count, self._completion.at)
        self._guard.forget()

    def choose(self, way: Way) -> None:
        """Has gradients averaged in a way from now on; on all ranks."""
        self._way = way
        if way == "step":
            self._without_ddp("step")

    def close(self) -> None:
        """Lets go of the nets; closing twice does no harm."""
        self.hooks.close()
        self.watched.close()
        self._guard.close()

    # --- a micro-batch ------------------------------------------------------------------------------------

    def begin(self, scale: float, *, last: bool) -> int:
        """A micro-batch begins, on all ranks.

        Args:
            scale: the weight of this rank's loss.
            last: whether its gradients, with those that came before, are to be averaged.

        Returns:
            what `end` is to be given.
        """
        due = is_due(self._shares + 1)
        if due:
            self.drift.arm()
        if due and self._fresh:  # within a group it would forget which gradients wait for their average
            self._find_new()
        self._check_trained()
        self._start_ddp()
        if self.mode != "ddp" and self._fresh:
            for replica in self.watched.active():  # as DDP does, with rank 0's
                self.world.broadcast_(list(replica.net.buffers()))
        self._queued.clear()
        self._retired.clear()
        self._completion.done = False
        self._fresh = last
        self.sync, self.scale, self._settled = last, scale, False
        self.fit.begin(self.watched.expected())
        self.open += 1
        return self._evaluated

    def settle(self, *, strict: bool = False) -> None:
        """All backward passes of this rank's train step are done; returns once those of all ranks are, and averaged.

        Args:
            strict: whether ranks with different numbers of backward passes are an error, since their own optimizers
                have stepped already.

        Raises:
            StepError: gradients of this step were not or cannot be averaged.
        """
        if not self.sync or self._settled or not self.open:
            return
        self._settled = True
        if self.mode == "ddp":
            if self.fit.idle:
                self._wait("ran no backward pass that reaches the net", NO_BACKWARD)
            return
        while self._average(DONE, strict=strict):
            pass

    def end(self, token: int) -> None:
        """The micro-batch ends; at its group's end the ranks see whether they still agree.

        Args:
            token: what `begin` returned.

        Raises:
            StepError: they do not, or gradients were not averaged.
        """
        try:
            if not self.sync or token != self._evaluated:
                return
            self._evaluated += 1
            self.settle(strict=True)
            self._shares += 1
            self._completion.at.end_step()
            self.drift.end_step()
            if is_due(self._shares):
                self.compare()
            if self.mode == "watch":
                self._choose()
            self._touched[:] = bytes(len(self._touched))
        finally:
            self.open -= 1

    def abandon(self) -> None:
        """The micro-batch ends in an error, or its loop is left."""
        self.open -= 1

    def compare(self) -> None:
        """Compares the ranks' gradients, settings and weights, on all of them.

        Raises:
            StepError: they differ; every rank raises it.
        """
        check_buffers(self.watched.replicas, self.world, first=self._shares == 1)
        at = f"after train step {self._shares}"
        self.drift.compare(self.watched.names, self.watched.parameters, lambda number: bool(self._ever[number]), at)

    def called(self) -> bool:
        """The net is called with gradients; returns whether the call shall go through DDP."""
        if not self.open:
            return self.mode == "ddp"
        if self.mode == "ddp":
            self._check_trained()
        if not self._shares:
            self._take_hooks()
        self.fit.called()
        self._completion.begin(ddp=self.mode == "ddp" and self.sync)
        return self.mode == "ddp"

    # --- backward -----------------------------------------------------------------------------------------

    def _arrived(self, number: int) -> None:
        """A parameter got a gradient."""
        if not self.open or self._completion.running:
            return
        self._touched[number] = self._ever[number] = 1
        self.fit.arrives(number)
        if not self.sync:
            return
        if self.mode == "ddp" and self.fit.reason is not None:
            self._completion.refuse_another()
            self.leave_ddp()
        task = torch._C._current_graph_task_id()
        if task not in self._queued:
            self._queued.add(task)
            self._completion.begin(ddp=self.mode == "ddp")
            Variable._execution_engine.queue_callback(lambda: self._passed(task))

    def _passed(self, task: int) -> None:
        """A backward pass is over."""
        self._queued.discard(task)
        self.fit.passed()
        if self.mode == "ddp":
            self._completion.passed()
            if self.fit.reason is None:
                return
            if self.fit.lacking and self._way == "auto":
                if self._completion.complete(self.watched.parameters, self.fit.lacking, self._touched):
                    self._not_by_ddp()
                return
            self.leave_ddp()
        if not self.deferred:
            self._average(PASS, strict=False)

    def _average(self, kind: int, *, strict: bool) -> bool:
        """Averages what some rank has to be averaged; returns whether some rank has more to do in this train step."""
        marks = dense_and_sparse(self._touched, self.watched.parameters)
        if marks[1]:
            self.fit.misfit("gradients are sparse")
        told = self._meeting.hold(kind, marks, strict=strict, misfit=self._misfit(), idle=self.fit.idle)
        self._touched[:] = bytes(len(self._touched))
        if told.unequal:
            raise unequal_passes(self.world, self._shares + 1, kind)
        dense, sparse = ([self.watched.parameters[number] for number in part] for part in (told.dense, told.sparse))
        hooked = self.hooks.note((*dense, *sparse))
        average_dense(dense, self.world)
        average_sparse(sparse, self.world)
        self.hooks.call(hooked)
        return told.more

    # --- which way ----------------------------------------------------------------------------------------

    def _misfit(self) -> bool:
        return self.mode == "step" or any((self.hooks.first, self.fit.reason, self.fit.wary))

    def _choose(self) -> None:
        """After a train step that was watched; all ranks come to the same."""
        told = self._meeting.last
        if told.all_idle:
            return
        if told.misfit or self._changes > _MOST_CHANGES or len(self.watched.learning()) != 1:
            self.mode = "step"
            several = "several nets are trained" if len(self.watched.learning()) > 1 else None
            hook = self.hooks.first and f"a hook of {self.hooks.first} is called with the average"
            reason = several or hook or self.fit.reason or self.fit.wary or "DDP does not fit another rank's train step"
            self._say(reason)
            return
        self._with_ddp()

    def _say(self, reason: str) -> None:
        if reason != self._told and self.world.is_main:
            logger.info("gradients are averaged after each backward pass, since %s", reason)
        self._told = reason

    def _start_ddp(self) -> None:
        """Where it is asked for from the first step on, and where a compiled net must see it from then on."""
        if self.mode == "ddp" and self.watched.learning() != self._by_ddp:  # another loop's net
            self._without_ddp("watch")
            self._changes += 1
        if self.mode != "watch":
            return
        learning = self.watched.learning()
        compiled = any(replica.clock is not None for replica in self.watched.replicas)
        if self._way == "ddp" and len(learning) > 1:
            raise agreed('average="ddp" supports one model, but several prepared models are trained. Remove it.')
        if (self._way == "ddp" or (compiled and not self.hooks.first)) and len(learning) == 1:
            self._with_ddp()

    def _with_ddp(self) -> None:
        self.mode, self.watched.trained = "ddp", self.watched.trained_now()
        self._by_ddp = self.watched.learning()
        for replica in self._by_ddp:
            replica.with_ddp()

    def _without_ddp(self, mode: Mode) -> None:
        self.mode = mode
        for replica in self.watched.replicas:
            if (ddp := replica.without_ddp()) is not None:
                self._retired.append(ddp)

    @property
    def state(self) -> str:
        """What a resumed run is to begin with: the mode."""
        return self.mode

    def resume(self, mode: Any) -> None:
        """Begins as the run that `state` was taken from went on."""
        if self._way == "step" or self.mode != "watch":
            return
        if mode == "ddp" and len(self.watched.learning()) == 1 and not self.hooks.first:
            self._with_ddp()
        elif mode == "step" and self._way == "auto":
            self.mode = "step"

    def _check_trained(self) -> None:
        """Whether other parameters are trained than before; with DDP, only where all ranks say so."""
        now = self.watched.trained_now()
        if now == self.watched.trained:
            return
        if self.mode == "ddp":
            changed = [name for name, a, b in zip(self.watched.names, now, self.watched.trained, strict=True) if a != b]
            self._wait(f"changed requires_grad of {changed[0]}", "(Un)freeze the same parameters on all ranks.")
            self._without_ddp("watch")
        elif self._way == "auto":
            self.mode = "watch"
        self.watched.trained, self._changes = now, self._changes + 1
        if self.open:
            self.fit.begin(self.watched.expected())
            if self._way == "ddp":
                self._start_ddp()

    def _find_new(self) -> None:
        """Parameters may have joined or left the nets; looked for where all ranks come by and it costs little."""
        if not self.watched.are_all:
            if self.mode == "ddp":
                self._without_ddp("watch")
            self._take_up()
        self._take_hooks()

    # --- what a step is held to ---------------------------------------------------------------------------

    def leave_ddp(self) -> None:
        """DDP is not right for this step: from here on gradients are averaged after each backward pass.

        What DDP has averaged already is averaged again, with what came since.

        Raises:
            StepError: DDP is what was asked for, or the other ranks do not do the same.
        """
        if self._way == "ddp":
            raise StepError(
                "DistributedDataParallel would not average this train step's gradients over the ranks: "
                f"{self.fit.reason}. {REMEDY}"
            )
        what = f"does what DistributedDataParallel would not average ({self.fit.reason})"
        self._wait(what, REMEDY, bytes(self.fit.seen))
        self._not_by_ddp()

    def _not_by_ddp(self) -> None:
        self._without_ddp("step")
        self._say(str(self.fit.reason))

    def _wait(self, what: str, remedy: str, mark: bytes = b"") -> None:
        """Waits for the other ranks to come to the same, past the collectives that they may be in."""
        demand_all(self.world, self._completion.at, self._shares + 1, what, remedy, mark)
