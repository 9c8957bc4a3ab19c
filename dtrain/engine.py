"""The loop that all styles share.

::

    for epoch in 1 .. epochs:
        model.train()
        for share in train loader:            # this rank's part of the global batch
            imperative:   train_step(model, *batch)           # does backward and step itself
            declarative:  loss = train_step(model, *batch)
                          (loss * weight).backward(); optimizer.step(); optimizer.zero_grad()
            add the returned values, with the weight of the real samples
        sum over ranks, once; compare the ranks' weights
        net.eval()                            # the bare net, not DDP
        for share in valid loader: add valid_step(net, *batch)
        sum over ranks, once
        append a row to the history; tell trackers
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from dtrain.checks import (
    check_alike,
    check_all_used,
    check_optimizers,
    check_order,
    check_same_task,
    check_takes,
    weights_checksum,
)
from dtrain.ddp import Replica
from dtrain.errors import StepError, UsageError, add_place
from dtrain.history import History
from dtrain.metrics import Mean, MeanTable, PassResult, Value
from dtrain.passes import Place, ValidPass, sharded, shares_on_device
from dtrain.progress import Progress, Silent
from dtrain.seeding import derive, seed_everything
from dtrain.sharding import BatchMode, Share
from dtrain.steps import (
    HOW_TO_LEARN,
    Kind,
    OptimizerWitness,
    Step,
    call_step,
    has_graph,
    kind_of,
    named_values,
    scaled_gradients,
    watch_backward,
)
from dtrain.synced import ready
from dtrain.world import World

logger = logging.getLogger(__name__)

Interval = Literal["epoch", "step"]
Row = dict[str, Any]


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
        metrics: name -> torchmetrics object, for the values that a step returns as `dtrain.metrics.Observed`.
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

    def __post_init__(self) -> None:
        """Takes the optimizer from the net and puts it there, so that steps find it."""
        if self.dl_valid is not None and self.valid_step is None:
            raise UsageError("there is a validation loader but no valid_step. Define one, or leave the loader out.")
        found = getattr(self.module, "optimizer", None)
        if self.optimizer is None and hasattr(found, "param_groups"):
            self.optimizer = found
        elif self.optimizer is not None and found is None:
            self.module.optimizer = self.optimizer  # type: ignore[assignment]


def valid_pass(task: Task, world: World, *, batch: BatchMode, seed: int) -> ValidPass | None:
    """Returns a task's validation, None where it has no validation loader; usable without its train loader."""
    if task.dl_valid is None or task.valid_step is None:
        return None
    loader = sharded(task.dl_valid, world, batch=batch, seed=seed, split="valid", fill=False)
    return ValidPass(task.module, task.valid_step, loader, world, task.metrics)


@dataclass
class Engine:
    """Trains a task on the ranks of a world.

    Attributes:
        task: the user's objects.
        world: the ranks.
        epochs: passes over the training data.
        seed: order of samples, and this rank's random stream, are derived from it.
        batch: whose batch size the loaders' is.
        history: gets a row an epoch, on every rank.
        progress: what a person sees.
        after_epoch: called on every rank with each new row.
        place: where the engine is.
        kind: the kind of the train step, known after the first batch.
        stopping: set by an `after_epoch` function, on every rank alike, to end after that epoch.
    """

    task: Task
    world: World
    epochs: int
    seed: int = 42
    batch: BatchMode = "per_rank"
    history: History = field(default_factory=History)
    progress: Progress = field(default_factory=Silent)
    after_epoch: list[Callable[[Row], None]] = field(default_factory=list)
    kind: Kind | None = None
    stopping: bool = False

    def __post_init__(self) -> None:
        """Compares the ranks' tasks, deals the loaders out and readies the net."""
        self.place = Place(self.world.rank)
        self._names: tuple[str, ...] | None = None
        self._witness: OptimizerWitness | None = None
        self._train_loader = sharded(
            self.task.dl_train, self.world, batch=self.batch, seed=self.seed, split="train", fill=True
        )
        self._valid = valid_pass(self.task, self.world, batch=self.batch, seed=self.seed)
        loaders = {"train": self.task.dl_train}
        if self._valid is not None:
            loaders["valid"] = self.task.dl_valid
        check_same_task(self.world, self.task.module, loaders)
        ready(self.task.metrics, self.world)
        self._replica = Replica(self.task.module, self.world)

    def fit(self) -> History:
        """Runs all epochs.

        Returns:
            the history; its numbers are equal on all ranks.

        Raises:
            StepError: a step breaks the contract.
            DataError: a loader yields nothing.
            Exception: whatever the user's code raises, with a note of rank, epoch and step.
        """
        seed_everything(derive(self.seed, "rank", self.world.rank))
        try:
            for epoch in range(1, self.epochs + 1):
                self._run_epoch(epoch)
                if self.stopping:
                    break
        except (Exception, SystemExit) as error:
            add_place(error, str(self.place))
            raise
        finally:
            self.progress.close()
            if self._witness is not None:
                self._witness.close()
        return self.history

    def _run_epoch(self, epoch: int) -> None:
        train = self._train(epoch)
        valid = None if self._valid is None else self._valid.run(epoch, self.place, self.progress)
        row = self._row(epoch, train, valid)
        self._step_scheduler("epoch", row)
        self.history.append(row)
        self.progress.end_epoch(row)
        for tell in self.after_epoch:
            tell(row)

    def _row(self, epoch: int, train: PassResult, valid: PassResult | None) -> Row:
        row: Row = {"epoch": epoch, **train.means}
        if valid is not None:
            row |= {f"val_{name}": mean for name, mean in valid.means.items()}
        if self.task.optimizer is not None:
            row["lr"] = float(self.task.optimizer.param_groups[0]["lr"])
        row["seconds"] = train.seconds + (valid.seconds if valid is not None else 0.0)
        row["samples_per_second"] = train.samples / train.seconds
        return row

    # --- training -------------------------------------------------------------------------------------

    def _train(self, epoch: int) -> PassResult:
        module = self.task.module
        module.train()
        self.place.enter("train", epoch)
        self.progress.begin("train", epoch, self._train_loader.steps())
        table = MeanTable("train", self._names, self.task.metrics)
        started = time.perf_counter()
        for share in shares_on_device(self._train_loader, self.world, self.place):
            table.add(self._learn(share), share.count)
            self._step_scheduler("step")
            self.progress.step(table)
        seconds = time.perf_counter() - started
        several = self.world.size > 1
        weights = weights_checksum(module, self.world.sum_dtype) if several else 0.0
        order = self._train_loader.fingerprint
        result, sums = table.reduce(self.world, seconds, (weights, order))
        self._names = tuple(result.means)
        self._check_learnt()
        check_order(order, sums[1] / self.world.size, "train")
        check_alike(weights, sums[0] / self.world.size, epoch)
        return result

    def _learn(self, share: Share) -> dict[str, Value]:
        """Takes one train step; the first one shows which kind it is."""
        if self.kind is None:
            return self._learn_first(share)
        if self.kind == "imperative":
            with scaled_gradients(self.task.module, share.scale):
                return self._call_train_step(share)
        values = self._call_train_step(share)
        self._descend(values, share)
        return values

    def _call_train_step(self, share: Share) -> dict[str, Value]:
        try:
            with self._replica.training() as model:
                returned = call_step(self.task.train_step, model, share.batch)
        except RuntimeError as error:
            check_all_used(error, self.task.module)
            raise
        return named_values(returned, self.task.module, "train")

    def _learn_first(self, share: Share) -> dict[str, Value]:
        module = self.task.module
        check_takes(self.task.train_step, share.batch, "train")
        self._witness = OptimizerWitness()
        with watch_backward(module) as backward, scaled_gradients(module, share.scale):
            values = self._call_train_step(share)
        self.kind = kind_of(bool(self._witness.optimizers), bool(backward), values.get("loss"))
        logger.info("the train step is %s", self.kind)
        if self.kind == "declarative":
            self._descend(values, share)
        check_optimizers(self._witness.optimizers, module, self.world.size)
        return values

    def _descend(self, values: dict[str, Value], share: Share) -> None:
        """Backward and optimizer step for a declarative step."""
        optimizer = self.task.optimizer
        if optimizer is None:
            raise StepError(
                "the train step returns a loss with its graph, for dtrain to step on, but there is no optimizer. "
                "Define build_optimizer(model), or set model.optimizer."
            )
        loss = values.get("loss")
        if not has_graph(loss):
            raise StepError(
                "the train step returned a loss without a graph, after returning one with a graph before. "
                "Return the loss itself at every step, without .item() or .detach()."
            )
        torch.autograd.backward(self._weighted(loss, share))  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()

    def _weighted(self, loss: torch.Tensor | Mean, share: Share) -> torch.Tensor:
        """The loss of which the average over ranks is the mean over all samples (or all that was counted)."""
        if not isinstance(loss, Mean):
            return loss if share.scale == 1.0 else loss * share.scale
        counted = float(loss.count) if share.count else 0.0
        (everywhere,) = self.world.all_reduce([counted])
        if everywhere == 0:
            return loss.total * 0.0  # type: ignore[return-value]
        return loss.total * ((counted > 0) * self.world.size / everywhere)  # type: ignore[return-value]

    def _step_scheduler(self, interval: Interval, row: Row | None = None) -> None:
        scheduler = self.task.scheduler
        if scheduler is None or self.task.interval != interval:
            return
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            monitored = None if row is None else row.get("val_loss", row.get("loss"))
            if monitored is None:
                raise UsageError(
                    "ReduceLROnPlateau counts epochs and watches a value named loss: return it from build_scheduler "
                    "without 'step', and return a loss from the steps."
                )
            scheduler.step(float(monitored))
        else:
            scheduler.step()

    def _check_learnt(self) -> None:
        """After the first epoch: some optimizer must have stepped by then, whoever made it."""
        if self._witness is None:
            return
        self._witness.close()
        stepped, self._witness = self._witness.optimizers, None
        if not stepped:
            raise StepError(
                "the train step calls backward(), but no optimizer's step() ran in the whole epoch: "
                f"nothing is learnt. {HOW_TO_LEARN}"
            )
        check_optimizers(stepped, self.task.module, self.world.size)
        if self.task.optimizer is None:
            self.task.optimizer = stepped[0]
