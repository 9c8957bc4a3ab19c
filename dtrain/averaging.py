"""An exponential moving average of the weights (EMA), beside those that are trained.

After each optimizer step, average = decay * average + (1 - decay) * weights; the first one is the weights after the
first step. The arithmetic is that of `torch.optim.swa_utils`; buffers (BatchNorm's statistics) are the trained net's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dtrain.fsdp.tensors import cut_like, is_sharded, local_part


class WeightAverage:
    """The average of a net's trained parameters; it is the same on all ranks, since they are, or sharded as they are.

    Args:
        module: the net, on the rank's device.
        decay: above 0 and below 1.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._trained.items()}
        self._move = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.updates = 0

    def update(self) -> None:
        """Takes the weights of one more optimizer step in."""
        weights = [local_part(parameter) for parameter in self._trained.values()]
        if self.updates == 0:
            self._copy(weights)
        else:
            self._move([local_part(average) for average in self._average.values()], weights, self.updates)
        self.updates += 1

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """While inside, the net has the averaged weights; then its own again."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def settle(self) -> None:
        """Leaves the averaged weights in the net, for good."""
        self._exchange()

    def weights(self) -> dict[str, Tensor]:
        """Returns the averaged parameters by name, where they are."""
        return dict(self._average)

    def trained(self) -> dict[str, Tensor]:
        """Returns the trained parameters by name, where they are."""
        return {name: parameter.detach() for name, parameter in self._trained.items()}

    def take_up(self, trained: Mapping[str, Tensor], updates: int) -> None:
        """Goes on from a net that was loaded with averaged weights.

        Args:
            trained: the parameters that were trained, by name.
            updates: optimizer steps so far.
        """
        self._copy([local_part(parameter) for parameter in self._trained.values()])
        for name, parameter in self._trained.items():
            local_part(parameter).copy_(local_part(cut_like(trained[name], parameter)))
        self.updates = updates

    def _copy(self, weights: list[Tensor]) -> None:
        for average, weight in zip(self._average.values(), weights, strict=True):
            local_part(average).copy_(weight)

    def _exchange(self) -> None:
        for name, parameter in self._trained.items():
            if is_sharded(parameter):  # its memory is part of a larger one
                mine, average = local_part(parameter), local_part(self._average[name])
                before = mine.clone()
                mine.copy_(average)
                average.copy_(before)
            else:
                self._average[name], parameter.data = parameter.data, self._average[name]
