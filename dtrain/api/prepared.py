"""Loaders and nets of a hand-written loop, made fit for several ranks::

    for epoch in ...:
        net.train()
        for batch in loader:        # a training pass: calls of the net go through DDP, gradients have the
            ...                     # weight of the real samples, every rank takes part in every step
        net.eval()
        for batch in loader:        # a validation pass: the bare net, each sample once, no fillers

`net.training` at the start of a pass tells which it is: what a loop says anyway, and what is checked. In a
pass that began in eval mode, on several ranks, an optimizer that steps the net is stopped.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dtrain.api.keeper import Keeper, Resume
from dtrain.data.batches import BatchFunctions
from dtrain.data.loader import ShardedLoader
from dtrain.data.partition import BatchMode, RankBatch, ShardSpec
from dtrain.data.rank_shards import DataSharding
from dtrain.distributed.consistency import check_optimizers, check_order
from dtrain.distributed.world import World, bring_up
from dtrain.engine.device_copy import mover_of
from dtrain.engine.position import TrainPosition
from dtrain.engine.random_draws import step_draws
from dtrain.engine.step_contract import scaled_gradients
from dtrain.errors import StepError, UsageError
from dtrain.launch.monitor.heartbeat import SCRIPT, own_heartbeat
from dtrain.model.ddp import Replica
from dtrain.model.gather import PRESENT
from dtrain.model.gradients.averaging import GradientAveraging, Way
from dtrain.model.sync_batchnorm import SyncedBatchNorm
from dtrain.model.untracked_batchnorm import refuse_apart, synced_layers

_MODE_REMEDY = (
    "Call model.train() before the loop over the training batches (and set parts to eval mode after it), and "
    "model.eval() before the loop over the validation batches."
)


@dataclass(eq=False)
class Pass:
    """One pass over a prepared loader.

    Attributes:
        train: whether it is for learning.
        rank_batch: the share that the loop's body works on, None between two.
        trained: the nets that it trains.
        given: the number, in this process, of the share that was given last.
        interrupted: whether another pass has ended since then.
        step: shares that were given, also before the script was resumed.
    """

    train: bool
    rank_batch: RankBatch | None = None
    trained: list[Replica] = field(default_factory=list)
    given: int = 0
    interrupted: bool = False
    step: int = 0

    def weighted_by(self, others: list[Pass]) -> list[Replica]:
        """Returns the nets whose gradients get the weight of this pass's share.

        Where several loops are open, as in `zip(loader_a, loader_b)`, a net that more than one of them trains gets the
        weight of the first one's alone.

        Args:
            others: the passes that began before this one, and are open.

        Raises:
            StepError: the weights differ, so that no one weight is right.
        """
        learning = [other for other in others if other.train and other.rank_batch is not None]
        for other in learning:
            both = [replica for replica in self.trained if replica in other.trained]
            if (
                both
                and self.rank_batch is not None
                and other.rank_batch is not None
                and self.rank_batch.scale != other.rank_batch.scale
            ):
                raise StepError(
                    f"two loops train one model ({type(both[0].net).__name__}), and "
                    "their batches are split differently: "
                    f"this rank has {other.rank_batch.count} of {other.rank_batch.total} samples in one and "
                    f"{self.rank_batch.count} of {self.rank_batch.total} in the other, so its gradients "
                    "would need two weights. Use loaders whose batches split equally over the ranks: "
                    "drop_last=True, and batch sizes divisible by the number of ranks."
                )
        return [replica for replica in self.trained if not any(replica in other.trained for other in learning)]


@dataclass
class Process:
    """What a script has prepared on this rank.

    Attributes:
        world: the ranks, None before the first use.
        replicas: the prepared nets; on several ranks alone.
        gradients: averages those of all of them; on several ranks alone.
        fed: ids of the replicas that were prepared with a loader of their own.
        passes: the passes that are open; the innermost is last.
        late: per optimizer, its steps since the last training pass ended.
        trained: whether a training pass has ended.
        given: the number of shares that loops were given.
        saved: folder -> the epochs that this process saved in it.
        synced: what BatchNorm without running statistics takes a batch's over in validation; on several ranks alone.
        loaders: the prepared loaders.
        run: what keeps the script's run (`dtrain.run`); None where nothing does.
    """

    world: World | None = None
    replicas: list[Replica] = field(default_factory=list)
    gradients: GradientAveraging | None = None
    fed: set[int] = field(default_factory=set)
    passes: list[Pass] = field(default_factory=list)
    late: WeakKeyDictionary[Optimizer, int] = field(default_factory=WeakKeyDictionary)
    trained: bool = False
    given: int = 0
    saved: dict[Path, set[Path]] = field(default_factory=dict)
    synced: SyncedBatchNorm | None = None
    loaders: list[PreparedLoader] = field(default_factory=list)
    run: Keeper | None = None

    def joined(self, *, cpu: bool) -> World:
        """Returns the world; brings it up where nobody has.

        Raises:
            WorldError: the ranks did not come up as launched.
            UsageError: the CPU is asked for after the world came up on something else.
        """
        if self.world is None:
            self.world = bring_up(cpu=cpu)
            if self.world.size > 1:
                self.synced = SyncedBatchNorm(self.world)
                atexit.register(self._leave_group)
                register_optimizer_step_pre_hook(self._before_step)
        elif cpu and self.world.device.type != "cpu":
            raise UsageError(
                f"cpu=True, but this process uses {self.world.device} since its first dtrain call: pass cpu=True there."
            )
        return self.world

    def replica_of(self, net: nn.Module, average: Way = "auto") -> Replica:
        """Returns a net's replica; one that was prepared before keeps its own."""
        world = self.joined(cpu=False)
        known = next((replica for replica in self.replicas if replica.net is net), None)
        if self.gradients is None and world.size > 1:
            self.gradients = GradientAveraging(world)
        if self.gradients is not None and average != "auto":
            self.gradients.choose(average)
        replica = Replica(net, world, averaging=self.gradients or "auto") if known is None else known
        if known is None and world.size > 1:
            self.replicas.append(replica)
        return replica

    def rank_batch(self) -> RankBatch | None:
        """Returns the share that the innermost loop's body works on."""
        return self.passes[-1].rank_batch if self.passes else None

    def give(self, current: Pass, rank_batch: RankBatch | None) -> None:
        """The loop's body gets a share, or is done with it."""
        current.rank_batch = rank_batch
        if rank_batch is not None:
            self.given += 1
            current.given, current.interrupted = self.given, False
        self._show()

    def close(self, current: Pass) -> None:
        """A pass ends, at its last share or before: what the loops around it work on is present again."""
        self.passes.remove(current)
        for other in self.passes:
            other.interrupted = True
        self.trained |= current.train
        self._show()

    def _show(self) -> None:
        """Has `dtrain.gather` know which share is worked on: of those of the open passes, the one given last."""
        working = [one for one in self.passes if one.rank_batch is not None]
        current = max(working, key=lambda one: one.given, default=None)
        PRESENT.rank_batch = None if current is None else current.rank_batch
        PRESENT.together = current is None or current.train
        PRESENT.interrupted = current is not None and current.interrupted
        if self.synced is not None:  # in validation, a rank without a sample is in no step
            counts = () if current is None or current.rank_batch is None else current.rank_batch.counts
            self.synced.among = None if all(counts) else [rank for rank, count in enumerate(counts) if count]

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """On several ranks: an optimizer steps only on gradients that were averaged over them."""
        learning = bool(self.passes) and self.passes[-1].train
        if learning and optimizer in self.late:
            self.late[optimizer] = 0
            return
        nets = nn.ModuleList(replica.net for replica in self.replicas)
        own = {id(p) for p in nets.parameters()}
        if learning:
            check_optimizers([optimizer], nets, size=2)
            self.late[optimizer] = 0
            return
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            return
        if self.passes:
            raise StepError(f"the optimizer steps in a loop that began with the model in eval mode. {_MODE_REMEDY}")
        self.late[optimizer] = self.late.get(optimizer, 0) + 1
        if not self.trained or self.late[optimizer] > 1:  # one step may follow, on what was accumulated
            raise StepError(
                "the optimizer steps outside of a loop over a prepared loader, so the gradients are not averaged over "
                "ranks. Loop over the loader that dtrain.prepare returned."
            )

    def trained_with(self, replica: Replica) -> list[Replica]:
        """Returns the nets that a pass over a net's loader trains: that one, and those without a loader."""
        return [replica, *(other for other in self.replicas if id(other) not in self.fed and other is not replica)]

    def _leave_group(self) -> None:
        """Ends gloo's threads before the interpreter goes; they may abort the process otherwise.

        They live as long as anything holds the process group, as DDP does. After a failure it is left to the
        process's end: leaving could wait for what the other ranks never send.
        """
        if self.world is None or not dist.is_initialized() or hasattr(sys, "last_value"):
            return
        for replica in self.replicas:
            replica.close()
        if self.gradients is not None:
            self.gradients.close()
        self.world.accelerator.free_memory()
        dist.destroy_process_group()


PROCESS = Process()


class PreparedLoader:
    """One rank's view of a loader in a hand-written loop; each `for` over it is a new epoch.

    All ranks loop over it, each gets its share of the samples, on its device. What was not prepared of
    the loader (`dataset`, `batch_size`, ...) is reachable as on the loader itself.

    Args:
        loader: a DataLoader, or any iterable of batches that starts anew each epoch.
        replica: the net that it feeds.
        process: where the current pass is noted.
        batch: whose batch size the loader's is.
        functions: what the user says of its batches.
        seed: the order is derived from it and the epoch.
        fetch_batches: see `dtrain.data.fetch`.
        same_draws, sharding: as for `dtrain.train_model`; the second is called `data_sharding` there.

    Attributes:
        epochs: passes in training (True) and in validation so far.
        views: this rank's views of the loader, likewise.
        draws: what leads the random numbers of train and of valid steps.
        replica: of its net.
        began: the states of the user's own generators as the pass began.
    """

    def __init__(  # noqa: PLR0913 - keyword-only
        self,
        loader: Any,
        replica: Replica,
        process: Process,
        *,
        batch: BatchMode,
        functions: BatchFunctions,
        seed: int,
        fetch_batches: bool = True,
        same_draws: bool | None = None,
        sharding: DataSharding = "auto",
    ) -> None:
        self.loader = loader
        self.replica = replica
        process.fed.add(id(replica))
        process.loaders.append(self)
        self._process = process
        self.batch: BatchMode = batch
        self.seed = seed
        self._world = process.joined(cpu=False)
        self._how: dict[str, Any] = {"fetch_batches": fetch_batches, "functions": functions, "world": self._world}
        self._how["sharding"] = sharding
        self.views: dict[bool, ShardedLoader] = {}
        self.epochs = {True: 0, False: 0}
        self.began: list[Any] = []
        self.draws = step_draws(self._world, seed, replica, batch, same_draws)
        self._place = TrainPosition(self._world.rank, heartbeat=own_heartbeat())  # for the watch of `dtrain launch`

    def __len__(self) -> int:
        """Number of steps of a training pass; in validation, ranks may take one less.

        Raises:
            TypeError: the loader has no length.
        """
        steps = self.view(train=True).steps()
        if steps is None:
            raise TypeError(f"the loader ({type(self.loader).__name__}) has no length")
        return steps

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not set yet, while unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        """Yields this rank's batches of one epoch, on its device."""
        net = self.replica.net
        current = Pass(train=net.training)
        self.epochs[current.train] += 1
        begin = Resume() if self._process.run is None else self._process.run.enter(self, current)
        if begin is None:
            return
        view, draws = self.view(train=current.train), self.draws[0 if current.train else 1]
        if not current.train and view.own and self._world.size > 1:
            refuse_apart((one.net for one in self._process.trained_with(self.replica)), self._world.size)
        self.began = [generator.get_state() for generator in view.generators()]
        view.varied = draws is not None and draws.varies(self.epochs[current.train])
        if not current.train:
            # During training each rank kept its own buffers (BatchNorm's statistics); rank 0's are the ones saved.
            self._world.broadcast_(list(net.buffers()))
        self._process.passes.append(current)
        try:
            with contextlib.ExitStack() as stack:
                for replica in self._process.trained_with(self.replica):
                    stack.enter_context(replica.training() if current.train else replica.evaluating())
                    if self._process.synced is not None and not current.train:
                        stack.enter_context(synced_layers(replica.net, self._process.synced))
                self._place.enter("train" if current.train else "valid", self.epochs[current.train])
                shares = view.iter_batches(self.epochs[current.train], begin.skip, begin.ready)
                yield from self._batches(current, shares, begin)
        finally:
            self._place.enter(SCRIPT, self.epochs[True])
            self._process.close(current)
        if current.train:
            self._check(view)

    def _batches(self, current: Pass, iter_batches: Iterator[RankBatch], begin: Resume) -> Iterator[Any]:
        current.step = self._place.step = begin.skip
        self._place.advance()  # also while its batch is fetched
        draws, move = self.draws[0 if current.train else 1], mover_of(self._world.device)
        if draws is not None and begin.skip:
            draws.used = begin.used
        for rank_batch in (
            iter_batches
            if draws is None
            else draws.around(iter_batches, self._place.split, self.epochs[current.train], begin.skip)
        ):
            self._process.give(current, rank_batch)
            trained = current.trained = self._process.trained_with(self.replica) if current.train else []
            before = self._process.passes[: self._process.passes.index(current)]
            weighted = current.weighted_by(before) if before else trained
            learns = trained[0].averaging(rank_batch) if trained else contextlib.nullcontext()
            leaves = (parameter for replica in weighted for parameter in replica.net.parameters())
            with learns, scaled_gradients(leaves, rank_batch.scale if weighted else 1.0):
                yield rank_batch.batch if move is None else move(rank_batch.batch)
            self._process.give(current, None)
            current.step += 1
            if self._process.run is not None:
                self._process.run.step_done(self, current)
            self._place.advance()

    def view(self, *, train: bool) -> ShardedLoader:
        """Returns this rank's view of the loader, in training or in validation."""
        if train not in self.views:
            how = ShardSpec(self._world.rank, self._world.size, self.batch, fill=train)
            split = "train" if train else "valid"
            self.views[train] = ShardedLoader(self.loader, how, self.seed, split, **self._how)
        return self.views[train]

    def _check(self, view: ShardedLoader) -> None:
        """After a training pass: the ranks drew one order and have the same weights."""
        if self._world.size == 1:
            return
        order = view.fingerprint
        sums = self._world.all_reduce([order, order**2])
        check_order(sums[0], sums[1], self._world.size, "train")
        self.replica.compare()
