"""Train steps that are right on several ranks: backward passes, parts of the net, freezing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from helpers.drift_nets import both, finish, mse, right


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
