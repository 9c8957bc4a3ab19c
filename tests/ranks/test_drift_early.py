"""Steps of every kind on several ranks: right as in one process, or told at the first steps, at any learning rate."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.sweep import FULL
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

    def forward(self, x: Any, what: str = "both") -> Any:
        z = torch.tanh(self.trunk(x))
        if what in ("reentrant", "recomputed"):
            z = checkpoint(torch.tanh, checkpoint(self.block, z, use_reentrant=what == "reentrant"), use_reentrant=False)
        if what in ("one", "two"):
            return getattr(self, what)(z)
        return self.one(z), self.two(z)

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


# --- right --------------------------------------------------------------------------------------------------


@right()
def plain(m, x, y):
    return finish(m, both(m, x, y))


@right()
def declared(m, x, y):
    return both(m, x, y)


@right(adam=True)
def declared_unused(m, x, y):
    return mse(m(x, "one"), y)


@right(accumulation=2)
def declared_in_groups(m, x, y):
    return both(m, x, y) + both(m, x, y, 0.9)


@right(accumulation=2, average="ddp")
def declared_in_groups_by_ddp(m, x, y):
    return both(m, x, y)


@right()
def declared_counts(m, x, y):
    import dtrain

    loss = both(m, x, y)
    return dtrain.Mean(loss * len(x), len(x))


@right(average="ddp")
def by_ddp(m, x, y):
    return finish(m, both(m, x, y))


@right(average="step", adam=True)
def by_step(m, x, y):
    return finish(m, both(m, x, y))


@right()
def clipped(m, x, y):
    both(m, x, y).backward()
    nn.utils.clip_grad_norm_(m.parameters(), 0.1)
    m.optimizer.step()
    m.optimizer.zero_grad()
    return 0.0


@right(clip_norm=0.1, clip_value=0.05)
def clipped_by_the_run(m, x, y):
    return finish(m, both(m, x, y))


@right()
def retained(m, x, y):
    a, b = m(x)
    mse(a, y).backward(retain_graph=True)
    return finish(m, mse(a, b))


@right()
def heads(m, x, y):
    a, b = m(x)
    mse(a, y).backward(retain_graph=True)
    nn.utils.clip_grad_norm_(m.parameters(), 0.5)
    return finish(m, mse(b, y))


@right()
def three_backwards(m, x, y):
    for loss in [both(m, x, y, scale) for scale in (1.0, 0.9, 1.1)]:
        loss.backward()
    m.optimizer.step()
    m.optimizer.zero_grad()
    return 0.0


@right()
def call_and_backward_twice(m, x, y):
    both(m, x, y).backward()
    return finish(m, both(m, x, y, 0.9))


@right()
def two_calls(m, x, y):
    return finish(m, both(m, x, y) + both(m, x, y, 0.9))


@right()
def a_part(m, x, y):
    return finish(m, mse(m.one(torch.tanh(m.trunk(x))), y))


@right(adam=True)
def a_part_clipped(m, x, y):
    mse(m.one(torch.tanh(m.trunk(x))), y).backward()
    nn.utils.clip_grad_norm_(m.parameters(), 0.1)
    m.optimizer.step()
    m.optimizer.zero_grad()
    return 0.0


@right()
def past_the_net_too(m, x, y):
    return finish(m, both(m, x, y) + 0.1 * m.one.weight.square().sum())


@right(adam=True)
def unused(m, x, y):
    return finish(m, mse(m(x, "two"), y))


@right(adam=True)
def tasks_in_turn(m, x, y):
    m.count += 1
    return finish(m, mse(m(x, ("one", "two")[m.count % 2]), y))


@right()
def used_where_there_are_samples(m, x, y):
    chosen = x[:, 0] > 0.5
    loss = mse(m(x, "one"), y)
    if chosen.any():
        loss = loss + ((m(x[chosen], "two") - y[chosen]) ** 2).sum() / len(x)
    return finish(m, loss)


@right()
def frozen(m, x, y):
    m.trunk.requires_grad_(False)
    return finish(m, both(m, x, y))


@right(adam=True)
def unfrozen(m, x, y):
    m.count += 1
    m.trunk.requires_grad_(m.count > 3)
    return finish(m, both(m, x, y))


@right()
def unfrozen_and_declared(m, x, y):
    m.count += 1
    m.trunk.requires_grad_(m.count > 3)
    return both(m, x, y)


@right()
def frozen_later(m, x, y):
    loss = finish(m, both(m, x, y))
    m.count += 1
    m.two.requires_grad_(m.count < 4)
    return loss


@right(group=True)
def unfrozen_with_a_group_of_its_own(m, x, y):
    m.count += 1
    if m.count == 1:
        m.trunk.requires_grad_(False)
    if m.count == 4:
        m.trunk.requires_grad_(True)
        m.optimizer.add_param_group({"params": list(m.trunk.parameters()), "lr": 0.01})
    return finish(m, both(m, x, y))


def gan(m: Any, x: Any, y: Any, *, toggle: bool = False, clip: bool = False) -> Any:
    bce = nn.functional.binary_cross_entropy_with_logits
    if toggle:
        m.g.requires_grad_(False), m.d.requires_grad_(True)
    m.opts[0].zero_grad()
    real, fake = m(x, "d"), m(m(x, "g").detach(), "d")
    (bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))).backward()
    if clip:
        nn.utils.clip_grad_norm_(m.d.parameters(), 0.1)
    m.opts[0].step()
    if toggle:
        m.g.requires_grad_(True), m.d.requires_grad_(False)
    m.opts[1].zero_grad()
    fake = m(x)
    loss = bce(fake, torch.ones_like(fake))
    loss.backward()
    m.opts[1].step()
    return loss.detach()


right(net="gan")(gan)


@right(net="gan")
def gan_toggled(m, x, y):
    return gan(m, x, y, toggle=True)


@right(net="gan")
def gan_clipped(m, x, y):
    return gan(m, x, y, clip=True)


@right()
def steps_on_each_second_batch(m, x, y):
    both(m, x, y).backward()
    m.count += 1
    if m.count % 2 == 0:
        m.optimizer.step()
        m.optimizer.zero_grad(set_to_none=False)
    return 0.0


@right()
def steps_before_backward(m, x, y):
    m.count += 1
    if m.count > 1:
        m.optimizer.step()
    m.optimizer.zero_grad()
    loss = both(m, x, y)
    loss.backward()
    if m.count == 1:
        m.optimizer.step()
    return loss.detach()


@right()
def gradient_penalty(m, x, y):
    x = x.clone().requires_grad_(True)
    a, b = m(x)
    (grad,) = torch.autograd.grad(a.sum(), x, create_graph=True)
    return finish(m, mse(a, y) + mse(b, y) + (grad.norm(dim=1) - 1).square().mean())


@right()
def reentrant(m, x, y):
    a, b = m(x.clone().requires_grad_(True), "reentrant")
    return finish(m, mse(a, y) + mse(b, y))


@right()
def recomputed(m, x, y):
    a, b = m(x, "recomputed")
    return finish(m, mse(a, y) + mse(b, y))


@right()
def recomputed_as_a_whole(m, x, y):
    a, b = checkpoint(m, x.clone().requires_grad_(True), use_reentrant=True)
    return finish(m, mse(a, y) + mse(b, y))


@right()
def with_a_closure(m, x, y):
    def closure():
        m.optimizer.zero_grad()
        loss = both(m, x, y)
        loss.backward()
        return loss

    return m.optimizer.step(closure).detach()


@right(lbfgs=None)
def lbfgs(m, x, y):
    return with_a_closure(m, x, y)


@right(lbfgs="strong_wolfe")
def lbfgs_with_a_line_search(m, x, y):
    return with_a_closure(m, x, y)


@right()
def a_value_without_gradients(m, x, y):
    with torch.no_grad():
        m(x)
    return finish(m, both(m, x, y))


@right()
def a_value_with_gradients(m, x, y):
    m(x)
    loss = both(m, x, y)
    m(x)
    return finish(m, loss)


@right()
def leaves_batches_out(m, x, y):
    m.count += 1
    if m.count in (2, 6):
        return 0.0
    return finish(m, both(m, x, y))


@right()
def hook_of_its_own(m, x, y):
    if not m.count:
        m.trunk.weight.register_hook(lambda grad: 2 * grad)
    m.count += 1
    return finish(m, both(m, x, y))


@right()
def noise_alike(m, x, y):
    both(m, x, y).backward()
    m.count += 1
    generator = torch.Generator().manual_seed(m.count)
    for p in m.parameters():
        p.grad.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    m.optimizer.step()
    m.optimizer.zero_grad()
    return 0.0


@right()
def weights_by_hand(m, x, y):
    loss = finish(m, both(m, x, y))
    with torch.no_grad():
        for p in m.parameters():
            p.clamp_(-0.4, 0.4)
        for mine, other in zip(m.teacher[0].parameters(), m.trunk.parameters(), strict=True):
            mine.lerp_(other, 0.1)
    return loss


@right()
def rates_alike(m, x, y):
    m.count += 1
    for group in m.optimizer.param_groups:
        group["lr"] = 0.1 / m.count
    return finish(m, both(m, x, y))


@right(groups=2)
def two_optimizers(m, x, y):
    loss = both(m, x, y)
    loss.backward()
    for optimizer in m.opts:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


@right(net="words")
def sparse_and_complex(m, x, y):
    return finish(m, mse(m(x), y))


@right(net="words", average="step")
def sparse_and_dense(m, x, y):
    return finish(m, mse(m(x), y) + (m.words.weight.square().sum() if m.training else 0.0))


@right()
def counts_in_a_buffer(m, x, y):
    m.seen += 1
    return finish(m, both(m, x, y))


# --- how they run -------------------------------------------------------------------------------------------


def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.sin(3 * x[:, :1]) + x[:, 1:2]


def made(how: dict[str, Any], lr: float) -> Any:
    net: Any = {"gan": Gan, "words": Words}.get(how.get("net", ""), Net)()
    net.count = 0
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
        net.opts = [torch.optim.AdamW(net.parameters(), lr=lr) if how.get("adam") else sgd(net.parameters())]
    net.optimizer = net.opts[0]
    return net


ARGUMENTS = ("accumulation", "average", "clip_norm", "clip_value")


def on_ranks(world: Any, step: Callable[..., Any], how: dict[str, Any], lr: float, epochs: int = EPOCHS) -> Any:
    from dtrain import train_model

    net = made(how, lr)
    loader = DataLoader(TensorDataset(*data()), BATCH)
    arguments = {name: how[name] for name in ARGUMENTS if name in how}
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


def right_steps(world: Any, names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        step, how = RIGHT[name]
        try:
            net = on_ranks(world, step, how, 0.05)
            found[name] = distance(net, in_one_process(step, how, 0.05))
        except Exception as error:  # noqa: BLE001 - told with its name
            found[name] = f"{type(error).__name__}: {error}"
            break  # the others may wait
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_right_steps_are_as_in_one_process(ranks: int) -> None:
    assert len(RIGHT) >= 40
    for found in run_ranks(right_steps, ranks, names=list(RIGHT)):
        assert {name: how for name, how in found.items() if isinstance(how, str) or how > 1e-9} == {}
        assert list(found) == list(RIGHT)
