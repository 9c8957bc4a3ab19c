"""Steps of every kind on several ranks: right as in one process, or told at the first steps, at any learning rate."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.commands import Dtrain
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
            z = checkpoint(
                torch.tanh, checkpoint(self.block, z, use_reentrant=what == "reentrant"), use_reentrant=False
            )
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


def after_an_inner_step(m, x, y):
    """The loss of what the weights are after a step on samples that all ranks have (MAML)."""
    inner = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    names, weights = zip(*m.named_parameters(), strict=True)
    gradients = torch.autograd.grad(both(m, inner, inner[:, :1]), weights, create_graph=True)
    fast = {name: p - 0.1 * grad for name, p, grad in zip(names, weights, gradients, strict=True)}
    a, b = torch.func.functional_call(m, fast, (x,))
    return mse(a, y) + 0.5 * mse(b, y)


@right()
def inner_step(m, x, y):
    return finish(m, after_an_inner_step(m, x, y))


@right()
def inner_step_declared(m, x, y):
    return after_an_inner_step(m, x, y)


@right(accumulation=2)
def inner_step_in_groups(m, x, y):
    return after_an_inner_step(m, x, y)


@right()
def penalty_of_the_gradient(m, x, y):
    loss = both(m, x, y)
    loss.backward(create_graph=True)
    finish(m, 0.1 * m.trunk.weight.grad.square().sum())
    return loss.detach()


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


@right(average="ddp")
def two_calls_by_ddp(m, x, y):
    return two_calls(m, x, y)


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


def later(kind: Callable[..., Any]) -> None:
    """A step that DDP is right for at first, and not from the third one on."""

    def step(m: Any, x: Any, y: Any) -> Any:
        m.count += 1
        m.optimizer.zero_grad()
        return finish(m, both(m, x, y)) if m.count < 3 else kind(m, x, y)

    RIGHT[f"{kind.__name__}_later"] = (step, {})


for kind in (retained, heads, a_part, unused, call_and_backward_twice, two_calls, reentrant, with_a_closure):
    later(kind)


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


# --- wrong --------------------------------------------------------------------------------------------------


def wrong(told: str, **how: Any) -> Callable[..., Any]:
    def added(function: Callable[..., Any]) -> Callable[..., Any]:
        WRONG[function.__name__] = (function, how, told)
        return function

    return added


def rank() -> int:
    import dtrain

    return dtrain.rank()


def change_gradients(m: Any, change: Callable[[Any], None], names: str = "") -> Any:
    for name, p in m.named_parameters():
        if name.startswith(names) and p.grad is not None:
            change(p)
    m.optimizer.step()
    m.optimizer.zero_grad()
    return 0.0


@wrong("the gradient of trunk.weight and 5 more differs between the ranks. It did not come from backward()")
def assigned(m, x, y):
    parameters = list(m.parameters())
    for p, grad in zip(parameters, torch.autograd.grad(both(m, x, y), parameters), strict=True):
        p.grad = grad
    return change_gradients(m, lambda p: None, "nothing")


@wrong("the gradient of two.weight differs between the ranks. It did not come from backward()")
def one_assigned(m, x, y):
    (grad,) = torch.autograd.grad(both(m, x, y), m.two.weight)
    mse(m(x, "one"), y).backward()
    m.two.weight.grad = grad
    return change_gradients(m, lambda p: None, "nothing")


@wrong("the gradient of trunk.weight and 5 more differs between the ranks. It was changed after backward()")
def noise(m, x, y):
    both(m, x, y).backward()
    return change_gradients(m, lambda p: p.grad.add_(1e-3 * torch.randn_like(p)))


@wrong("the gradient of one.bias differs between the ranks", average="ddp", dtype="float32")
def noise_on_one_by_ddp(m, x, y):
    both(m, x, y).backward()
    return change_gradients(m, lambda p: p.grad.add_(1e-3 * torch.randn_like(p)), "one.bias")


@wrong("the gradient of trunk.weight and 5 more differs between the ranks", dtype="float32")
def scaled_by_its_own_loss(m, x, y):
    loss = both(m, x, y)
    loss.backward()
    return change_gradients(m, lambda p: p.grad.div_(loss.detach()))


@wrong("the gradient of trunk.weight and 5 more differs between the ranks", adam=True)
def clipped_by_its_own_limit(m, x, y):
    both(m, x, y).backward()
    nn.utils.clip_grad_norm_(m.parameters(), 0.01 + 0.001 * rank())
    return change_gradients(m, lambda p: None, "nothing")


@wrong("the gradient of two.weight and 1 more differs between the ranks")
def cleared_on_one_rank(m, x, y):
    both(m, x, y).backward()
    return change_gradients(m, lambda p: p.grad.zero_() if rank() else None, "two")


@wrong("the gradient of two.bias differs between the ranks")
def none_on_one_rank(m, x, y):
    both(m, x, y).backward()
    return change_gradients(m, lambda p: setattr(p, "grad", None) if rank() else None, "two.bias")


@wrong("the gradient of words.weight differs between the ranks", net="words")
def sparse_noise(m, x, y):
    mse(m(x), y).backward()
    return change_gradients(m, lambda p: setattr(p, "grad", p.grad * (1 + 0.01 * rank())), "words")


@wrong("the gradient of turn differs between the ranks", net="words")
def complex_noise(m, x, y):
    mse(m(x), y).backward()
    return change_gradients(m, lambda p: p.grad.add_(1e-3j * rank()), "turn")


@wrong("the gradient of g.0.weight differs between the ranks. It was changed", net="gan")
def second_of_two_optimizers(m, x, y):
    m.g[0].weight.grad = None
    gan(m, x, y)
    mse(m(x), y).backward()
    m.g[0].weight.grad.mul_(1 + 0.01 * rank())
    m.opts[1].step()
    return 0.0


@wrong("the parameter trunk.weight differs between the ranks")
def weights_with_noise(m, x, y):
    loss = finish(m, both(m, x, y))
    with torch.no_grad():
        m.trunk.weight.add_(1e-6 * torch.randn_like(m.trunk.weight))
    return loss


@wrong("the parameter one.bias differs between the ranks", dtype="float32")
def a_weight_by_hand(m, x, y):
    loss = both(m, x, y)
    m.one.bias.data.sub_(1e-4 * loss.item())
    return loss


@wrong("the parameter two.bias differs between the ranks")
def loaded_on_one_rank(m, x, y):
    if rank():
        m.two.load_state_dict({"weight": m.two.weight.detach().clone(), "bias": torch.ones(1).double()})
    return both(m, x, y)


@wrong("the parameter trunk.weight differs between the ranks", momentum=0.9)
def a_state_with_noise(m, x, y):
    both(m, x, y).backward()
    m.optimizer.step()
    for state in m.optimizer.state.values():
        state["momentum_buffer"].mul_(1 + 0.1 * rank())
    m.optimizer.zero_grad()
    return 0.0


@wrong("stepped differently: 1 on rank 0, 0 on rank 1")
def steps_on_one_rank(m, x, y):
    both(m, x, y).backward()
    if not rank():
        m.optimizer.step()
    m.optimizer.zero_grad()
    return 0.0


@wrong("the optimizers' settings differ: lr [1e-06] on rank 0, [2e-06] on rank 1")
def rates_of_its_own(m, x, y):
    m.optimizer.param_groups[0]["lr"] = 1e-6 * (1 + rank())
    return finish(m, both(m, x, y))


@wrong("the buffer held is trained (requires_grad)")
def a_trained_buffer(m, x, y):
    if not hasattr(m, "held"):
        m.register_buffer("held", torch.ones(1, dtype=torch.float64, requires_grad=True))
    loss = both(m, x, y) * m.held.sum()
    loss.backward()
    m.held.data.sub_(1e-6 * m.held.grad)
    return change_gradients(m, lambda p: None, "nothing")


@wrong("2 parameters that are not the net's")
def parameters_outside(m, x, y):
    if not hasattr(m.optimizer, "more"):
        m.optimizer.more = nn.Linear(1, 1).double()
        m.optimizer.add_param_group({"params": list(m.optimizer.more.parameters())})
    a, b = m(x)
    return finish(m, mse(m.optimizer.more(a + b), y))


@wrong("the parameter late was added to the net during this pass")
def a_parameter_that_joins(m, x, y):
    if not hasattr(m, "late"):
        m.late = nn.Parameter(torch.ones(1, dtype=torch.float64))
        m.optimizer.add_param_group({"params": [m.late]})
    return finish(m, both(m, x, y) * m.late.sum())


@wrong("an optimizer steps within backward()")
def steps_within_backward(m, x, y):
    def step(p):
        m.optimizer.step()

    handle = m.trunk.weight.register_post_accumulate_grad_hook(step)
    try:
        both(m, x, y).backward()
    finally:
        handle.remove()
    return 0.0


@wrong("different numbers of backward passes: rank 0 ended the step, rank 1 runs a backward pass")
def one_backward_more(m, x, y):
    if rank():
        both(m, x, y).backward()
    return finish(m, both(m, x, y))


@wrong("different numbers of backward passes: rank 0 runs a backward pass, rank 1 ended the step")
def left_out_on_one_rank(m, x, y):
    return 0.0 if rank() else finish(m, both(m, x, y))


@wrong("two.weight and 1 more got no gradient in a backward pass", average="ddp")
def retained_by_ddp(m, x, y):
    return retained(m, x, y)


@wrong("gradients come without a call of the model itself", average="ddp", adam=True)
def a_part_by_ddp(m, x, y):
    return a_part_clipped(m, x, y)


@wrong("two.weight and 1 more got no gradient", average="ddp")
def unused_by_ddp(m, x, y):
    return finish(m, mse(m(x, "one"), y))


@wrong("two backward passes bring gradients in a step", average="ddp")
def backward_twice_by_ddp(m, x, y):
    loss = both(m, x, y)
    loss.backward(retain_graph=True)
    return finish(m, loss)


@wrong("Set train.average=step", average="ddp")
def reentrant_by_ddp(m, x, y):
    a, b = checkpoint(
        lambda z: m(checkpoint(m.block, z, use_reentrant=True)[:, :3]), m(x)[0].expand(-1, 4), use_reentrant=True
    )
    return finish(m, mse(a, y) + mse(b, y))


@wrong("the optimizer steps with a closure. Set train.average=step", average="ddp", lbfgs=None)
def lbfgs_by_ddp(m, x, y):
    return with_a_closure(m, x, y)


@wrong("Set train.average=step", average="ddp", net="gan")
def gan_by_ddp(m, x, y):
    return gan(m, x, y)


# --- how they run -------------------------------------------------------------------------------------------


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


def wrong_steps(world: Any, names: list[str]) -> dict[str, Any]:
    from dtrain import DtrainError

    found = {}
    for name in names:
        step, how, _ = WRONG[name]
        calls = []

        def counted(m: Any, x: Any, y: Any, step: Any = step, calls: Any = calls) -> Any:
            calls.append(1)
            return step(m, x, y)

        try:
            on_ranks(world, counted, how, 1e-6)
        except DtrainError as error:
            found[name] = [len(calls), str(error)]
        else:
            found[name] = [len(calls), "was not told"]
    return found


def test_wrong_steps_are_told_at_the_first_ones_however_small_the_learning_rate() -> None:
    assert len(WRONG) >= 20
    for found in run_ranks(wrong_steps, 2, names=list(WRONG)):
        for name, (_, how, told) in WRONG.items():
            steps, text = found[name]
            assert told in text, name
            assert steps <= how.get("at", 2), name


def random_freezing(world: Any, seeds: list[int]) -> list[float]:
    """Each example: random freezing and unfreezing of parts, before, within and after calls, and random kinds of steps."""
    found = []
    for seed in seeds:
        way = random.Random(seed)
        plans = [
            {
                "frozen": [name for name in ("trunk", "one", "two") if way.random() < 0.4][:2],
                "when": way.choice(["before", "always", "between"]),
                "kind": way.choice(["both", "both", "one", "two", "part", "retained", "twice", "none"]),
                "clip": way.random() < 0.3,
            }
            for _ in range(4)
        ]
        plans[0]["kind"] = way.choice(
            ["both", "retained", "part"]
        )  # a run does not begin with a step that does nothing
        length = way.choice([1, 2, 5])  # how long a plan is kept to: DDP is chosen, and given up
        declared = way.random() < 0.3

        def step(m: Any, x: Any, y: Any, plans: Any = plans, length: int = length, declared: bool = declared) -> Any:
            plan = plans[m.count // length % len(plans)]
            m.count += 1
            return planned(m, x, y, plan, declared=declared)

        how: dict[str, Any] = {"adam": way.random() < 0.5}
        net = on_ranks(world, step, how, 0.05)
        found.append(distance(net, in_one_process(step, how, 0.05)))
    return found


def planned(  # noqa: C901
    m: Any, x: Any, y: Any, plan: dict[str, Any], *, declared: bool
) -> Any:
    if plan["when"] != "between":
        for name in ("trunk", "one", "two"):
            getattr(m, name).requires_grad_(name not in plan["frozen"])
    kind = plan["kind"] if not declared or plan["kind"] not in ("retained", "twice", "none") else "both"
    if kind == "none":
        return 0.0
    if kind in ("one", "two"):
        getattr(m, kind).requires_grad_(True)
        loss = mse(m(x, kind), y)
    elif kind == "part":
        m.one.requires_grad_(True)
        loss = mse(m.one(torch.tanh(m.trunk(x))), y)
    else:
        loss = both(m, x, y)
    if declared:
        return loss
    m.optimizer.zero_grad()
    loss.backward(retain_graph=kind == "retained")
    if plan["when"] == "between":
        m.trunk.requires_grad_("trunk" not in plan["frozen"])
    if kind == "retained":
        (0.3 * loss).backward()
    if kind == "twice":
        both(m, x, y, 0.9).backward()
    if plan["clip"]:
        nn.utils.clip_grad_norm_(m.parameters(), 0.1)
    m.optimizer.step()
    return loss.detach()


def test_random_freezing_is_as_in_one_process() -> None:
    seeds = list(range(200 if FULL else 25))
    for found in run_ranks(random_freezing, 2, seeds=seeds):
        assert max(found) < 1e-9, found


ZERO = """
import dtrain, torch
from dtrain import meeting
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

meeting._PATIENCE_SECONDS = 1.0


def build_model():
    return nn.Linear(3, 1)


def build_dataloaders():
    return DataLoader(TensorDataset(torch.randn(24, 3)), batch_size=2), None


def build_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=1e-6)


def train_step(model, x):
    model.steps = getattr(model, "steps", 0) + 1
    if model.steps == 3 and dtrain.rank():
        return torch.zeros((), requires_grad=True)
    return model(x).square().mean()
"""


def test_a_loss_without_the_net_on_one_rank_is_told_with_ddp_and_right_without(dtrain: Dtrain) -> None:
    (dtrain.folder / "zero.py").write_text(ZERO)
    done = dtrain("train", "zero.py", "epochs=1", "-n", 2, "--cpu")
    assert done.code == 1, done.text
    assert "in train step 3 rank 1 ran no backward pass that reaches the net" in done.err
    assert "loss = model(x).sum() * 0" in done.err
    assert dtrain("train", "zero.py", "epochs=1", "average=step", "-n", 2, "--cpu").code == 0
