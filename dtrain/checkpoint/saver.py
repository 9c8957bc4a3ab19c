"""When a run is saved, and how: gathered from the ranks, copied, written beside the training."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dtrain.checkpoint.contents import GlobalState, checkpoint_files, packed, plain
from dtrain.checkpoint.extra import extra_metadata
from dtrain.checkpoint.folder import make_way, write_checkpoint
from dtrain.checkpoint.left_out import LeftOut, known_names
from dtrain.checkpoint.locate import LINES, ROWS, RUN
from dtrain.checkpoint.pretrained import PRETRAINED, check_pretrained, write_pretrained
from dtrain.checkpoint.retention import RetentionPolicy
from dtrain.checkpoint.rows import RowLines
from dtrain.checkpoint.sources import UnsavedState, check_keepable
from dtrain.checkpoint.state import State, rank_state, run_state, weights_state
from dtrain.checkpoint.tensors import check_storable
from dtrain.checkpoint.trainable import beginning_of
from dtrain.checkpoint.tree import flatten
from dtrain.checkpoint.weights import WEIGHTS
from dtrain.checkpoint.writer import Snapshot, Writer, fits_on_disk
from dtrain.config.schema import CheckpointConfig
from dtrain.distributed.dtensor import gathered
from dtrain.distributed.time_limit import AgreedClock
from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.hooks import adds_columns
from dtrain.engine.loop import Engine
from dtrain.engine.nan_guard import check_weights
from dtrain.engine.position import FinishedPass, TrainPosition
from dtrain.errors import CheckpointError, StopRequested, UsageError
from dtrain.launch.signals.stop_request import is_ctrl_c
from dtrain.layout import checkpoint_name
from dtrain.model.fsdp import ShardedReplica

logger = logging.getLogger(__name__)


# Rank 0 writes all, also what the others have of their own: it comes through the process group, a few kilobytes a
# rank. So nodes need no file system in common, and no rank's file can be missing when the checkpoint is sealed.


class Checkpointer(EngineCallback):
    """Saves an engine's state where the policy says so; every rank has one.

    Args:
        engine: what is saved.
        folder: of all checkpoints; rank 0 writes there.
        policy: when, and what is kept.
        facts: what the manifests say of the run; asked once it has begun.
    """

    order = Order.CHECKPOINT

    def __init__(self, engine: Engine, folder: Path, policy: CheckpointConfig, facts: Callable[[], Mapping[str, Any]]):
        self.stalls: list[float] = []
        self.guard: Callable[[], None] = lambda: None  # raises where the run's folder is no longer this process's
        self._engine = engine
        self._folder = folder
        self._policy = policy
        self._facts = facts
        self._keeping = RetentionPolicy(policy.keep_last, policy.keep_best, policy.monitor, policy.mode)
        self._writer = Writer(beside=policy.asynchronous)
        self._snapshot = Snapshot()
        self._clock = None if policy.every_minutes is None else AgreedClock(policy.every_minutes * 60, engine.world)
        self._saved: tuple[int, int | None] | None = None
        self._trained: tuple[FinishedPass, State] | None = None  # the epoch's train pass, and the rank's state after it
        self._trained_epoch = 0
        self._told_no_room = self._lacked = False
        self._unkept: UnsavedState | None = None
        self._rows = {name: RowLines() for name in ROWS}
        self._passed: int | None = None  # samples of the newest whole train pass
        self.passed_before: int | None = None  # of the run that is resumed
        self.restored: frozenset[str] = frozenset()  # names of the weights that the checkpoint had that is resumed
        self._left_out: LeftOut | None = None

    def attach(self) -> None:
        """From now on the engine's steps and epochs are followed.

        Raises:
            UsageError, CheckpointError: something has a state that no checkpoint can hold; it is named.
        """
        self._check_policy()
        check_keepable(self._engine)
        self._unkept = UnsavedState(self._engine)
        self._engine.callbacks.add(self)
        if self._policy.every_steps is not None:
            self._engine.counts.every.append(self._policy.every_steps)
        start = self._engine.start
        if start.trained is not None:
            self._saved = start.epoch, start.trained.steps
        if self._clock is not None:
            self._clock.restart(self._engine.place.updates)

    def _check_policy(self) -> None:
        """Looks whether the net can be saved as the policy says; marks what its checkpoints lack, on rank 0."""
        engine, policy = self._engine, self._policy
        module, began = engine.task.module, beginning_of(engine)
        sharded = isinstance(engine.learner.replica, ShardedReplica)
        if policy.pretrained:
            check_pretrained(module, sharded=sharded)
        if policy.weights == "all":
            return
        if sharded:
            raise UsageError("checkpoint.weights=trained: not with train.shard. Use checkpoint.weights=all.")
        if engine.world.is_main:
            known = known_names(module, began.learns, engine.modes.state(within=False))
            self._left_out = LeftOut(module, known | self.restored)

    def on_save_point(self, position: TrainPosition) -> None:
        """Saves where it is due.

        Raises:
            NotFiniteError: the weights are not finite, and `train.nan` does not ignore that.
            OSError: the checkpoint before could not be written, and the policy says stop.
        """
        self._check()
        if self._due(position):
            self._save(position)

    def on_train_pass_end(self, trained: FinishedPass) -> None:
        """Keeps what a stop in validation needs: that is left in its midst, and done again by the run that goes on."""
        self._trained = trained, rank_state(self._engine)
        self._trained_epoch = self._engine.place.epoch or self._engine.start.epoch
        if not self._engine.spent and self._engine.epoch_steps is None:
            self._passed = trained.result.samples
            self._compare_passes()

    def _compare_passes(self) -> None:
        """Warns, once, where a loader without a length gives another number of samples since the run was resumed."""
        before, self.passed_before = self.passed_before, None
        known = "train batches" in beginning_of(self._engine).lengths
        if self._engine.world.is_main and not known and before not in (None, self._passed):
            logger.warning(
                "an epoch had %d training samples before the run was resumed and "
                "now has %d: has the data changed? (The "
                "loader has no length to compare.)",
                *(before, self._passed),
            )

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writer.busy

    def save_now(self) -> None:
        """Saves where the engine is, and returns once that is on the disk.

        Raises:
            OSError: it cannot be written, whatever the policy says of errors.
        """
        if self._saved == self._position():
            self._writer.wait()
            return
        self._save(self._engine.place, beside=False)

    def save_trained(self) -> None:
        """Saves the train pass of an epoch whose validation failed, as a stop within it would, and as it can be alone.

        Several ranks save together, and the others do not know of one's failure: there nothing is done.

        Raises:
            Exception: it could not be saved.
        """
        place = self._engine.place
        within = self._trained is None or self._trained_epoch != place.epoch
        if place.split == "valid" and not within and self._engine.world.size == 1:
            self.save_now()

    def on_train_end(self) -> None:
        """Waits until the last one is on the disk.

        Raises:
            OSError: it could not be written, and the policy says stop.
        """
        self._tolerating(self._writer.wait)

    def on_exception(self, error: BaseException) -> None:
        """Saves where a run is that was asked to stop; of one that failed, what can be saved.

        Raises:
            OSError: the run that was asked to stop cannot be saved.
        """
        if isinstance(error, StopRequested):
            self.save_now()
        elif not is_ctrl_c(error):
            for attempt in (self.save_trained, self.on_train_end):
                with contextlib.suppress(Exception):  # what ended the run is told, not this
                    attempt()

    def weights(self, which: Literal["best", "last"]) -> Path | None:
        """Returns the file with the best or the last saved epoch's weights; None where there is none."""
        saved = self._keeping.chosen(self._folder, which)
        return None if saved is None else saved.path / WEIGHTS

    def _due(self, place: TrainPosition) -> bool:
        policy, engine = self._policy, self._engine
        minutes = self._clock is not None and self._clock.due(place.updates)
        if place.split != "train":
            ends = place.epoch == engine.epochs or engine.stopping
            return minutes or ends or (policy.every_epochs > 0 and place.epoch % policy.every_epochs == 0)
        return minutes or (policy.every_steps is not None and place.passed(policy.every_steps))

    def _save(self, place: TrainPosition, *, beside: bool | None = None) -> None:
        engine, world = self._engine, self._engine.world
        started = time.perf_counter()
        position = self._position()
        if engine.learner.finite.when != "ignore":
            check_weights(engine.task.module, world, _told(position))
        mine = packed(self._rank_state(), world.rank)
        ranks = world.gather_tensors(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
        whole = self._gathered() if isinstance(engine.learner.replica, ShardedReplica) else None
        if self._unkept is not None:
            self._unkept.warn()
        if world.is_main:
            if position[1] is None:
                self._check_monitor(engine.history.rows[-1])
            write = lambda: self._write(ranks, position, started, beside, whole)  # noqa: E731
            self._tolerating(write, always=beside is False)
        self._saved = position
        if self._clock is not None:
            self._clock.restart(place.updates)

    def _check_monitor(self, row: dict[str, Any]) -> None:
        """Looks for the monitored column in a row; where a hook may add it later, that it lacks it is a warning.

        Raises:
            UsageError: there is none.
        """
        there = self._keeping.check(row, may_lack=adds_columns(self._engine.task.hooks))
        if not there and not self._lacked:
            logger.warning(
                "checkpoint.monitor = %r: no such column in the history yet. An epoch without it is never the best.",
                self._keeping.monitor,
            )
        self._lacked = not there

    def _write(
        self,
        ranks: list[Tensor | None],
        position: tuple[int, int | None],
        started: float,
        beside: bool | None,
        whole: GlobalState | None,
    ) -> None:
        self._writer.wait()  # the copy's memory is in use until then
        structure, named, metadata, rows = whole or self._state()
        if whole is not None:  # a copy already
            beside, copied = self._writer.beside if beside is None else beside, named
        else:
            beside = self._writer.beside and self._has_room(named) if beside is None else beside
            copied = self._snapshot.take(named) if beside else {name: plain(tensor) for name, tensor in named.items()}
        row = self._engine.history.rows[-1] if position[1] is None else None
        stall = time.perf_counter() - started
        facts = {**self._facts(), "epoch": position[0], "step": position[1], "row": row, "stall_seconds": stall}
        facts["epoch_samples"] = self._passed
        self.stalls.append(stall)

        name = checkpoint_name(*position)
        part = None
        if self._policy.pretrained and position[1] is None:
            with self._engine.averaged():
                part = write_pretrained(self._engine.task.module, self._folder, name)

        def job() -> None:
            begun = time.perf_counter()
            files = checkpoint_files(GlobalState(structure, copied, metadata, rows), ranks)
            make_way(self._folder / name)
            path = write_checkpoint(self._folder, name, files, facts)
            if part is not None:
                part.rename(path / PRETRAINED)
            self._keeping.prune(self._folder)
            spent = time.perf_counter() - begun
            logger.info("%s: training waited %.3f s, written in %.3f s", path.name, stall, spent)

        self._writer.submit(job, beside=beside)
        if not beside:
            self.stalls[-1] = time.perf_counter() - started

    def _state(self) -> GlobalState:
        """Returns all that is the same on all ranks, its tensors where they are."""
        state = self._run_state()
        rows = {f"{name}{LINES}": self._rows[name].of(state.pop(name)) for name in ROWS}
        structure, tensors = flatten(state, RUN)
        weights, more = weights_state(self._engine), dict[str, str]()
        if self._left_out is not None:
            weights, more = self._left_out.split(weights, whole=self._engine.is_over)
        check_storable(weights, "the net's ")
        named = {f"{WEIGHTS}:{name}": tensor for name, tensor in weights.items()} | tensors
        metadata = extra_metadata(self._engine.task.module.state_dict()) | more
        return GlobalState(structure, named, metadata, rows)

    def _gathered(self) -> GlobalState:
        """The same of a sharded net, gathered by all ranks and kept by rank 0; there, one copy at a time."""
        self._writer.settle()
        replica = self._engine.learner.replica
        if isinstance(replica, ShardedReplica):
            replica.apart()
        whole = self._state()
        return whole._replace(tensors=gathered(whole.tensors, keep=self._engine.world.is_main))

    def _position(self) -> tuple[int, int | None]:
        """Returns the epoch, and the train steps of it that are done; None for all that belongs to it."""
        place = self._engine.place
        if place.split == "valid" and self._trained is not None:
            return place.epoch, self._trained[0].steps
        return place.epoch, place.step if place.split == "train" else None

    def _rank_state(self) -> State:
        if self._engine.place.split == "valid" and self._trained is not None:
            return self._trained[1]
        return rank_state(self._engine)

    def _run_state(self) -> State:
        state = run_state(self._engine)
        if self._engine.place.split != "valid" or self._trained is None:
            return state
        trained = self._trained[0]
        return state | {"step": trained.steps, "trained": asdict(trained)}

    def _has_room(self, tensors: Mapping[str, Tensor]) -> bool:
        room = fits_on_disk(self._snapshot.lacking(tensors))  # what the last copy took is taken from what is free
        if not room and not self._told_no_room:
            self._told_no_room = True
            logger.warning("not enough memory to copy the state: training waits while the checkpoint is written")
        return room

    def _check(self) -> None:
        self._tolerating(self._writer.check)

    def _tolerating(self, attempt: Callable[[], None], *, always: bool = False) -> None:
        """Runs something that may fail to write; by policy that is a warning."""
        try:
            attempt()
        except (OSError, CheckpointError) as error:
            self.guard()
            if always or self._policy.on_error == "stop":
                raise
            logger.warning("a checkpoint could not be written; training continues: %s", error)


def _told(position: tuple[int, int | None]) -> str:
    epoch, step = position
    return f"after epoch {epoch}" if step is None else f"after train step {step} of epoch {epoch}"
