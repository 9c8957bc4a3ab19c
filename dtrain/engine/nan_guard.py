"""A loss that is NaN or infinite: found before it spoils the weights where that costs nothing, or before they are kept.

On the CPU each loss is looked at, before the optimizer steps where dtrain takes that step. On another device to look
means to wait for it, so that the running mean is looked at where it is printed, and the epoch's mean at its end. The
weights are looked at where they are saved.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dtrain.data.partition import RankBatch
from dtrain.distributed.dtensor import local_part
from dtrain.distributed.world import World
from dtrain.engine.callback import EngineCallback
from dtrain.engine.metrics import Mean, MeanTable, Value
from dtrain.errors import NotFiniteError, UsageError

WhenNan = Literal["stop", "skip", "ignore"]
_MOST_INDICES = 32

logger = logging.getLogger(__name__)
_REMEDY = "Check these samples, or lower the learning rate; train.nan=skip skips such batches, ignore continues."


class FiniteLoss:
    """What a run does about a loss that is not finite.

    Args:
        when: stop the run; skip the optimizer step, on all ranks; or ignore it.
        module: the net, whose buffers a skipped batch leaves as they were.
        world: the ranks.
    """

    def __init__(self, when: WhenNan, module: nn.Module, world: World) -> None:
        self.when = when
        self._module = module
        self._world = world
        self._bad: float | Tensor = 0.0  # of the micro-batches of the group
        self._buffers: list[Tensor] = []

    @property
    def skips(self) -> bool:
        """Whether batches are left out."""
        return self.when == "skip"

    def begin(self, rank_batch: RankBatch) -> None:
        """A step begins; with skip, what the net's forward changes besides the gradients is kept aside."""
        if self.skips and rank_batch.first:
            self._bad = 0.0
            self._buffers = [buffer.clone() for buffer in self._module.buffers()]

    def check(self, loss: Value | None, rank_batch: RankBatch) -> None:
        """Looks at a step's loss.

        Raises:
            NotFiniteError: it is not finite, and the run shall stop.
        """
        if self.when == "ignore" or loss is None:
            return
        number: Any = loss.total if isinstance(loss, Mean) else loss
        if self.skips:
            self._note(number, rank_batch)
            return
        if isinstance(number, Tensor):
            if not number.is_cpu:
                return
            number = number.item()
        if not math.isfinite(number):
            raise NotFiniteError(f"the loss of this step is {number}.{_samples(rank_batch)} {_REMEDY}")

    def _note(self, number: Any, rank_batch: RankBatch) -> None:
        bad = ~torch.isfinite(torch.as_tensor(number, device=self._world.device).detach())
        self._bad = self._bad + bad.to(self._world.sum_dtype)
        if bool(bad):
            rank_batch.count = 0  # the history's means are those of the other batches

    def refuses_step(self) -> bool:
        """Whether, with skip, some rank's loss was not finite: then no rank's optimizer steps. One small collective."""
        if not self.skips or not float(self._world.sum_(torch.as_tensor(self._bad))):
            return False
        for buffer, before in zip(self._module.buffers(), self._buffers, strict=True):
            buffer.data.copy_(before)
        return True

    def check_mean(self, mean: float | None, over: str) -> None:
        """Looks at a mean of losses, where it is known without waiting for the device.

        Args:
            mean: the mean, None where there is none yet.
            over: what it is the mean of, for the message.

        Raises:
            NotFiniteError: it is not finite, and the run shall stop.
        """
        if self.when == "stop" and mean is not None and not math.isfinite(mean):
            raise NotFiniteError(f"the mean loss of {over} is {mean}. {_REMEDY}")

    def check_running(self, table: MeanTable) -> None:
        """Looks at the running mean where somebody has just asked for it: on rank 0, for a line of its output."""
        if table.asked is not None:
            asked, table.asked = table.asked.get("loss"), None
            self.check_mean(asked, f"the steps of this rank up to step {table.steps}")

    def refuse_imperative(self) -> None:
        """With skip, a step that calls the optimizer itself cannot be held back.

        Raises:
            UsageError: the run is to skip.
        """
        if self.skips:
            raise UsageError(
                "train.nan=skip: the train step calls backward() and optimizer.step() itself, so dtrain cannot skip "
                "a step. Return the loss and leave the rest to dtrain, or use train.nan=stop."
            )


def check_weights(module: nn.Module, world: World, when: str) -> None:
    """Looks at the trained weights, on every rank; a small collective, and a wait for the device.

    A finite loss can have a gradient that is not, and a checkpoint of what that leaves is none to go on from.

    Args:
        module: the net.
        world: the ranks.
        when: in words, for the message.

    Raises:
        NotFiniteError: one is NaN or infinite on some rank; every rank raises it.
    """
    trained = {name: local_part(p) for name, p in module.named_parameters() if p.requires_grad}
    trained = {name: weight for name, weight in trained.items() if weight.is_floating_point() and weight.numel()}
    finite = [torch.linalg.vector_norm(weight, ord=math.inf).isfinite() for weight in trained.values()]
    spoilt = ~torch.stack(finite) if finite else torch.zeros(0, dtype=torch.bool)
    if not sum(world.all_reduce([float(spoilt.sum())])):
        return
    names = [name for name, bad in zip(trained, spoilt.tolist(), strict=True) if bad]
    told = f" ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" if names else ""
    raise NotFiniteError(
        f"{when} the weights are NaN or infinite{told}: a finite loss had a NaN or infinite gradient. They are not "
        "saved; the last checkpoint is from before. Lower the learning rate, or check square "
        "roots, logarithms and divisions in the loss; train.nan=ignore saves them anyway.",
        on_all_ranks=True,
    )


class WarnOfValidation(EngineCallback):
    """Warns of a validation loss that is not finite; training goes on.

    Args:
        columns: of the losses.
    """

    def __init__(self, columns: Sequence[str] = ("val_loss",)) -> None:
        self._columns = columns

    def on_epoch_end(self, row: Mapping[str, Any]) -> None:
        """An epoch is done, and this is its row of the history."""
        for column in self._columns:
            loss = row.get(column)
            if isinstance(loss, float) and not math.isfinite(loss):
                logger.warning(
                    "epoch %s: %s is %s. The weights are not affected, and training continues: check the validation "
                    "data and valid_step.",
                    *(row["epoch"], column, loss),
                )


def _samples(rank_batch: RankBatch) -> str:
    """Names the samples of a share, as far as the loader tells them."""
    if rank_batch.indices is None:
        return ""
    # A sampler of the user's may yield any kind of key.
    indices = rank_batch.indices.tolist() if isinstance(rank_batch.indices, Tensor) else list(rank_batch.indices)
    more = f" and {len(indices) - _MOST_INDICES} more" if len(indices) > _MOST_INDICES else ""
    return f" Its samples have the indices {', '.join(map(str, indices[:_MOST_INDICES]))}{more} in the dataset."
