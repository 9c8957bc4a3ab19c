"""A script's run in a folder: its loops go on where they were, after any kill::

    net, dl_train, dl_valid, optimizer = dtrain.prepare(net, dl_train, dl_valid, optimizer)
    run = dtrain.run("runs/first", net, optimizer, scheduler)
    for epoch in run.epochs(10):
        ...                                      # loops over the prepared loaders, with meters, as ever
        run.history.append(row)

A checkpoint is saved at the end of each epoch, and within one where the config says so. In a resumed epoch, the loops
that were done yield nothing, the one in which the run was goes on with the next batch, and meters have what they had.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from dtrain.api.described import described
from dtrain.api.in_run import in_plain_words, requests
from dtrain.api.keeper import Resume
from dtrain.api.prepared import PROCESS, Pass, PreparedLoader
from dtrain.api.script_begin import Begun, begin_script, check_prepared, script_code
from dtrain.api.script_state import Objects, load_loader, loader_state
from dtrain.callbacks.tracking.wanted import check_installed
from dtrain.checkpoint.contents import checkpoint_files, packed
from dtrain.checkpoint.folder import write_checkpoint
from dtrain.checkpoint.locate import LINES, ROWS
from dtrain.checkpoint.retention import RetentionPolicy
from dtrain.checkpoint.rows import RowLines
from dtrain.config import call_settings
from dtrain.config.calls import SCRIPT, run_folder
from dtrain.distributed.seeding import derive, load_random_state, random_state, seed_everything
from dtrain.distributed.stopping import Stopping
from dtrain.distributed.time_limit import AgreedClock
from dtrain.engine.arguments import check_whole
from dtrain.engine.metrics import add_up
from dtrain.engine.position import TrainPosition
from dtrain.errors import CheckpointError, StopRequested, UsageError
from dtrain.launch.monitor.exit_report import jointly_supervised, name_run
from dtrain.layout import CHECKPOINTS, STOP, checkpoint_name
from dtrain.rundir.history import History
from dtrain.rundir.lock import check_all
from dtrain.trainer.agreed import agree
from dtrain.trainer.ending import report_exception

logger = logging.getLogger(__name__)

State = dict[str, Any]


def run(folder: str | Path, model: Any, *others: Any, config: Mapping[str, Any] | None = None) -> ScriptRun:
    """Keeps a script's run in a folder, and puts its objects to where the run was, if it was started before.

    Args:
        folder: of the run, such as "runs/first". One program has one at a time.
        model: the net, after `dtrain.prepare`.
        others: whatever else changes in training: optimizers, the scheduler, further nets. The loaders are known.
        config: further keys of a run's config: `{"checkpoint.every_steps": 100}`; see docs/configs.md.

    Returns:
        the run: its `epochs(n)` iterates over the epochs that are left, its `history` takes the rows.

    Raises:
        UsageError: an argument is wrong, or the folder has another run; what differs is named.
    """
    return ScriptRun(folder, Objects.of((model, *others)), config)


class ScriptRun:
    """What `dtrain.run` returns.

    Args:
        folder, config: as there.
        objects: the script's.

    Attributes:
        folder: the run's.
        history: the rows so far, on every rank; `append(row)` adds one.
    """

    def __init__(self, folder: str | Path, objects: Objects, config: Mapping[str, Any] | None) -> None:
        first = check_prepared(PROCESS)
        self._shown = run_folder(folder)
        self._world, self._objects, self._config = first.world, objects, config
        self._seed = first.seed
        self._pass = self._step = self._steps = 0  # of the epoch: passes that began, steps of this one, and of all
        self._meters: dict[int, tuple[Any, set[int]]] = {}  # by id: a meter, and the passes that it was used in
        self._pending: list[tuple[set[int], State]] = []  # those of the epoch that is resumed
        self._active = self._iterated = False  # within an epoch; whether `epochs` was iterated over
        self._resumed: State | None = None
        self._running: tuple[PreparedLoader, Pass] | None = None
        self._before: list[dict[bool, int]] = []
        self._epoch = 0
        self._saved: tuple[int, int | None] = (0, 0)
        self._lines = RowLines()
        self._stepped: set[int] = set()  # ids of the optimizers that have stepped with the last batch
        self._signals = contextlib.ExitStack()
        self._request = self._signals.enter_context(requests())
        hook = register_optimizer_step_post_hook(lambda one, *_: self._stepped.add(id(one)))
        self._signals.callback(hook.remove)
        settings = self._settings(folder, first)
        with in_plain_words(self._world):
            self._begun = begin_script(
                settings, self._world, objects, script_code(objects, PROCESS.loaders), self._request
            )
        self.folder = self._begun.folder
        self.history: History = self._begun.history
        self.history.guard = self._check_append
        self._policy = settings.config.checkpoint
        self._clock = AgreedClock(self._policy.every_minutes * 60, self._world) if self._policy.every_minutes else None
        self._keeping = RetentionPolicy(
            self._policy.keep_last, self._policy.keep_best, self._policy.monitor, self._policy.mode
        )
        if self._world.local_rank == 0 or not jointly_supervised():
            name_run(self.folder)
        self._stopping = Stopping(self._world, self._request, self.folder / STOP)
        for loader in PROCESS.loaders:
            loader.view(train=True).sources.kept = True
        if self._begun.loaded is not None:
            self._restore(self._begun)
        PROCESS.run = self
        atexit.register(self._at_exit)

    def epochs(self, count: int) -> Iterator[int]:
        """Yields the numbers of the epochs that are left, from 1 to `count`, and saves the run after each.

        Args:
            count: of all epochs of the run; it may grow.

        Raises:
            StopRequested: the run was asked to stop, by a signal or the file STOP; it is saved.
        """
        check_whole(epochs=count)
        self._iterated = True
        start = self._epoch + (0 if self._resumed is not None else 1)
        if start > count:
            if self._world.is_main:
                print(f"{self._shown} is complete: {self._epoch} epoch{'s' * (self._epoch != 1)}.")  # noqa: T201
            self._close(None)
            return
        if self._begun.loaded is not None and self._resumed is None:
            self._random(self._begun.loaded.ranks)
        self._begun.note_start()
        with self._stopping:
            for epoch in range(start, count + 1):
                self._enter(epoch)
                yield epoch
                self._end()
        self._close(None)

    def _check_append(self) -> None:
        if not self._iterated:
            raise UsageError(
                "run.history.append: the row is not within an epoch of the run, so nothing would be saved. Write the "
                "loop as `for epoch in run.epochs(N):`."
            )
        check_all(self._begun.ownerships)

    # --- what the loops tell ----------------------------------------------------------------------------

    def enter(self, loader: PreparedLoader, current: Pass) -> Resume | None:
        """A pass begins; None where it was done before the script was resumed."""
        if not self._active:
            return Resume()
        self._pass += 1
        self._step = 0
        self._stepped.clear()
        self._running = (loader, current) if current.train else None
        if self._resumed is None or self._pass > self._resumed["pass"]:
            self._resumed = None
            return Resume()
        if self._pass < self._resumed["pass"]:
            return None
        state, self._resumed = self._resumed, None
        self._step = state["step"]
        loaded = self._begun.loaded
        mine = self._mine(loaded.ranks if loaded is not None else [])
        index = PROCESS.loaders.index(loader)

        def ready() -> None:
            loader.view(train=True).sources.load(mine["loaders"][index]["datasets"])
            self._random(loaded.ranks if loaded is not None else [])
            self._objects.wait(mine.get("gradients", {}))

        return Resume(state["step"], ready, mine["loaders"][index]["used"])

    def step_done(self, loader: PreparedLoader, current: Pass) -> None:
        """The body of a loop is done with a batch: the run is saved, or stopped, where that is due."""
        if not current.train or not self._active:
            return
        self._step, self._steps = current.step, self._steps + 1
        if loader.draws[0] is not None:
            loader.draws[0].leave()
        alone = len(PROCESS.passes) == 1
        try:
            if alone:
                self._stopping.step()
        except StopRequested:
            self._save(self._steps, last=True)
            raise self._stopped() from None
        every, minutes = self._policy.every_steps, self._clock is not None and self._clock.due(self._steps)
        if (minutes or (every is not None and self._steps % every == 0)) and alone:
            self._save(self._steps)
        self._stepped.clear()

    def metered(self, meter: Any, *, adds: bool) -> None:
        """A meter is used: one of a resumed epoch takes up what it had.

        What is added outside of loops is added again in a resumed epoch, and not kept.
        """
        places = self._meters.get(id(meter), (None, set[int]()))[1]
        within = bool(PROCESS.passes)
        if not self._active or (within and self._pass in places) or (adds and not within):
            return
        if not places and meter.table.steps == 0:
            known = next((one for one in self._pending if not within or self._pass in one[0]), None)
            if known is not None:
                self._pending.remove(known)
                places |= known[0]
                meter.table.load(known[1], self._world.device)
        if within:
            places.add(self._pass)
        self._meters[id(meter)] = meter, places

    # --- epochs -----------------------------------------------------------------------------------------

    def _enter(self, epoch: int) -> None:
        self._epoch, self._pass, self._step = epoch, 0, 0
        self._running, self._active = None, True
        self._before = [dict(loader.epochs) for loader in PROCESS.loaders]
        if self._resumed is None:
            self._steps = 0
            self._meters, self._pending = {}, []

    def _end(self) -> None:
        self._running, self._active = None, False
        if self._resumed is not None:
            raise UsageError(
                f"the run was stopped in loop {self._resumed['pass']} of epoch {self._epoch}, and the epoch now has "
                f"{self._pass}: has the program changed? Restore it, or choose another folder."
            )
        every = self._policy.every_epochs
        if every == 0 or self._epoch % every == 0:
            self._save(None)
        try:
            self._stopping.step()
        except StopRequested:
            if self._saved != (self._epoch, None):
                self._save(None, last=True)
            raise self._stopped() from None

    def _stopped(self) -> StopRequested:
        self._world.gather_json(None)  # rank 0 has written what any of them tells of
        error = StopRequested(
            f"stopped {self._stopping.why()}, in epoch {self._epoch}; saved in {self._shown}\n"
            "resume with: the same program again"
        )
        self._close(error)
        return error

    def _close(self, error: BaseException | None) -> None:
        PROCESS.run = None
        atexit.unregister(self._at_exit)
        self.history.sync()
        self._begun.close(error)
        self._signals.close()

    def _at_exit(self) -> None:
        """The program ends without all epochs: what ended it is noted."""
        error = getattr(sys, "last_value", None)
        if error is None and not self._iterated and self._world.is_main:
            logger.warning("%s: nothing was saved, since the loop is not `for epoch in run.epochs(N):`", self._shown)
        if isinstance(error, BaseException) and not isinstance(error, StopRequested) and not jointly_supervised():
            report_exception(
                self.folder, TrainPosition(self._world.rank, self._epoch, "train", self._step), self._world, error
            )
        with contextlib.suppress(BaseException):
            self._begun.close(error if isinstance(error, BaseException) else None)

    # --- state ------------------------------------------------------------------------------------------

    def _settings(self, folder: str | Path, first: Any) -> Any:
        optimizer, scheduler = (next(iter(things), None) for things in (self._objects.optimizers, self._objects.others))
        loaders = {f"loader_{number}": one.loader for number, one in enumerate(PROCESS.loaders, start=1)}
        objects = described(
            self._shown, model=self._objects.nets[0], optimizer=optimizer, scheduler=scheduler, loaders=loaders
        )
        own = {"train.batch": (first.batch, "batch"), "train.seed": (first.seed, "seed")}
        settings = call_settings(SCRIPT, folder, {**own, **objects}, self._config)
        check_installed(settings.config.track)
        if any(value for value in settings.config.track.model_dump(exclude={"every_seconds"}).values()):
            raise UsageError("config: track.* is for train_model, KerasModel.fit and `dtrain train`: remove it.")
        return settings

    def _save(self, step: int | None, *, last: bool = False) -> None:
        """Saves the run on all ranks; that it cannot be written is a warning, where the config says so.

        Args:
            step: of the run's, None at an epoch's end.
            last: whether the program ends with it.
        """
        world, warns = self._world, self._policy.on_error == "warn" and not last
        mine = packed(self._rank_state(within=step is not None), world.rank)
        ranks = world.gather_tensors(torch.frombuffer(bytearray(mine), dtype=torch.uint8))

        def write() -> bool:
            if not world.is_main:
                return True
            check_all(self._begun.ownerships)
            rows = self.history.rows
            state = self._objects.state() | {
                "epoch": self._epoch,
                "step": step,
                "within": None if step is None else {"pass": self._pass, "step": self._step, "steps": self._steps},
                "before": self._before if step is not None else [dict(one.epochs) for one in PROCESS.loaders],
            }
            lines = dict(zip((f"{name}{LINES}" for name in ROWS), (self._lines.of(rows), b""), strict=True))
            whole = self._objects.whole(state, lines)
            row = rows[-1] if step is None and rows and rows[-1].get("epoch") == self._epoch else None
            facts = {**self._begun.facts(), "epoch": self._epoch, "step": step, "row": row, "stall_seconds": 0.0}
            folder = self.folder / CHECKPOINTS
            try:
                write_checkpoint(folder, checkpoint_name(self._epoch, step), checkpoint_files(whole, ranks), facts)
                self._keeping.prune(folder)
            except (OSError, CheckpointError) as error:
                if not warns:
                    raise
                logger.warning("a checkpoint could not be written; training continues: %s", error)
                return False
            return True

        written = agree(world, write)
        if not warns or world.gather_json(written)[0]:
            self._saved = (self._epoch, step)
        if self._clock is not None:
            self._clock.restart(self._steps)

    def _rank_state(self, *, within: bool) -> State:
        running = None if self._running is None else self._running[0]
        return {
            "random": random_state(self._world.device),
            "gradients": self._objects.waiting(self._stepped) if within else {},
            "loaders": [loader_state(one, running=one is running) for one in PROCESS.loaders],
            "meters": [
                [sorted(places), one.table.state()] for one, places in self._meters.values() if places and within
            ],
        }

    def _mine(self, ranks: list[State]) -> State:
        return ranks[self._world.rank] if len(ranks) == self._world.size else ranks[0]

    def _random(self, ranks: list[State]) -> None:
        if len(ranks) == self._world.size:
            load_random_state(ranks[self._world.rank]["random"], self._world.device)
        else:
            seed_everything(derive(self._seed, "rank", self._world.rank, "from", self._epoch, self._step))

    def _restore(self, begun: Begun) -> None:
        assert begun.loaded is not None  # noqa: S101 - for the type checker
        run, ranks = begun.loaded.run, begun.loaded.ranks
        same, within = len(ranks) == self._world.size, run["within"]
        self._objects.load(begun.loaded.weights, run)
        self._epoch = run["epoch"]
        mine = self._mine(ranks)
        for number, loader in enumerate(PROCESS.loaders):
            load_loader(loader, mine["loaders"][number], run["before"][number], same_ranks=same)
        if within is None:
            return
        self._resumed, self._steps = within, within["steps"]
        for number, (places, state) in enumerate(mine["meters"]):
            table = state
            if not same:
                table = add_up([rank["meters"][number][1] for rank in ranks])
                table |= {} if self._world.is_main else {"samples": 0, "sums": {}}
            self._pending.append((set(places), table))
