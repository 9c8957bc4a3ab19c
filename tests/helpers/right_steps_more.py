"""Train steps that are right on several ranks: hooks, recomputing, closures, noise, several optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers.drift_nets import RIGHT, both, finish, mse, right
from helpers.right_steps import (
    a_part,
    call_and_backward_twice,
    heads,
    retained,
    two_calls,
    unused,
    used_where_there_are_samples,
)


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


def clamped(m: Any) -> None:
    """Hooks that work on the gradient of the whole batch, of which no rank has more than a part."""
    if m.teacher[1:]:
        return
    m.teacher.append(None)  # once
    m.trunk.weight.register_hook(lambda grad: grad.clamp(-0.02, 0.03))
    m.trunk.weight.register_hook(lambda grad: grad / (1 + grad.norm()))
    m.one.bias.register_hook(lambda grad: None)
    m.two.weight.register_post_accumulate_grad_hook(lambda p: nn.utils.clip_grad_value_(p, 0.01))


@right()
def hooks_that_clamp(m, x, y):
    clamped(m)
    return finish(m, both(m, x, y))


@right()
def hooks_that_clamp_declared(m, x, y):
    clamped(m)
    return both(m, x, y)


@right(accumulation=2)
def hooks_that_clamp_in_groups(m, x, y):
    clamped(m)
    return both(m, x, y)


@right()
def hooks_that_clamp_of_a_sum(m, x, y):
    import dtrain

    clamped(m)
    return dtrain.Mean(both(m, x, y) * len(x), len(x))


def with_module_hooks(m: Any) -> None:
    m.one.register_full_backward_hook(lambda module, before, after: (before[0].clamp(-0.01, 0.02),))
    m.one.register_full_backward_pre_hook(lambda module, after: (after[0].clamp(-0.1, 0.1),))
    m.trunk.register_full_backward_hook(lambda module, before, after: None)


@right(prepared=with_module_hooks)
def module_hooks_that_clamp(m, x, y):
    return finish(m, both(m, x, y))


@right(accumulation=2, prepared=with_module_hooks)
def module_hooks_that_clamp_in_groups(m, x, y):
    return both(m, x, y)


@right(adam=True)
def hooks_that_clamp_each_pass(m, x, y):
    clamped(m)
    (0.3 * both(m, x, y)).backward()
    mse(m(x * 0.5, "one"), y).backward()
    return finish(m, both(m, x, y))


@right()
def hooks_where_there_are_samples(m, x, y):
    clamped(m)
    return used_where_there_are_samples(m, x, y)


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
