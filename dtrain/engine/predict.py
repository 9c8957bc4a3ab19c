"""Evaluation and prediction with a trained net, on as many ranks as there are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.data.batches import BatchFunctions
from dtrain.data.dataloaders import in_data_order
from dtrain.data.loader import ShardedLoader
from dtrain.data.partition import RankBatch, ShardSpec
from dtrain.distributed.world import World
from dtrain.engine.callback import Callbacks, EngineCallback, each
from dtrain.engine.facts import PassFacts
from dtrain.engine.metrics import PassResult
from dtrain.engine.options import RunOptions
from dtrain.engine.packed import gather_entries
from dtrain.engine.passes import batches_on_device
from dtrain.engine.position import TrainPosition
from dtrain.engine.random_draws import draws_of
from dtrain.engine.synced_metrics import ready
from dtrain.engine.train_step import Task
from dtrain.engine.valid_passes import valid_pass
from dtrain.errors import DataError, StepError, UsageError, add_place, nothing_yielded
from dtrain.launch.monitor.heartbeat import own_heartbeat
from dtrain.model.compile import Compilation, compilation, compiled, wanted
from dtrain.model.precision import chosen, computing
from dtrain.model.untracked_batchnorm import synced_validation

PredictStep = Callable[[nn.Module, Any], Any]

_EVALUATION = RunOptions(same_draws=False)
_TWICE = "the ranks read different data: some samples were predicted twice, or not at all."
_CPU = torch.device("cpu")  # where predictions come together: all of them may be more than a device holds


def evaluate_task(
    task: Task,
    world: World,
    options: RunOptions = _EVALUATION,
    *,
    epoch: int = 1,
    progress: EngineCallback | None = None,
) -> PassResult:
    """Runs a task's validation once, as training does after each epoch.

    Args:
        task: its net, valid_step and dl_valid; the rest is not used.
        world: the ranks.
        options: how it computes; what is training's own is not used. With `same_draws` as in training, random numbers
            within steps are those of training after this epoch; with False they come from each rank's own streams.
        epoch: 1 or more.
        progress: what a person sees.

    Returns:
        the means over all samples of all ranks, equal on all of them.

    Raises:
        UsageError: the task has no validation.
        StepError: the step breaks the contract.
        DataError: the loader yields nothing.
    """
    validation = valid_pass(task, world, options)
    if validation is None:
        raise UsageError("no validation loader, so there is nothing to evaluate. Define dl_valid.")
    ready(task.metrics, world)
    place, calls = TrainPosition(world.rank, heartbeat=own_heartbeat()), Callbacks(progress)
    try:
        with _set_up(task.module, world, options) as how:
            drawn = (options.seed, options.batch, options.same_draws)
            for part in validation.parts:
                part.draws = draws_of(task.module, world, *drawn, compiled=how is not None)
            return validation.run(epoch, place, calls)
    except (Exception, SystemExit) as error:
        add_place(error, place)
        raise
    finally:
        calls.close()


def predict(  # noqa: PLR0913 - keyword-only after the net, the data and the ranks
    module: nn.Module,
    loader: Any,
    world: World,
    options: RunOptions = _EVALUATION,
    *,
    predict_step: PredictStep | None = None,
    batches: BatchFunctions | None = None,
    progress: EngineCallback | None = None,
) -> Any:
    """Predicts every sample of a loader once.

    Args:
        module: the net; it is moved to the rank's device and set to eval mode.
        loader: a DataLoader, or any iterable of batches. A DataLoader that shuffles, or drops its last batch, is
            read in the order of its dataset, whole; what has an order of its own keeps it.
        world: the ranks.
        options: how it computes; what is training's own is not used.
        predict_step: `predict_step(model, features)`, by default `model(features)`. The features are the first part
            of a batch that is a tuple or list, else the whole batch. What is returned is a tensor, or a tuple, list
            or mapping of tensors, whose first dimension is the samples of the batch; or a list with an entry for each
            sample: texts, numbers, tensors of any shape, lists and mappings of these.
        batches: what the user says of the batches of a loader without indices.
        progress: what a person sees.

    Returns:
        the predictions of all samples in the data's order, on the CPU, on every rank; nested as the step's, or a list
        with an entry for each sample.

    Raises:
        UsageError: the loader is a mapping of several.
        StepError: the step returns something else, or another number of rows than the batch has samples.
        DataError: the loader yields nothing.
    """
    if isinstance(loader, Mapping):
        raise UsageError(
            f"predict takes one loader, not a mapping of {len(loader)} ({', '.join(map(str, loader))}). Predict the "
            "loaders one by one."
        )
    place, calls = TrainPosition(world.rank, heartbeat=own_heartbeat()), Callbacks(progress)
    try:
        synced = synced_validation(
            module, world, compiled=world.size > 1 and wanted(options.compile, world) is not None
        )
        how = ShardSpec(world.rank, world.size, options.batch, fill=synced is not None)
        read: dict[str, Any] = {"fetch_batches": options.fetch_batches, "functions": batches}
        read["sharding"] = options.data_sharding
        iter_batches = ShardedLoader(in_data_order(loader), how, options.seed, "predict", **read)
        with _set_up(module, world, options):
            # A net that was trained and not yet validated has buffers of its own on each rank.
            world.broadcast_(list(module.buffers()))
            module.eval()
            place.enter("predict", 1)
            each(calls.on_pass_start, PassFacts("predict", 1, iter_batches.steps()))
            mine = _Collected()
            for rank_batch in batches_on_device(iter_batches, world, place, together=synced is not None):
                with contextlib.nullcontext() if synced is None else synced.of_part(rank_batch.count):
                    predicted = _predicted(predict_step or _call, module, rank_batch)
                if rank_batch.count:
                    mine.add(predicted, rank_batch)
        return mine.gather(world)
    except (Exception, SystemExit) as error:
        add_place(error, place)
        raise
    finally:
        calls.close()


@contextlib.contextmanager
def _set_up(net: nn.Module, world: World, options: RunOptions) -> Iterator[Compilation | None]:
    """While inside, the net computes as it did in training; yields how it is compiled."""
    how = compilation(options.compile, world)
    with compiled(net, how), computing(net, chosen(options.precision, world), world):
        yield how


def features_of(batch: Any) -> Any:
    """Returns what a net predicts from: the first part of a tuple or list, else the whole batch."""
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def _call(model: nn.Module, features: Any) -> Any:
    return model(features)


def _predicted(step: PredictStep, module: nn.Module, rank_batch: RankBatch) -> Any:
    with torch.no_grad():
        return step(module, features_of(rank_batch.batch))


class _Collected:
    """One rank's predictions, as lists of tensors, with the place of each block in the data's order."""

    def __init__(self) -> None:
        self._shape: Any = None  # the nesting, as JSON
        self._leaves: list[list[Tensor]] = []
        self._blocks: list[tuple[int, int]] = []
        self._entries: list[tuple[int, int, Any]] = []  # of predictions that are lists

    def add(self, returned: Any, rank_batch: RankBatch) -> None:
        if _is_list_of_samples(returned, rank_batch.count):
            self._entries.append((rank_batch.start, rank_batch.count, _on_cpu(returned)))
            return
        leaves: list[Tensor] = []
        shape = _flatten(returned, leaves)
        if self._shape is None:
            self._shape, self._leaves = shape, [[] for _ in leaves]
        elif shape != self._shape:
            raise StepError(f"predict_step returned {shape} for one batch and {self._shape} for another.")
        for kept, leaf in zip(self._leaves, leaves, strict=True):
            if leaf.ndim == 0 or len(leaf) != rank_batch.count:
                raise StepError(
                    f"predict_step returned a tensor of shape {tuple(leaf.shape)} for a batch of {rank_batch.count} "
                    "samples. Return one row per sample."
                )
            if kept and kept[0].shape[1:] != leaf.shape[1:]:
                raise StepError(_ragged([tuple(kept[0].shape[1:]), tuple(leaf.shape[1:])], "for different batches"))
            kept.append(leaf.detach().cpu())
        self._blocks.append((rank_batch.start, rank_batch.count))

    def gather(self, world: World) -> Any:
        forms = {form for told in world.gather_json([bool(self._entries), bool(self._blocks)]) for form in _forms(told)}
        if len(forms) > 1:
            raise StepError(
                "predict_step returned a list with an entry per sample for one batch, and rows for another."
            )
        if forms == {"list"}:
            return self._gather_lists(world)
        shapes = [shape for shape in world.gather_json(self._shape) if shape is not None]
        if not shapes:
            raise DataError(nothing_yielded("predict"))
        if any(shape != shapes[0] for shape in shapes):
            raise StepError(f"predict_step returned {shapes[0]} on one rank and {shapes[-1]} on another.")
        order = _order([part for part in world.gather_tensors(self._positions(), _CPU) if part is not None])
        count = len(self._leaves) or _count_leaves(shapes[0])
        mine = [torch.cat(leaf) for leaf in self._leaves] if self._leaves else [None] * count
        return _nested(shapes[0], iter([_joined(world.gather_tensors(leaf, _CPU), order) for leaf in mine]))

    def _gather_lists(self, world: World) -> list[Any]:
        entries = self._entries if world.size == 1 else gather_entries(self._entries, world, "predict_step")
        found: list[Any] = []
        for start, _, values in sorted(entries, key=lambda entry: entry[0]):
            if start != len(found):
                raise DataError(_TWICE)
            found += values
        return found

    def _positions(self) -> Tensor:
        """The place of each of this rank's rows."""
        rows = [torch.arange(start, start + count) for start, count in self._blocks]
        return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)


def _order(positions: list[Tensor]) -> Tensor:
    """Returns which of the gathered rows comes first, second, ... in the data's order."""
    everywhere = torch.cat(positions)
    order = torch.argsort(everywhere)
    if not torch.equal(everywhere[order], torch.arange(len(everywhere))):
        raise DataError(_TWICE)
    return order


def _joined(parts: list[Tensor | None], order: Tensor) -> Tensor:
    there = [part for part in parts if part is not None]
    sizes = {tuple(part.shape[1:]) for part in there}
    if len(sizes) > 1:
        raise StepError(_ragged(sorted(sizes), "on different ranks"))
    return torch.cat(there)[order]


def _ragged(shapes: list[tuple[int, ...]], where: str) -> str:
    return (
        f"predict_step returned rows of the shapes {', '.join(map(str, shapes))} {where}, as from batches padded to "
        "their longest sample. Return a list with an entry per sample, [row.tolist() for row in rows], or pad all rows "
        "to one length."
    )


def _flatten(returned: Any, leaves: list[Tensor]) -> Any:
    """Puts the tensors of a nested result into a list; returns the nesting in a form that JSON keeps."""
    if isinstance(returned, Tensor):
        leaves.append(returned)
        return "tensor"
    if isinstance(returned, Mapping):
        return {"keys": [str(key) for key in returned], "parts": [_flatten(part, leaves) for part in returned.values()]}
    if isinstance(returned, (tuple, list)):
        return [_flatten(part, leaves) for part in returned]
    raise StepError(
        f"predict_step returned a {type(returned).__name__}. Return a tensor, or a tuple, list or mapping of tensors, "
        "with a row per sample; or a list with an entry per sample."
    )


def _is_list_of_samples(returned: Any, count: int) -> bool:
    """Whether it has an entry for each sample; a list of tensors that have a row for each is no such list."""
    if not isinstance(returned, list) or len(returned) != count:
        return False
    return not all(isinstance(one, Tensor) and one.ndim > 0 and len(one) == count for one in returned)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: _on_cpu(part) for key, part in value.items()}
    return [_on_cpu(part) for part in value] if isinstance(value, (list, tuple)) else value


def _forms(told: list[bool]) -> list[str]:
    return [form for form, there in zip(("list", "rows"), told, strict=True) if there]


def _count_leaves(shape: Any) -> int:
    parts = shape["parts"] if isinstance(shape, dict) else shape
    return 1 if shape == "tensor" else sum(_count_leaves(part) for part in parts)


def _nested(shape: Any, leaves: Any) -> Any:
    """Undoes `_flatten`; lists and named tuples come back as tuples, mappings as dicts."""
    if shape == "tensor":
        return next(leaves)
    if isinstance(shape, dict):
        return {key: _nested(part, leaves) for key, part in zip(shape["keys"], shape["parts"], strict=True)}
    return tuple(_nested(part, leaves) for part in shape)
