"""Measures one rank's train steps on a recipe: as they are, then part by part; then tries what could be faster."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from dtrain.config import Settings
from dtrain.data.fetch import RowsOf, fetched_by_batch
from dtrain.distributed.seeding import deterministic
from dtrain.distributed.world import World
from dtrain.engine.loop import Engine
from dtrain.engine.train_step import Task
from dtrain.model.precision import chosen
from dtrain.recipe.loader import Recipe
from dtrain.tools.bench.advice import BenchResult, TrialResult
from dtrain.tools.bench.candidates import Candidate, candidates
from dtrain.tools.bench.clock import WARM_UP, time_steps, waiter
from dtrain.tools.bench.engines import bench_engine
from dtrain.tools.bench.facts import facts_of
from dtrain.tools.bench.notes import Notes
from dtrain.tools.bench.reads import CountReads
from dtrain.tools.bench.state import KeptState
from dtrain.tools.bench.stopwatch import Stopwatch
from dtrain.tools.bench.trials import Trials, reason
from dtrain.tools.bench.work import CountFlops, MeasureLaunches, matrix_rate, queue_of
from dtrain.trainer.agreed import agree
from dtrain.trainer.setup import load_bound

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SHOWN = 8  # reads a step in other places are not listed


@dataclass(frozen=True)
class Asked:
    """What a bench is to do.

    Attributes:
        steps: train steps to measure, besides the warm-up.
        trials: whether to try what could be faster.
        compile: whether to try torch.compile.
        began: `time.time()` when the command began; the trials take at most as long as everything before them.
    """

    steps: int
    trials: bool = True
    compile: bool = False
    began: float = 0.0


@dataclass(frozen=True)
class Tell:
    """Who is told on rank 0 how it goes on.

    Attributes:
        measured: what was measured.
        trying: the names of what is tried, and for how many seconds at most.
    """

    measured: Callable[[BenchResult], object] = lambda _: None
    trying: Callable[[list[str], float], object] = lambda _, __: None


def bench(settings: Settings, world: World, asked: Asked, out: Path, tell: Tell) -> BenchResult:
    """Trains for a few steps, again and again, and times them. The recipe's net is trained on; nothing is kept.

    Args:
        settings: the recipe and its parameters.
        world: the ranks.
        asked: what to do.
        out: a file for what was found, as JSON. Where ranks before these have left one, they go on from it.
        tell: is told how it goes on.

    Raises:
        AgreedError: some rank could not set up; every rank raises it.
        Exception: what the user's code has raised.
    """
    with deterministic(settings.config.train.deterministic):
        recipe, task = agree(world, lambda: load_bound(settings))
        task.dl_valid = None
        return _Bench(recipe, task, settings, world, asked, tell, Notes(out, world)).run()


@dataclass
class _Bench:
    """A bench on one rank."""

    recipe: Recipe
    task: Task
    settings: Settings
    world: World
    asked: Asked
    tell: Tell
    notes: Notes

    def run(self) -> BenchResult:
        known = self.notes.content
        found, kept = self._warmed(BenchResult(**known["result"])) if "result" in known else self._measured()
        if not self.asked.trials:
            return found
        if isinstance(kept, str):
            return self._ended(found, untried=f"nothing was tried: {kept}")
        return self._tried(found, [Candidate(**one) for one in self.notes.content["candidates"]], kept)

    def _warmed(self, found: BenchResult) -> tuple[BenchResult, KeptState | str]:
        """Takes the first steps of these ranks; returns what others have found, and the task's state."""
        with bench_engine(self.task, self.settings, self.world, WARM_UP) as engine:
            engine.train_pass(1)
            optimizers = engine.learner.optimizers()
        return found, self._kept(optimizers)

    def _measured(self) -> tuple[BenchResult, KeptState | str]:
        """Measures, and notes what could be tried; returns the result, and the task's state."""
        with bench_engine(self.task, self.settings, self.world, self.asked.steps + WARM_UP) as engine:
            found = self._looked_at(engine, self._timed(engine))
            facts = facts_of(self.recipe, self.settings, engine, found, compile=self.asked.compile)
            optimizers = engine.learner.optimizers()
        kept = self._kept(optimizers)
        own = {"result": asdict(self._with_peak(found)), "candidates": [asdict(one) for one in candidates(facts)]}
        agreed = self.world.gather_json(own)[0]  # what follows from times must be the same on all ranks
        found = BenchResult(**agreed["result"])
        self.notes.add(**agreed, trials=[], trying=None)
        if self.world.is_main:
            self.tell.measured(found)
        return found, kept

    def _timed(self, engine: Engine) -> BenchResult:
        """Measures the steps as they are, and part by part."""
        steps, task = self.asked.steps, self.task
        engine.train_pass(1)  # the first steps of a process are slow
        clock = time_steps(engine, steps, first=2)
        length = engine.train_loader.steps()
        stopwatch = Stopwatch(self.world, WARM_UP if length is None else min(WARM_UP, max(0, length - 2)))
        with engine.callbacks.having(stopwatch), stopwatch.inside_steps(task.module):
            engine.train_pass(2 + 2 * steps)
        loader = task.dl_train
        plain = isinstance(loader, DataLoader)
        fetches = self.settings.config.train.fetch_batches
        return BenchResult(
            step_seconds=clock.seconds / clock.steps,
            samples_per_second=clock.samples / clock.seconds,
            parts={name: total / max(1, stopwatch.steps) for name, total in stopwatch.seconds.items()},
            asked=0.0,
            device=self.world.device.type,
            workers=loader.num_workers if plain else None,
            by_batch=plain and fetches and isinstance(fetched_by_batch(loader)[0], RowsOf),
            steps=clock.steps,
        )

    def _looked_at(self, engine: Engine, found: BenchResult) -> BenchResult:
        """Looks at what a step reads, computes and sends to a GPU; returns the result with that."""
        eager = getattr(engine.learner.replica, "clock", None) is None
        reads, flops = CountReads(self.world.device), CountFlops(counts=eager)
        number = 3 + 2 * self.asked.steps
        with engine.callbacks.having(reads), engine.callbacks.having(flops):
            try:
                engine.train_pass(number)
            finally:
                flops.close()
                reads.close()
        queue = queue_of(self.world.device)
        launches = None if queue is None else MeasureLaunches(queue)
        if launches is not None:
            with engine.callbacks.having(launches):
                engine.train_pass(number + 1)
        return _with_looks(found, reads, flops, launches)

    def _kept(self, optimizers: list[torch.optim.Optimizer]) -> KeptState | str:
        """Returns the task's state; or, on all ranks alike, why it cannot be kept."""
        train = self.settings.config.train
        if self.world.size > 1 and (train.shard or self.world.sharding is not None):
            return "the model is sharded (train.shard)"
        kept, why = None, ""
        try:
            kept = KeptState(self.task, optimizers, self.world.device)
        except Exception as error:  # noqa: BLE001 - a state that cannot be copied, or no memory for it
            why = f"the state of the run cannot be copied: {reason(error)}"
        why = next(filter(None, self.world.gather_json(why)), "")
        return why if kept is None or why else kept

    def _with_peak(self, found: BenchResult) -> BenchResult:
        """Returns the result with what a matrix product in the net's precision reaches."""
        if not found.flops:
            return found
        first = next((p.dtype for p in self.task.module.parameters() if p.is_floating_point()), torch.float32)
        dtype = _DTYPES.get(chosen(self.settings.config.train.precision, self.world), first)
        try:
            peak = matrix_rate(self.world.device, dtype, waiter(self.world))
        except RuntimeError:  # no such product on this device, or no memory left for it
            return found
        return replace(found, peak=peak, dtype=str(dtype).removeprefix("torch."))

    def _tried(self, found: BenchResult, listed: list[Candidate], kept: KeptState) -> BenchResult:
        """Tries the candidates that are left."""
        notes = self.notes
        if "deadline" not in notes.content:
            seconds = max(0.0, time.time() - self.asked.began)
            notes.add(deadline=time.time() + seconds, trials_began=time.time())
            if self.world.is_main and listed:
                self.tell.trying([one.name for one in listed], seconds)
        done = [TrialResult(**one) for one in notes.content["trials"]]
        trials = Trials(self.task, self.settings, self.world, kept, found.step_seconds, self.asked.steps)
        for candidate in listed[len(done) :]:
            notes.add(trying=candidate.name)
            try:
                long = "compile" in candidate.train  # which was asked for, and takes what it takes
                done.append(trials.try_out(candidate, math.inf if long else notes.content["deadline"]))
            except (Exception, SystemExit) as error:
                notes.leave_word(reason(error))
                raise
            notes.add(trying=None, trials=[asdict(one) for one in done])
        kept.put_back()
        return self._ended(found)

    def _ended(self, found: BenchResult, untried: str = "") -> BenchResult:
        content = self.notes.content
        began = content.get("trials_began")
        seconds = None if began is None else time.time() - began
        found = replace(found, trials=content["trials"], trial_seconds=seconds, untried=untried)
        self.notes.add(result=asdict(found))
        return found


def _with_looks(
    found: BenchResult, reads: CountReads, flops: CountFlops, launches: MeasureLaunches | None
) -> BenchResult:
    """Returns a result with what was looked at. A step that waits for the GPU does not tell what sending it takes."""
    places = reads.per_step()
    sent = None if places or launches is None else launches
    return replace(
        found,
        asked=sum(places.values()),
        reads=dict(sorted(places.items(), key=lambda one: -one[1])[:_SHOWN]),
        flops=flops.flops,
        enqueue_seconds=None if sent is None else sent.host,
        device_seconds=None if sent is None else sent.device,
        images=flops.images,
    )
