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
from collections.abc import Callable, Iterator
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
from dtrain.progress import Progress, Silent
from dtrain.seeding import derive, seed_everything
from dtrain.sharding import BatchMode, Dealing, ShardedLoader, Share
from dtrain.steps import (
    HOW_TO_LEARN,
    Kind,
    OptimizerWitness,
    Step,
    call_step,
    has_graph,
    kind_of,
    named_values,
    no_grad_step,
    scaled_gradients,
    watch_backward,
)
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
    """

    module: nn.Module
    train_step: Step
    dl_train: Any
    valid_step: Step | None = None
    dl_valid: Any = None
    optimizer: Optimizer | None = None
    scheduler: Any = None
    interval: Interval = "epoch"

    def __post_init__(self) -> None:
        """Takes the optimizer from the net and puts it there, so that steps find it."""
        if self.dl_valid is not None and self.valid_step is None:
            raise UsageError("there is a validation loader but no valid_step. Define one, or leave the loader out.")
        found = getattr(self.module, "optimizer", None)
        if self.optimizer is None and hasattr(found, "param_groups"):
            self.optimizer = found
        elif self.optimizer is not None and found is None:
            self.module.optimizer = self.optimizer  # type: ignore[assignment]


@dataclass
class Place:
    """Where the engine is: what an error message and a watchdog want to know."""

    rank: int
    epoch: int = 0
    split: str = ""
    step: int = 0

    def __str__(self) -> str:
        """Words such as "rank 1, epoch 2, train step 7"."""
        return f"rank {self.rank}, epoch {self.epoch}, {self.split} step {self.step}"


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

    def __post_init__(self) -> None:
        """Compares the ranks' tasks, deals the loaders out and readies the net."""
        self.place = Place(self.world.rank)
        self._names: dict[str, tuple[str, ...]] = {}
        self._witness: OptimizerWitness | None = None
        self._train_loader = self._sharded(self.task.dl_train, "train", fill=True)
        valid = self.task.dl_valid
        self._valid_loader = None if valid is None else self._sharded(valid, "valid", fill=False)
        loaders = {"train": self.task.dl_train} | ({} if valid is None else {"valid": valid})
        check_same_task(self.world, self.task.module, loaders)
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
        except (Exception, SystemExit) as error:
            add_place(error, str(self.place))
            raise
        finally:
            self.progress.close()
            if self._witness is not None:
                self._witness.close()
        return self.history

    def _run_epoch(self, epoch: int) -> None:
        self.place.epoch = epoch
        train = self._train(epoch)
        valid = self._valid(epoch)
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
        table = self._begin("train", epoch, self._train_loader)
        started = time.perf_counter()
        for share in self._steps(self._train_loader, epoch):
            table.add(self._learn(share), share.count)
            self._step_scheduler("step")
            self.progress.step(table)
        seconds = time.perf_counter() - started
        several = self.world.size > 1
        weights = weights_checksum(module, self.world.sum_dtype) if several else 0.0
        order = self._train_loader.fingerprint
        result, sums = table.reduce(self.world, seconds, (weights, order))
        self._names["train"] = tuple(result.means)
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

    # --- validation -----------------------------------------------------------------------------------

    def _valid(self, epoch: int) -> PassResult | None:
        """Validates the bare net: DDP's forward would broadcast buffers, which hangs on unequal step counts."""
        if self._valid_loader is None or self.task.valid_step is None:
            return None
        # During training each rank kept its own buffers (BatchNorm's statistics); rank 0's are the ones saved.
        self.world.broadcast_(list(self.task.module.buffers()))
        self.task.module.eval()
        table = self._begin("valid", epoch, self._valid_loader)
        started = time.perf_counter()
        for share in self._steps(self._valid_loader, epoch):
            if table.steps == 0:
                check_takes(self.task.valid_step, share.batch, "valid")
            returned = no_grad_step(self.task.valid_step, self.task.module, share.batch)
            table.add(named_values(returned, self.task.module, "valid"), share.count)
            self.progress.step(table)
        result, _ = table.reduce(self.world, time.perf_counter() - started)
        self._names["valid"] = tuple(result.means)
        return result

    # --- both -----------------------------------------------------------------------------------------

    def _sharded(self, loader: Any, split: str, *, fill: bool) -> ShardedLoader:
        return ShardedLoader(loader, Dealing(self.world.rank, self.world.size, self.batch, fill), self.seed, split)

    def _begin(self, split: str, epoch: int, loader: ShardedLoader) -> MeanTable:
        self.place.split, self.place.step = split, 0
        self.progress.begin(split, epoch, loader.steps())
        return MeanTable(split, self._names.get(split))

    def _steps(self, loader: ShardedLoader, epoch: int) -> Iterator[Share]:
        """The rank's shares, on its device; keeps the place up to date."""
        shares = loader.shares(epoch)
        while True:
            self.place.step += 1  # also while its batch is fetched
            share = next(shares, None)
            if share is None:
                self.place.step -= 1
                return
            yield self._moved(share)

    def _moved(self, share: Share) -> Share:
        if self.world.device.type == "cpu":
            return share
        from accelerate.utils import send_to_device

        batch = send_to_device(share.batch, self.world.device, non_blocking=True)
        return Share(batch, share.count, share.total, share.scale)

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
