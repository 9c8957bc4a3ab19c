"""Train steps that are right on several ranks: parts of the net that some ranks' samples use, and others' do not."""

from __future__ import annotations

from typing import Any

import torch

from helpers.drift_nets import finish, mse, right

EXPERTS = 4  # the first steps use all parts, so that DDP is chosen


def routed(m: Any, x: Any, y: Any, least: float = 0.6) -> Any:
    """One call of the net, in which the second head sees some of the samples, or none."""
    m.count += 1
    large = (x[:, 0] > least) | torch.tensor(m.count < EXPERTS)
    return mse(m(x, ("routed", large)), y)


@right()
def experts(m, x, y):
    return finish(m, routed(m, x, y))


@right(adam=True)
def experts_with_a_memory(m, x, y):
    return finish(m, routed(m, x, y))


@right()
def experts_declared(m, x, y):
    return routed(m, x, y)


@right(accumulation=2, adam=True)
def experts_in_groups(m, x, y):
    steps = max([int(state["step"]) for state in m.optimizer.state.values()], default=0)  # not of micro-batches
    return mse(m(x, ("routed", (x[:, 0] > 0.6) | torch.tensor(steps + 1 < EXPERTS))), y)


@right(adam=True, clip_norm=0.1, clip_value=0.05)
def experts_clipped(m, x, y):
    return finish(m, routed(m, x, y))


@right(adam=True)
def an_expert_that_nobody_uses_later(m, x, y):
    return finish(m, routed(m, x, y, 9.0))


@right(adam=True)
def experts_each_of_which_lacks_somewhere(m, x, y):
    m.count += 1
    m.optimizer.zero_grad()
    if m.count < EXPERTS:
        return finish(m, mse(m(x, ("routed", x[:, 0] > -9)), y))
    return finish(m, mse(m(x, ("either", x[:, 0] > 0)), y))
