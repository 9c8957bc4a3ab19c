"""BatchNorm without running statistics (`track_running_stats=False`), which takes a batch's own in eval mode, too.

On several ranks a batch is cut, so that in validation and prediction as well these layers need the sums of all ranks.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dtrain.errors import UsageError
from dtrain.model.activation_checkpointing import refuse_synced_batchnorm
from dtrain.model.sync_batchnorm import SyncedBatchNorm

if TYPE_CHECKING:
    from dtrain.distributed.world import World

logger = logging.getLogger(__name__)

_TRAINING = 5  # position of this argument of torch.nn.functional.batch_norm


def untracked(module: nn.Module) -> dict[str, nn.Module]:
    """Returns the BatchNorm layers that have no running statistics, by name."""
    kind = nn.modules.batchnorm._BatchNorm
    return {name: part for name, part in module.named_modules() if isinstance(part, kind) and part.running_mean is None}


def synced_training(module: nn.Module, world: World, wanted: bool, *, compiled: bool) -> SyncedBatchNorm | None:
    """Returns what train steps run in, so that BatchNorm takes its statistics over all ranks; None where it does not.

    Raises:
        UsageError: it is wanted, and cannot be had beside something else.
    """
    if world.size == 1:
        return None
    if not wanted:
        warn_of_parts(module, world, "Set train.sync_batchnorm=true (sync_batchnorm=True in Python).")
        return None
    refuse_synced_batchnorm(module)
    if compiled:
        raise UsageError(
            "train.compile and train.sync_batchnorm cannot be combined: compiled BatchNorm layers cannot communicate. "
            "Use only one of the two."
        )
    return SyncedBatchNorm(world)


def synced_validation(
    module: nn.Module, world: World, *, compiled: bool, together: bool = False
) -> SyncedBatchNorm | None:
    """Returns what validation and prediction run in, so that these layers see all ranks' rows of a batch.

    Every rank must take part in every step then.

    Args:
        module: the net.
        world: the ranks.
        compiled: whether dtrain compiles it.
        together: whether every rank takes part in every step anyway; functions of a user's own are led, too, then.

    Returns:
        None where there is one rank, or no such layer and the ranks take steps of their own.

    Raises:
        UsageError: it is compiled, so that its layers cannot communicate.
    """
    layers = untracked(module) if world.size > 1 else {}
    if not layers:
        return SyncedBatchNorm(world) if together and world.size > 1 and not compiled else None
    if compiled:
        raise UsageError(
            f"{_some(layers)}: BatchNorm with track_running_stats=False takes a batch's statistics in validation, too, "
            f"and compiled layers cannot take them over {world.size} ranks. Disable train.compile, track running "
            "statistics, or use one rank."
        )
    return SyncedBatchNorm(world)


def warn_of_parts(module: nn.Module, world: World, remedy: str) -> None:
    """Warns, on rank 0 of several, where such layers are trained on other statistics than they are validated with.

    Args:
        module: the net.
        world: the ranks; each trains on a part of each batch.
        remedy: a sentence.
    """
    layers = untracked(module) if world.size > 1 and world.is_main else {}
    if layers:
        logger.warning(
            "%s: BatchNorm with track_running_stats=False takes its statistics over all ranks in validation, but from "
            "each rank's part of a batch in training, as with DistributedDataParallel. %s",
            _some(layers),
            remedy,
        )


def refuse_apart(modules: Iterable[nn.Module], ranks: int) -> None:
    """Looks for such layers where each rank validates on a stream of its own, in a loop of a user's own.

    There, ranks take different numbers of steps, and do not know which others take part in one.

    Raises:
        UsageError: there is one.
    """
    layers = {name: layer for module in modules for name, layer in untracked(module).items()}
    if layers:
        raise UsageError(
            f"{_some(layers)}: BatchNorm with track_running_stats=False takes the statistics of a batch of all {ranks} "
            "ranks in validation, too, but the validation loader shards itself, so each rank has its own number of "
            "batches. Track running statistics, have dtrain shard the loader (sharded_by_rank = False on it), or use "
            "one rank.",
            on_all_ranks=True,
        )


class PartStatistics(TorchFunctionMode):
    """While active, sees BatchNorm of a user's own that takes the statistics of this rank's part of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self._seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Looks at one function, and calls it."""
        if func is torch.nn.functional.batch_norm:
            self._seen |= bool(args[_TRAINING] if len(args) > _TRAINING else (kwargs or {}).get("training", False))
        return func(*args, **(kwargs or {}))

    def warn(self, world: World) -> None:
        """Warns, on rank 0, if there was one."""
        if self._seen and world.is_main:
            logger.warning(
                "the validation step calls BatchNorm with the statistics of the batch, of which each rank has a part, "
                "so val_ values depend on the number of ranks. Set valid_together = True in the recipe "
                "(train_model(valid_together=True)): they are over all ranks then."
            )


@contextlib.contextmanager
def synced_layers(module: nn.Module, synced: SyncedBatchNorm) -> Iterator[None]:
    """While inside, these layers see all ranks' rows in eval mode; in training mode they are left alone.

    For loops of a user's own, which may be open side by side and end in any order.
    """

    inside: list[nn.Module] = []

    def enter(layer: nn.Module, _: Any) -> None:
        if not layer.training:
            synced.__enter__()  # type: ignore[no-untyped-call]
            inside.append(layer)

    def leave(layer: nn.Module, *_: Any) -> None:
        if inside and inside[-1] is layer:  # it may have raised before it was entered
            inside.pop()
            synced.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    with contextlib.ExitStack() as stack:
        for layer in untracked(module).values():
            stack.callback(layer.register_forward_pre_hook(enter).remove)
            stack.callback(layer.register_forward_hook(leave, always_call=True).remove)
        yield


def _some(layers: dict[str, nn.Module]) -> str:
    return ", ".join([name or "the model" for name in layers][:3]) + ", ..." * (len(layers) > 3)
