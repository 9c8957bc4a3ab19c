"""Train steps put together from what people do in theirs, for dtrain and for plain torch alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCH, SAMPLES = 3, 28
CALLS = -(-SAMPLES // BATCH)  # of the train step in an epoch on one rank
Program = Sequence[str]


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, x[:, :1] * x[:, 1:2] + 0.5


def fresh_net(*, scheduled: bool = False) -> Any:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    if scheduled:
        net.scheduler = torch.optim.lr_scheduler.StepLR(net.optimizer, 2, gamma=0.5)
        net.optimizer._opt_called = True  # the order of programs may be any
    return net


def loss_of(net: Any, x: Tensor, y: Tensor) -> Tensor:
    return ((net(x) - y) ** 2).mean()


def told_of(world: Any, net: Any, step: Callable[..., Any], epochs: int = 1, **more: Any) -> str:
    """Trains a net with a step; returns what the step was told, or nothing."""
    from dtrain.api.function import train_model
    from dtrain.errors import StepError

    loader = DataLoader(TensorDataset(*data()), BATCH)
    try:
        train_model(net, epochs, loader, train_step=step, verbose=False, world=world, **more)
    except StepError as error:
        return str(error)
    return ""


def _closure(net: Any, x: Tensor, y: Tensor) -> None:
    def closure() -> Tensor:
        net.optimizer.zero_grad()
        loss = loss_of(net, x, y)
        loss.backward()
        return loss

    net.optimizer.step(closure)


@torch.no_grad()
def _gradients(net: Any, change: Callable[[Tensor], Tensor], *, by_data: bool = False) -> None:
    for parameter in net.parameters():
        if parameter.grad is not None:
            changed = change(parameter.grad)
            (parameter.grad.data if by_data else parameter.grad).copy_(changed)


def _assign(net: Any) -> None:
    for parameter in net.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.sign()


@torch.no_grad()
def _weights(net: Any, change: Callable[[Tensor], Tensor], *, by_data: bool = False) -> None:
    for parameter in net.parameters():
        (parameter.data if by_data else parameter).copy_(change(parameter.detach()))


def _clear(net: Any) -> None:
    for parameter in net.parameters():
        parameter.grad = None


def _by_grad(net: Any, x: Tensor, y: Tensor) -> None:
    parameters = list(net.parameters())
    for parameter, grad in zip(parameters, torch.autograd.grad(loss_of(net, x, y), parameters), strict=True):
        parameter.grad = grad


DOES: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "zero": lambda net, x, y: net.optimizer.zero_grad(),
    "zero to zeros": lambda net, x, y: net.optimizer.zero_grad(set_to_none=False),
    "net zero": lambda net, x, y: net.zero_grad(),
    "backward": lambda net, x, y: loss_of(net, x, y).backward(),
    "backward of another": lambda net, x, y: (net(x) - y).abs().mean().backward(),
    "step": lambda net, x, y: net.optimizer.step(),
    "clip": lambda net, x, y: nn.utils.clip_grad_norm_(net.parameters(), 0.1),
    "clip by data": lambda net, x, y: _gradients(net, lambda grad: grad.clamp(-0.1, 0.1), by_data=True),
    "normalise": lambda net, x, y: _gradients(net, lambda grad: grad / (grad.norm() + 1)),
    "assign": lambda net, x, y: _assign(net),
    "clear": lambda net, x, y: _clear(net),
    "climb": lambda net, x, y: _weights(net, lambda weight: weight + 0.1),
    "climb by data": lambda net, x, y: _weights(net, lambda weight: weight - 0.1, by_data=True),
    "clamp": lambda net, x, y: _weights(net, lambda weight: weight.clamp(-0.3, 0.3)),
    "closure": _closure,
    "by grad": _by_grad,
    "schedule": lambda net, x, y: net.scheduler.step(),
    "nothing": lambda net, x, y: None,
}
ORDINARY = ["zero", "backward", "step", "zero to zeros", "net zero", "backward of another"]
UNUSUAL = [name for name in DOES if name not in ORDINARY]
TO_WEIGHTS = {"climb", "climb by data", "clamp"}  # what nobody can hold back


def take(net: Any, x: Tensor, y: Tensor, program: Program) -> Tensor:
    """One train step; its loss is looked at first, without gradients."""
    with torch.no_grad():
        loss = loss_of(net, x, y)
    for name in program:
        DOES[name](net, x, y)
    return loss


def by_hand(net: Any, programs: Sequence[Program], samples: int) -> list[list[float]]:
    """Takes one program after the other on batches of so many samples; returns the weights before and after each."""
    x, y = data()
    weights = [flat(net)]
    for number, start in enumerate(range(0, SAMPLES, samples)):
        take(net, x[start : start + samples], y[start : start + samples], programs[min(number, len(programs) - 1)])
        weights.append(flat(net))
    return weights


def by_dtrain(world: Any, net: Any, programs: Sequence[Program], accumulation: int) -> tuple[list[float], str]:
    """The same in dtrain, where each program is that of a group of batches; returns the weights and what was told."""
    from dtrain.api.function import train_model
    from dtrain.errors import DtrainError

    calls: list[int] = []

    def train_step(model: Any, x: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return take(model, x, y, programs[min((len(calls) - 1) // accumulation, len(programs) - 1)])

    loader = DataLoader(TensorDataset(*data()), BATCH)
    try:
        train_model(net, 1, loader, train_step=train_step, accumulation=accumulation, verbose=False, world=world)
    except DtrainError as error:
        return flat(net), str(error)
    return flat(net), ""


def flat(net: Any) -> list[float]:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()]).tolist()
