"""A net and train steps that take none, one or several optimizer steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SAMPLES, BATCH, DECAY = 24, 6, 0.8


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, x[:, :1] * x[:, 1:2] + 0.5


class Net(nn.Module):
    """A net that counts its train steps in a buffer, which checkpoints keep."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        self.second = torch.optim.Adam(self.parameters(), lr=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def loss_of(net: Any, x: Tensor, y: Tensor) -> Tensor:
    return ((net(x) - y) ** 2).mean()


def each_second(net: Any, x: Tensor, y: Tensor) -> Tensor:
    """Accumulates by itself."""
    loss = loss_of(net, x, y)
    (loss / 2).backward()
    net.seen += 1
    if int(net.seen) % 2 == 0:
        net.optimizer.step()
        net.optimizer.zero_grad()
    return loss.detach()


def twice(net: Any, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(2):
        net.optimizer.zero_grad()
        loss = loss_of(net, x, y)
        loss.backward()
        net.optimizer.step()
    return loss.detach()


def skips_some(net: Any, x: Tensor, y: Tensor) -> Any:
    """Leaves the first batch of an epoch out, and the third."""
    net.seen += 1
    if int(net.seen) % 2 == 1:
        return 0.0
    net.optimizer.zero_grad()
    loss = loss_of(net, x, y)
    loss.backward()
    net.optimizer.step()
    return loss.detach()


def two_optimizers(net: Any, x: Tensor, y: Tensor) -> Tensor:
    """The second one steps three times for each step of the first, which is the one that counts."""
    for optimizer in (net.second, net.second, net.second, net.optimizer):
        optimizer.zero_grad()
        loss = loss_of(net, x, y)
        loss.backward()
        optimizer.step()
    return loss.detach()


def takes_over(net: Any, x: Tensor, y: Tensor) -> Tensor:
    """Another optimizer takes over from the third batch on."""
    net.seen += 1
    optimizer = net.optimizer if int(net.seen) <= 2 else net.second
    optimizer.zero_grad()
    loss = loss_of(net, x, y)
    loss.backward()
    optimizer.step()
    return loss.detach()


STEPS: dict[str, Any] = {
    "each_second": each_second,
    "twice": twice,
    "skips_some": skips_some,
    "two_optimizers": two_optimizers,
    "takes_over": takes_over,
}
STEPS_TAKEN = {"each_second": 4, "twice": 16, "skips_some": 4, "two_optimizers": 8, "takes_over": 8}


def warm_up(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (k + 1) / 16)
