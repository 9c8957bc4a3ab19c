"""A train step as one CUDA graph: captured once, replayed for each batch of the same structure.

::

    step 1 of a structure      as without a graph; what the first steps are checked for is checked here
    steps 2 and 3              without a graph, their operations noted and compared (`dtrain.engine.step_trace`)
    step 4                     captured: forward, loss, backward, clipping, optimizer, average of the weights, sums
    steps 5, 6, ...            the batch is copied to where the graph reads it, the learning rate is written, replay

A batch of another structure (a ragged last one) takes its step without a graph, in the same memory. What the CPU counts
(optimizer steps, the schedule, callbacks) is done after each step, replayed or not.

A graph has the Python numbers, the tensors and the modules' modes of the step that was captured. So all that can be
compared without waiting is compared before each replay; and at the beginning of each pass, and at growing intervals
within it, a step is taken without the graph and compared, operation by operation. Options of the optimizer, modes of
modules and what learns may change between steps: then a new graph is captured. What else changes is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dtrain.data.partition import RankBatch
from dtrain.engine.callback import Callbacks, EngineCallback, Order
from dtrain.engine.cuda_graphs import Graphs
from dtrain.engine.facts import PassFacts
from dtrain.engine.graph_checks import check_values, graphs_for, refuse_imperative, reworded
from dtrain.engine.graph_optimizer import GraphOptimizer, check_hooks
from dtrain.engine.graph_values import GraphSums, own_copy, without_graph
from dtrain.engine.metrics import MeanTable, Value
from dtrain.engine.static_batch import static_copy, structure_of
from dtrain.engine.step_trace import StepTrace, difference, refusal, watched_draws
from dtrain.engine.train_step import Learner, Task
from dtrain.errors import StepError, UsageError
from dtrain.model.ema import WeightAverage

if TYPE_CHECKING:
    from dtrain.engine.loop import Engine

_TRACED = 2  # steps of a structure that are compared before one is captured
_FIRST_LOOK, _LOOKS = 64, 4  # replays until a step is compared again; each interval is so many times the one before
_MOST_STRUCTURES, _MOST_CHANGES = 16, 3
_MOST_GRAPHS = 8  # each has memory of its own, for all that its step makes

Values = dict[str, Value]


@dataclass
class _Recorded:
    """A captured step.

    Attributes:
        replay: does it again.
        inputs: where it reads its batch.
        values: what it returns.
        grads: the gradients of the parameters after it.
        adds_to: those that it adds to; None where it makes new ones.
        steps: whether the optimizer steps in it.
        moves: whether it moves the average of the weights.
        adds: whether it adds its values to the table's sums.
    """

    replay: Callable[[], None]
    inputs: list[Tensor]
    values: Values
    grads: list[Tensor | None]
    adds_to: list[Tensor | None] | None
    steps: bool
    moves: bool
    adds: bool


@dataclass
class _Structure:
    """The batches of one structure, at one place in an optimizer step.

    Attributes:
        ran: whether a step was taken.
        trace: of the step that was noted last.
        standing: what was to stay as it was after the step that was noted last; see `CapturedStep._standing`.
        alike: how many steps in a row were alike.
        looked: whether one was compared in this pass.
        replays: so far.
        look: after so many replays, a step is compared again.
        recorded: the graph.
    """

    ran: bool = False
    trace: StepTrace | None = None
    standing: Mapping[str, Any] = field(default_factory=dict)
    alike: int = 0
    looked: bool = False
    replays: int = 0
    look: int = _FIRST_LOOK
    recorded: _Recorded | None = None


class CapturedStep(EngineCallback):
    """Takes the train steps of a learner, captured where their batches have a structure that comes again.

    Args:
        task: the user's objects.
        learner: takes the steps.
        graphs: the device's.
        device: the rank's.

    Attributes:
        captured: the number of captures so far.
        replayed: the number of replays so far.
        callbacks: which may want a step's values.
        average: of the weights, where there is one that follows each optimizer step.
        table: returns that of the pass that runs.

    Raises:
        UsageError: the optimizer cannot be captured.
    """

    order = Order.RECORDS

    def __init__(self, task: Task, learner: Learner, graphs: Graphs, device: torch.device) -> None:
        if task.optimizer is None:
            raise UsageError(
                "train.cuda_graph needs to know the optimizer: define build_optimizer(model), or set model.optimizer."
            )
        self.captured = self.replayed = 0
        self.callbacks: Callbacks | None = None
        self.average: WeightAverage | None = None
        self.table: Callable[[], MeanTable | None] = lambda: None
        self._task, self._learner, self._graphs, self._device = task, learner, graphs, device
        self._optimizer = GraphOptimizer(task.optimizer, device)
        self._sums = GraphSums(device)
        self._structures: dict[Any, _Structure] = {}
        self._group = False  # whether the optimizer step that is underway has been replayed so far
        self._changes = 0  # of what a graph keeps, in this pass
        self._steps, self._last_look = 0, -1  # of this pass: those that were begun, and the last one that is compared
        self._added = False
        learner.told_kind.append(refuse_imperative)

    def on_pass_start(self, facts: PassFacts) -> None:
        """A pass begins, or goes on."""
        if facts.split != "train":
            return
        self._changes, self._steps = 0, facts.skipped
        # What changes after a pass's last look is found at the beginning of the next one; after the last pass's, here.
        last = facts.epoch == facts.epochs
        self._last_look = facts.steps - 1 if last and facts.steps is not None else -1
        for known in self._structures.values():
            known.looked = False
            if known.recorded is None:
                known.trace, known.alike = None, 0

    def learn(self, rank_batch: RankBatch) -> Values:
        """Takes one train step and returns its values by name; see `Learner.learn`.

        Raises:
            StepError: the step breaks the step contract, or cannot be captured.
            UsageError: something that it does cannot be captured.
        """
        self._check_optimizer()
        tensors: list[Tensor] = []
        batch = structure_of(rank_batch.batch, self._device, tensors)
        place = rank_batch.first, rank_batch.last, rank_batch.count, rank_batch.scale, rank_batch.loader
        known = self._structures.setdefault((batch, place), _Structure())
        self._group = self._group or rank_batch.first
        self._added = False
        self._steps += 1
        return self._learner.learn(rank_batch, self._way(known, tensors))

    def add(self, values: Mapping[str, Value], count: int, start: int = 0) -> None:
        """Adds a step's values to the table of the pass, in so far as the graph has not; see `MeanTable.add`."""
        table = self._running_table()
        if self._added:
            table.count(values, count)
        else:
            table.add(values, count, start)

    def close(self) -> None:
        """Lets go of the graphs and of their memory; closing twice does no harm."""
        self._structures.clear()
        self._sums = GraphSums(self._device)
        self._optimizer.close()

    def _running_table(self) -> MeanTable:
        table = self.table()
        if table is None:
            raise RuntimeError("a step outside of a pass")
        return table

    # --- which way a step is taken --------------------------------------------------------------------------

    def _way(self, known: _Structure, tensors: list[Tensor]) -> Callable[[RankBatch], Values]:
        if not known.ran:
            self._check_structures()
            return lambda rank_batch: self._first(rank_batch, known)
        recorded, graphs = known.recorded, sum(one.recorded is not None for one in self._structures.values())
        if recorded is None and graphs >= _MOST_GRAPHS:
            return lambda rank_batch: self._first(rank_batch, known)
        if known.trace is not None and known.standing != self._standing():
            self._forget(known.standing)
        if self._group and known.looked and self._steps != self._last_look:
            if known.recorded is None and known.alike >= _TRACED:
                return lambda rank_batch: self._capture(rank_batch, known, tensors)
            if known.recorded is not None and known.replays < known.look and self._has_grads(known.recorded):
                return lambda rank_batch: self._replay(rank_batch, known, tensors)
        return lambda rank_batch: self._traced(rank_batch, known, tensors)

    def _has_grads(self, recorded: _Recorded) -> bool:
        """Whether the gradients are where a graph adds to them: the step before may have been another graph's."""
        grads = recorded.adds_to
        return grads is None or all(p.grad is g for p, g in zip(self._parameters(), grads, strict=True))

    def _first(self, rank_batch: RankBatch, known: _Structure) -> Values:
        """Without a graph, with all that is checked in first steps."""
        self._group = False
        with self._graphs.beside(), self._optimizer.in_place():
            values = self._learner.take(rank_batch)
        known.ran = self._learner.kind is not None
        return values

    def _traced(self, rank_batch: RankBatch, known: _Structure, tensors: list[Tensor]) -> Values:
        """Without a graph; what it does is compared with what a step of this structure did before."""
        self._group = False
        check_hooks(self._optimizer.optimizer)
        trace = StepTrace(self._device, tensors, (p.grad for p in self._parameters()))
        with reworded(), ExitStack() as stack:
            stack.enter_context(self._graphs.beside())
            stack.enter_context(watched_draws(self._device))
            stack.enter_context(self._optimizer.in_place())
            with self._graphs.strict(), trace:
                values = self._learner.compute(rank_batch)
        check_values(values, rank_batch, self._device)
        found = None if known.trace is None else difference(known.trace, trace)
        if found is not None:
            raise refusal(
                found[0],
                f"{found[1]}; a graph would do at each step what it did at one",
                "Have it do the same at each step, with what changes in a tensor that is changed in place, ",
            )
        known.trace, known.standing, known.looked = trace, self._standing(), True
        known.alike += 1
        known.look = known.replays * _LOOKS if known.replays >= known.look else known.look
        return values

    def _check_structures(self) -> None:
        if len(self._structures) > _MOST_STRUCTURES and not any(one.recorded for one in self._structures.values()):
            raise StepError(
                f"train.cuda_graph: {len(self._structures)} batches had as many structures (shapes, types, numbers "
                "and strings of Python, weights), and a graph is for batches of one. Pad them to one shape "
                "(drop_last=True leaves a ragged last one out), let the loader return what changes as tensors and no "
                "names, or set train.cuda_graph=false."
            )

    def _check_optimizer(self) -> None:
        now = self._task.module.__dict__.get("optimizer", self._task.optimizer)
        if now is not self._optimizer.optimizer or self._task.optimizer is not now:
            raise UsageError(
                "train.cuda_graph: model.optimizer was replaced. Keep one optimizer, and change the options of its "
                "groups, or set train.cuda_graph=false."
            )

    def _forget(self, before: Mapping[str, Any]) -> None:
        """Something that graphs keep has changed between two steps: all are captured anew."""
        now = self._standing()
        changed = [name for name in now if now[name] != before.get(name, now)]
        self._changes += 1
        if self._changes > _MOST_CHANGES:
            raise StepError(
                f"train.cuda_graph: {', '.join(changed)} changed {self._changes} times within one epoch, and a graph "
                "keeps it as it was. A learning rate per step is for Adam, AdamW, and optimizers with fused=True; of "
                "OneCycleLR, use cycle_momentum=False. Change it between epochs, or set train.cuda_graph=false."
            )
        for known in self._structures.values():
            known.recorded, known.trace, known.alike = None, None, 0

    # --- captured steps -------------------------------------------------------------------------------------

    def _capture(self, rank_batch: RankBatch, known: _Structure, tensors: list[Tensor]) -> Values:
        average = self.average
        moves = rank_batch.last and average is not None and average.movable
        adds = not self._task.metrics and bool(rank_batch.count)
        batch, inputs = static_copy(rank_batch.batch, tensors)
        if adds:
            self._sums.make(self._running_table())
        static = RankBatch(
            batch,
            rank_batch.count,
            rank_batch.total,
            rank_batch.scale,
            first=rank_batch.first,
            last=rank_batch.last,
            rows=rank_batch.rows,
            loader=rank_batch.loader,
        )

        def step() -> Values:
            values = self._learner.compute(static)
            if moves and average is not None:
                average.move()
            if adds:
                self._sums.add(values, rank_batch.count)
            return {name: without_graph(value) for name, value in values.items()}

        adds_to = None if rank_batch.first else [p.grad for p in self._parameters()]
        with reworded(), self._graphs.beside(), self._optimizer.in_place():
            replay, values = self._graphs.capture(step)
        self.captured += 1
        grads = [p.grad for p in self._parameters()]
        known.recorded = _Recorded(replay, inputs, values, grads, adds_to, rank_batch.last, moves, adds)
        known.replays, known.look = 0, _FIRST_LOOK
        return self._replay(rank_batch, known, tensors, captured=True)

    def _replay(
        self, rank_batch: RankBatch, known: _Structure, tensors: list[Tensor], *, captured: bool = False
    ) -> Values:
        recorded = known.recorded
        if recorded is None:
            raise RuntimeError("there is no graph")  # never
        for own, given in zip(recorded.inputs, tensors, strict=True):
            own.copy_(given)
        self._optimizer.write()
        if recorded.adds:
            self._sums.adopt(self._running_table())
        recorded.replay()
        for parameter, grad in zip(self._parameters(), recorded.grads, strict=True):
            if parameter.grad is not grad:
                parameter.grad = grad
        known.replays, self.replayed = known.replays + 1, self.replayed + 1
        self._added = recorded.adds
        if not captured:
            if recorded.steps:
                self._learner.steps.replayed()
            if recorded.moves and self.average is not None:
                self.average.moved = True
        listened = self.callbacks is None or self.callbacks.on_batch_end
        if listened or not recorded.adds:  # who may keep them
            return {name: own_copy(value) for name, value in recorded.values.items()}
        return recorded.values

    # --- what is compared -----------------------------------------------------------------------------------

    def _parameters(self) -> list[Any]:
        return [p for group in self._optimizer.optimizer.param_groups for p in group["params"]]

    def _standing(self) -> dict[str, Any]:
        """Returns what a graph keeps as it was when it was captured, by name."""
        module = self._task.module
        return {
            **self._optimizer.fixed(),
            "the mode of a module (train, eval)": [one.training for one in module.modules()],
            "a parameter (its memory, or whether it learns)": [
                (p.data_ptr(), p.requires_grad) for p in (*module.parameters(), *self._parameters())
            ],
            "a buffer (its memory)": [buffer.data_ptr() for buffer in module.buffers()],
        }


def captured_step(engine: Engine) -> CapturedStep | None:
    """Returns what takes an engine's train steps by CUDA graphs; None where it is not asked for.

    Raises:
        UsageError: it is asked for, and cannot be had.
    """
    graphs = graphs_for(engine.options, engine.world, engine.learner, engine.task.module)
    if graphs is None:
        return None
    captured = CapturedStep(engine.task, engine.learner, graphs, engine.world.device)
    captured.callbacks, captured.table = engine.callbacks, lambda: engine.table
    captured.average = engine.average if isinstance(engine.average, WeightAverage) else None
    engine.callbacks.add(captured)
    return captured
