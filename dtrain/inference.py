"""Evaluation and prediction with a trained net, on as many ranks as there are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.batches import BatchFunctions
from dtrain.compiling import Compilation, Compile, compilation, compiled
from dtrain.dealing import BatchMode, Dealing, Share
from dtrain.draws import draws_of
from dtrain.errors import DataError, StepError, UsageError, add_place
from dtrain.launch.heartbeat import own_heartbeat
from dtrain.learning import Task
from dtrain.loaders import in_data_order
from dtrain.metrics import PassResult, nothing_yielded
from dtrain.passes import Place, shares_on_device, valid_pass
from dtrain.precision import Precision, chosen, computing
from dtrain.progress import PassFacts, Progress, Silent
from dtrain.sharding import ShardedLoader
from dtrain.synced import ready
from dtrain.world import World

PredictStep = Callable[[nn.Module, Any], Any]

_CPU = torch.device("cpu")  # where predictions come together: all of them may be more than a device holds


def evaluate_task(  # noqa: PLR0913 - a task and how its loader is dealt
    task: Task,
    world: World,
    *,
    batch: BatchMode = "per_rank",
    seed: int = 42,
    same_draws: bool | None = False,
    fetch_batches: bool = True,
    epoch: int = 1,
    precision: Precision | None = None,
    compile: Compile | None = None,
    progress: Progress | None = None,
) -> PassResult:
    """Runs a task's validation once, as training does after each epoch.

    Args:
        task: its net, valid_step and dl_valid; the rest is not used.
        world: the ranks.
        batch: whose batch size the loader's is.
        seed: the order of a shuffled loader, and what the steps draw, are derived from it and the epoch.
        same_draws: whether random numbers within steps are those of training after this epoch, as its switch of this
            name says; False: they come from each rank's own streams.
        fetch_batches: see `dtrain.fetching`.
        epoch: 1 or more.
        precision: in which the net computes; by default that of Accelerate's settings.
        compile: whether, or in which mode of torch.compile, it is compiled; by default as Accelerate's settings say.
        progress: what a person sees.

    Returns:
        the means over all samples of all ranks, equal on all of them.

    Raises:
        UsageError: the task has no validation.
        StepError: the step breaks the contract.
        DataError: the loader yields nothing.
    """
    validation = valid_pass(task, world, batch=batch, seed=seed, fetch_batches=fetch_batches)
    if validation is None:
        raise UsageError("there is no validation loader, so there is nothing to evaluate. Define dl_valid.")
    ready(task.metrics, world)
    place, progress = Place(world.rank, heartbeat=own_heartbeat()), progress or Silent()
    try:
        with _set_up(task.module, world, precision, compile) as how:
            validation.draws = draws_of(task.module, world, seed, batch, same_draws, compiled=how is not None)
            return validation.run(epoch, place, progress)
    except (Exception, SystemExit) as error:
        add_place(error, str(place))
        raise
    finally:
        progress.close()


def predict(  # noqa: PLR0913 - keyword-only after the net, the data and the ranks
    module: nn.Module,
    loader: Any,
    world: World,
    *,
    predict_step: PredictStep | None = None,
    batch: BatchMode = "per_rank",
    batches: BatchFunctions | None = None,
    seed: int = 42,
    fetch_batches: bool = True,
    precision: Precision | None = None,
    compile: Compile | None = None,
    progress: Progress | None = None,
) -> Any:
    """Predicts every sample of a loader once.

    Args:
        module: the net; it is moved to the rank's device and set to eval mode.
        loader: a DataLoader, or any iterable of batches. A DataLoader that shuffles, or drops its last batch, is
            read in the order of its dataset, whole; what has an order of its own keeps it.
        world: the ranks.
        predict_step: `predict_step(model, features)`, by default `model(features)`. The features are the first part
            of a batch that is a tuple or list, else the whole batch. What is returned is a tensor, or a tuple, list
            or mapping of tensors; their first dimension is the samples of the batch.
        batch: whose batch size the loader's is; the result is the same.
        batches: what the user says of the batches of a loader without indices.
        seed: for loaders that draw random numbers.
        fetch_batches: see `dtrain.fetching`.
        precision: in which the net computes; by default that of Accelerate's settings.
        compile: whether, or in which mode of torch.compile, it is compiled; by default as Accelerate's settings say.
        progress: what a person sees.

    Returns:
        the predictions of all samples in the data's order, on the CPU, on every rank; nested as the step's.

    Raises:
        StepError: the step returns something else, or another number of rows than the batch has samples.
        DataError: the loader yields nothing.
    """
    place, progress = Place(world.rank, heartbeat=own_heartbeat()), progress or Silent()
    try:
        how = Dealing(world.rank, world.size, batch, fill=False)
        read: dict[str, Any] = {"fetch_batches": fetch_batches, "functions": batches}
        shares = ShardedLoader(in_data_order(loader), how, seed, "predict", **read)
        with _set_up(module, world, precision, compile):
            # A net that was trained and not yet validated has buffers of its own on each rank.
            world.broadcast_(list(module.buffers()))
            module.eval()
            place.enter("predict", 1)
            progress.begin(PassFacts("predict", 1, shares.steps()))
            mine = _Collected()
            for share in shares_on_device(shares, world, place):
                mine.add(_predicted(predict_step or _call, module, share), share)
        return mine.gather(world)
    except (Exception, SystemExit) as error:
        add_place(error, str(place))
        raise
    finally:
        progress.close()


@contextlib.contextmanager
def _set_up(
    net: nn.Module, world: World, precision: Precision | None, compile: Compile | None
) -> Iterator[Compilation | None]:
    """While inside, the net computes as it did in training; yields how it is compiled."""
    how = compilation(compile, world)
    with compiled(net, how), computing(net, chosen(precision, world), world):
        yield how


def features_of(batch: Any) -> Any:
    """Returns what a net predicts from: the first part of a tuple or list, else the whole batch."""
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def _call(model: nn.Module, features: Any) -> Any:
    return model(features)


def _predicted(step: PredictStep, module: nn.Module, share: Share) -> Any:
    with torch.no_grad():
        return step(module, features_of(share.batch))


class _Collected:
    """One rank's predictions, as lists of tensors, with the place of each block in the data's order."""

    def __init__(self) -> None:
        self._shape: Any = None  # the nesting, as JSON
        self._leaves: list[list[Tensor]] = []
        self._blocks: list[tuple[int, int]] = []

    def add(self, returned: Any, share: Share) -> None:
        leaves: list[Tensor] = []
        shape = _flatten(returned, leaves)
        if self._shape is None:
            self._shape, self._leaves = shape, [[] for _ in leaves]
        elif shape != self._shape:
            raise StepError(f"predict_step returned {shape} for one batch and {self._shape} for another.")
        for kept, leaf in zip(self._leaves, leaves, strict=True):
            if leaf.ndim == 0 or len(leaf) != share.count:
                raise StepError(
                    f"predict_step returned a tensor of shape {tuple(leaf.shape)} for a batch of {share.count} "
                    "samples. Return one row per sample."
                )
            kept.append(leaf.detach().cpu())
        self._blocks.append((share.start, share.count))

    def gather(self, world: World) -> Any:
        shapes = [shape for shape in world.gather_json(self._shape) if shape is not None]
        if not shapes:
            raise DataError(nothing_yielded("predict"))
        if any(shape != shapes[0] for shape in shapes):
            raise StepError(f"predict_step returned {shapes[0]} on one rank and {shapes[-1]} on another.")
        order = _order([part for part in world.gather_tensors(self._positions(), _CPU) if part is not None])
        count = len(self._leaves) or _count_leaves(shapes[0])
        mine = [torch.cat(leaf) for leaf in self._leaves] if self._leaves else [None] * count
        return _nested(shapes[0], iter([_joined(world.gather_tensors(leaf, _CPU), order) for leaf in mine]))

    def _positions(self) -> Tensor:
        """The place of each of this rank's rows."""
        rows = [torch.arange(start, start + count) for start, count in self._blocks]
        return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)


def _order(positions: list[Tensor]) -> Tensor:
    """Returns which of the gathered rows comes first, second, ... in the data's order."""
    everywhere = torch.cat(positions)
    order = torch.argsort(everywhere)
    if not torch.equal(everywhere[order], torch.arange(len(everywhere))):
        raise DataError("the ranks read different data: some samples were predicted twice, or not at all.")
    return order


def _joined(parts: list[Tensor | None], order: Tensor) -> Tensor:
    there = [part for part in parts if part is not None]
    sizes = {tuple(part.shape[1:]) for part in there}
    if len(sizes) > 1:
        raise StepError(f"predict_step returned rows of different shapes on different ranks: {sorted(sizes)}.")
    return torch.cat(there)[order]


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
        f"predict_step returned a {type(returned).__name__}. Return a tensor, or a tuple, list or mapping of tensors."
    )


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
