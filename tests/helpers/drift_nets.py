"""Nets and registers for train steps of every kind, on several ranks and in one process."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

SAMPLES, BATCH, EPOCHS = 25, 6, 2  # the last batch has one sample


class Net(nn.Module):
    """A trunk and two heads, of which a call takes what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.trunk, self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.double()
        self.teacher = [copy.deepcopy(self.trunk).requires_grad_(False)]

    def forward(self, x: Any, what: Any = "both") -> Any:
        z = torch.tanh(self.trunk(x))
        if what in ("reentrant", "recomputed"):
            z = checkpoint(
                torch.tanh, checkpoint(self.block, z, use_reentrant=what == "reentrant"), use_reentrant=False
            )
        if what in ("one", "two"):
            return getattr(self, what)(z)
        if isinstance(what, tuple):
            return self.routed(z, *what)
        return self.one(z), self.two(z)

    def routed(self, z: Any, how: str, some: Any) -> Any:
        """Some samples have the second head: besides the first one, or in its place."""
        parts = [(self.one, ~some if how == "either" else torch.ones_like(some)), (self.two, some)]
        out = z.new_zeros(len(z), 1)
        for head, rows in parts:
            if rows.any():
                out = out.index_add(0, rows.nonzero()[:, 0], head(z[rows]))
        return out

    def block(self, z: Any) -> Any:
        return z @ self.trunk.weight @ self.trunk.weight.T


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.g = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        self.d = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def forward(self, x: Any, what: str = "both") -> Any:
        x = self.g(x) if what in ("g", "both") else x
        return self.d(x) if what in ("d", "both") else x


class Words(nn.Module):
    """An embedding with sparse gradients, and a complex weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words = nn.Embedding(9, 3, sparse=True, dtype=torch.float64)
        self.turn = nn.Parameter(torch.randn(3, dtype=torch.complex128))
        self.out = nn.Linear(3, 1).double()

    def forward(self, x: Any) -> Any:
        return self.out((self.words((x[:, 0].abs() * 3).long().clamp(max=8)) * self.turn).abs())


RIGHT: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {}
WRONG: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {}


def right(**how: Any) -> Callable[..., Any]:
    def added(function: Callable[..., Any]) -> Callable[..., Any]:
        RIGHT[function.__name__] = (function, how)
        return function

    return added


def mse(a: Any, b: Any) -> Any:
    return ((a - b) ** 2).mean()


def finish(m: Any, loss: Any, **how: Any) -> Any:
    loss.backward(**how)
    m.optimizer.step()
    m.optimizer.zero_grad()
    return loss.detach()


def both(m: Any, x: Any, y: Any, scale: float = 1.0) -> Any:
    a, b = m(x * scale)
    return mse(a, y) + 0.5 * mse(b, y)


def wrong(told: str, **how: Any) -> Callable[..., Any]:
    def added(function: Callable[..., Any]) -> Callable[..., Any]:
        WRONG[function.__name__] = (function, how, told)
        return function

    return added


def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.sin(3 * x[:, :1]) + x[:, 1:2]


def made(how: dict[str, Any], lr: float) -> Any:
    net: Any = {"gan": Gan, "words": Words}.get(how.get("net", ""), Net)()
    net.count = 0
    if how.get("dtype") == "float32":
        net.float()
        net.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
    sgd = functools.partial(torch.optim.SGD, lr=lr)
    if "lbfgs" in how:
        net.opts = [torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=4, line_search_fn=how["lbfgs"])]
    elif how.get("net") == "gan":
        net.opts = [sgd(net.d.parameters()), sgd(net.g.parameters())]
    elif how.get("groups"):
        net.opts = [sgd(net.trunk.parameters()), sgd([*net.one.parameters(), *net.two.parameters()], momentum=0.9)]
    elif how.get("group"):
        net.opts = [sgd([*net.one.parameters(), *net.two.parameters()])]
    else:
        net.opts = [
            torch.optim.AdamW(net.parameters(), lr=lr)
            if how.get("adam")
            else sgd(net.parameters(), momentum=how.get("momentum", 0.0))
        ]
    net.optimizer = net.opts[0]
    how.get("prepared", bool)(net)
    return net


ARGUMENTS = ("accumulation", "average", "clip_norm", "clip_value")


def on_ranks(world: Any, step: Callable[..., Any], how: dict[str, Any], lr: float, epochs: int = EPOCHS) -> Any:
    from dtrain import train_model

    net = made(how, lr)
    loader = DataLoader(TensorDataset(*data()), BATCH)
    arguments = {name: how[name] for name in ARGUMENTS if name in how}
    arguments["same_draws"] = False  # so that noise is each rank's own
    train_model(net, epochs, loader, train_step=step, batch="global", verbose=False, world=world, **arguments)
    return net


def in_one_process(step: Callable[..., Any], how: dict[str, Any], lr: float) -> Any:
    net = made(how, lr)
    x, y = data()
    size = BATCH * how.get("accumulation", 1)
    if how.get("clip_norm"):

        def clip(optimizer: Any, *_: Any) -> None:
            nn.utils.clip_grad_value_(net.parameters(), how["clip_value"])
            nn.utils.clip_grad_norm_(net.parameters(), how["clip_norm"])

        net.optimizer.register_step_pre_hook(clip)
    for _ in range(EPOCHS):
        for start in range(0, SAMPLES, size):
            loss = step(net, x[start : start + size], y[start : start + size])
            loss = getattr(loss, "total", loss) / getattr(loss, "count", 1)
            if getattr(loss, "requires_grad", False):
                net.optimizer.zero_grad()
                loss.backward()
                net.optimizer.step()
    return net


def distance(net: Any, other: Any) -> float:
    pairs = zip(net.parameters(), other.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)
