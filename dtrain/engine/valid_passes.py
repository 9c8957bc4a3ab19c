"""Validation as a whole: a pass over its loader, or over each of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dtrain.data.batches import takes_fixed_parts
from dtrain.data.device_data import DeviceStore
from dtrain.data.loader import ShardedLoader
from dtrain.data.partition import ShardSpec
from dtrain.distributed.world import World
from dtrain.engine.callback import Callbacks
from dtrain.engine.facts import RunFacts
from dtrain.engine.metrics import PassResult
from dtrain.engine.options import RunOptions
from dtrain.engine.passes import ValidPass
from dtrain.engine.position import Limits, TrainPosition
from dtrain.engine.train_step import Task
from dtrain.engine.valid_loaders import by_name, column_of, named_step, split_of
from dtrain.errors import StepError
from dtrain.model.compile import wanted
from dtrain.model.untracked_batchnorm import synced_validation
from dtrain.rundir.columns import VALID


class SeveralValid:
    """Validation over several loaders, a pass each, one after another.

    Args:
        parts: the passes; each has its loader's name.

    Attributes:
        parts: the same.
    """

    def __init__(self, parts: Sequence[ValidPass]) -> None:
        self.parts = parts

    @property
    def module(self) -> nn.Module:
        """The net."""
        return self.parts[0].module

    @property
    def names(self) -> dict[str, tuple[str, ...] | None]:
        """The values' names of each loader, known after its first pass."""
        return {part.name: part.names for part in self.parts}

    @names.setter
    def names(self, known: Mapping[str, tuple[str, ...] | None]) -> None:
        for part in self.parts:
            part.names = known.get(part.name)

    def aside(self) -> SeveralValid:
        """Returns a copy as `ValidPass.aside` does."""
        return SeveralValid([part.aside() for part in self.parts])

    def run(
        self, epoch: int, place: TrainPosition, calls: Callbacks, facts: RunFacts | None = None, *, within: bool = False
    ) -> PassResult:
        """Validates once with each loader, as `ValidPass.run` does.

        Returns:
            the means of all of them, each under its loader's name; samples, steps and seconds are sums.

        Raises:
            StepError: two values come to one column.
        """
        results = {part.name: part.run(epoch, place, calls, facts, within=within) for part in self.parts}
        means: dict[str, float] = {}
        for name, result in results.items():
            for value, mean in result.means.items():
                column = column_of(name, value)
                if column in means:
                    raise StepError(
                        f"two validation loaders have the column {VALID}{column}: the value {value!r} of {name!r}, and "
                        "another one's. Choose another name for one of the loaders.",
                        on_all_ranks=True,
                    )
                means[column] = mean
        samples, steps, seconds = zip(*((one.samples, one.steps, one.seconds) for one in results.values()), strict=True)
        return PassResult(means, sum(samples), sum(steps), sum(seconds))


Validation = ValidPass | SeveralValid


def valid_pass(  # noqa: PLR0913 - keyword-only after what a run has
    task: Task,
    world: World,
    options: RunOptions,
    limits: Limits | None = None,
    *,
    in_step: bool = False,
    store: DeviceStore | None = None,
) -> Validation | None:
    """Returns a task's validation, None where it has no validation loader; usable without its train loader.

    Raises:
        UsageError: a name of several loaders makes no good column name.
    """
    if task.dl_valid is None or task.valid_step is None:
        return None
    compiled = world.size > 1 and wanted(options.compile, world) is not None
    synced = synced_validation(task.module, world, compiled=compiled, together=task.valid_together)
    limits, in_step = limits or Limits(), in_step or task.valid_together or synced is not None
    how = ShardSpec(world.rank, world.size, options.batch, fill=in_step, limit=limits.valid, merge=limits.merge)
    about: dict[str, Any] = {"in_step": in_step, "synced": synced, "eager": not compiled}
    parts = []
    for name, dl_valid in by_name(task.dl_valid).items():
        step = named_step(task.valid_step, name)
        read: dict[str, Any] = {"functions": task.batches, "fixed": takes_fixed_parts(step)}
        read |= {"fetch_batches": options.fetch_batches, "sharding": options.data_sharding, "world": world}
        loader = ShardedLoader(dl_valid, how, options.seed, split_of(name), store=store, **read)
        loader.prefetch = options.prefetch_to_device
        parts.append(ValidPass(task.module, step, loader, world, task.metrics, name=name, **about))
    return SeveralValid(parts) if isinstance(task.dl_valid, Mapping) else parts[0]
