"""Train steps that make ranks differ, each with what is told of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers.drift_nets import both, finish, mse, wrong
from helpers.right_steps import a_part_clipped, gan, retained
from helpers.right_steps_more import with_a_closure


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


@wrong("took different numbers of steps: 1 on rank 0, 0 on rank 1")
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


@wrong("2 parameters that are not the model's")
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
