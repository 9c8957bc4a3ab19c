"""Checks that all ranks train the same thing, and that what is stepped is what is trained."""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from dtrain.distributed.dtensor import is_sharded
from dtrain.distributed.world import World
from dtrain.errors import DataError, StepError, UsageError, nothing_yielded

_OF_DDP = ("finished reduction in the prior iteration", "marked as ready twice", "mark a variable ready only once")


def check_same_task(world: World, net: nn.Module, loaders: dict[str, Any], own: Container[str] = ()) -> None:
    """Compares, before the first step, the net's shape and the loaders' lengths of all ranks.

    Args:
        world: the ranks.
        net: the net.
        loaders: by split.
        own: the splits of which the loader shards itself, so that the lengths are each rank's own.

    Raises:
        UsageError: they differ; both sides are named.
        DataError: a loader says that it has no batch; of one that cannot tell, this is found when it is read.
    """
    shapes = repr([(name, tuple(p.shape), p.requires_grad) for name, p in net.named_parameters()])
    mine = {"the fingerprint of the net's parameters": zlib.crc32(shapes.encode())}
    for split, loader in loaders.items():
        mine[f"whether the {split} loader shards itself by rank"] = split in own
        if split in own:
            continue
        mine[f"the number of {split} samples"] = _length(getattr(loader, "dataset", None))
        mine[f"the number of {split} batches"] = _length(loader)
    told = world.gather_json(mine)
    for name in mine:
        by_rank = [rank.get(name, "not compared") for rank in told]
        if len(set(by_rank)) > 1:
            raise UsageError(
                f"{name} is not the same on all ranks: {', '.join(f'{n} on rank {r}' for r, n in enumerate(by_rank))}. "
                "Build the same model and loaders on every rank; dtrain shards the data itself.",
                on_all_ranks=True,
            )
    for split in loaders:
        if mine.get(f"the number of {split} batches") == 0:
            raise DataError(nothing_yielded(split), on_all_ranks=True)


def _length(sized: Any) -> int:
    """A length, or -1 for what has none."""
    try:
        return len(sized)
    except TypeError:
        return -1


def check_optimizers(optimizers: Iterable[Optimizer], net: nn.Module, size: int) -> None:
    """Checks that the optimizers that step hold the net's parameters, and on several ranks only those.

    Raises:
        StepError: none of the net's parameters is stepped; or, on several ranks, a parameter outside the
            net is, whose gradient nobody averages.
    """
    own = {id(parameter) for parameter in net.parameters()}
    stepped = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    foreign = [p for p in stepped if id(p) not in own and p.requires_grad]
    if stepped and len(foreign) == len(stepped):
        raise StepError(
            "the optimizer that steps has none of the model's parameters: nothing is trained. Create "
            "it from model.parameters()."
        )
    if foreign and size > 1:
        shapes = ", ".join(str(tuple(p.shape)) for p in foreign[:3])
        raise StepError(
            f"the optimizer steps {len(foreign)} parameters that are not the model's "
            f"(first shapes: {shapes}). On several "
            "ranks their gradients are not averaged, so they would diverge. Make them part of the "
            "model, as in model.loss_func = LearnableLoss(), before the optimizer is built."
        )


def weights_checksum(net: nn.Module, dtype: torch.dtype) -> float:
    """Returns one number that differs where the weights do; weights of which there is one on all ranks do not count."""
    whole = [p.detach() for p in net.parameters() if p.is_floating_point() and not is_sharded(p)]
    norms = [torch.linalg.vector_norm(weight, dtype=dtype) for weight in whole]
    return float(torch.stack(norms).sum()) if norms else 0.0


def check_order(total: float, squares: float, size: int, split: str) -> None:
    """Compares the ranks' fingerprints of the sample order by their sum and their sum of squares.

    Raises:
        StepError: the ranks draw different samples, so that some are repeated and some left out.
    """
    if _spread(total, squares, size) > 1e-7:
        raise StepError(
            f"the ranks draw the {split} samples in different orders, so some are seen twice and some never. Seed "
            "the loader's generator or sampler equally on every rank, or omit the generator: dtrain "
            "seeds it. A dataset must not shard by rank: dtrain does.",
            on_all_ranks=True,
        )


def check_first_batch(world: World, fingerprint: float, split: str) -> None:
    """Compares the ranks' first batches before the first step, where a difference could still hang the ranks.

    Raises:
        StepError: they differ; every rank raises it.
    """
    told = world.gather_json(fingerprint)
    check_order(sum(told), sum(number**2 for number in told), world.size, split)


def _spread(total: float, squares: float, size: int) -> float:
    """The standard deviation of the ranks' numbers, relative to their mean; every rank computes the same."""
    mean = total / size
    variance = max(0.0, squares / size - mean**2)
    return math.sqrt(variance) / abs(mean) if mean and math.isfinite(variance) else 0.0


def check_takes(step: Callable[..., Any], batch: Any, split: str) -> None:
    """Checks that a step can be called with a batch.

    Raises:
        StepError: its parameters do not fit the batch's parts.
    """
    parts = batch if isinstance(batch, (tuple, list)) else (batch,)
    try:
        signature = inspect.signature(step)
    except (TypeError, ValueError):
        return  # a builtin or the like
    try:
        signature.bind(None, *parts)
    except TypeError as error:
        name = getattr(step, "__name__", f"{split}_step")
        raise StepError(
            f"{name}{signature} cannot be called with the model and a batch of {len(parts)} "
            f"part{'s' * (len(parts) != 1)}: {error}. A tuple or list is unpacked; any other batch is one argument."
        ) from None


def check_validation(step: Callable[..., Any] | None, loader: Any, split: str = "valid") -> None:
    """Checks, before training, what can be known of validation without a batch of it: nothing is drawn or fetched.

    Args:
        step: the valid step, or None.
        loader: the validation loader, or None.
        split: what it is called.

    Raises:
        DataError: the loader has no batch.
        StepError: the step's parameters do not fit the parts of its batches, where the loader's kind says how many.
    """
    if step is None or loader is None:
        return
    try:
        if _length(loader) == 0:
            raise DataError(nothing_yielded(split))
        dataset = _source(loader)
        if type(dataset) is TensorDataset and loader.collate_fn is default_collate and loader.batch_size is not None:
            check_takes(step, [None] * len(dataset.tensors), "valid")
    except (DataError, StepError) as error:
        error.on_all_ranks = True  # the same on every rank
        raise


def batches_alike(loader: Any, other: Any) -> bool:
    """Whether two loaders' batches have the same parts: the same dataset, or parts of it, put together the same way."""
    if _source(loader) is None or _source(other) is None:
        return False
    how = [(one.collate_fn, one.batch_size is None) for one in (loader, other)]
    return how[0] == how[1] and _source(loader) is _source(other)


def _source(loader: Any) -> Any:
    """The dataset that a DataLoader's samples come from, where it takes a subset of one; None for another loader."""
    if type(loader) is not DataLoader:
        return None
    dataset = loader.dataset
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset


def word_in_terms_of_ranks(error: BaseException) -> None:
    """Words torch's complaints that come from training on several ranks in terms of the step.

    Raises:
        StepError: if the error is such: a step that DistributedDataParallel does not fit, or BatchNorm on a rank with
            one sample.
    """
    if not isinstance(error, (RuntimeError, ValueError)):
        return
    if "Expected more than 1 value per channel" in str(error):
        raise StepError(
            "BatchNorm cannot train on this rank's part of the batch, which is one sample. Compute its statistics "
            "over all ranks with sync_batchnorm (train.sync_batchnorm=true), or set "
            "drop_last=True or another batch size."
        ) from None
    if any(words in str(error) for words in _OF_DDP):
        raise StepError(
            "DistributedDataParallel cannot average this train step's gradients over the ranks: some parameter got "
            'none, or more than one. Set train.average=step (average="step" in Python), which supports it.'
        ) from None
