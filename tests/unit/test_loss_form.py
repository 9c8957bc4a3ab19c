"""Whether a loss is a mean over the samples shows in its graph: sums are refused, other forms are a warning."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dtrain.data.partition import RankBatch
from dtrain.engine.loss_form import LossForm
from dtrain.errors import StepError

ROWS = 6
MASK = torch.tensor([True, False, True, True, False, True])
LABELS = torch.tensor([0, 1, 2, 1, 1, 0])
IGNORED = torch.tensor([-100, 1, 2, 1, 1, 0])
Form = Callable[[Tensor, Tensor, nn.Module], Tensor]  # (scores, their squares, the net) -> a loss

MEANS: dict[str, Form] = {
    "mean": lambda x, loss, m: loss.mean(),
    "over the rows": lambda x, loss, m: loss.sum() / len(x),
    "over all values": lambda x, loss, m: loss.sum() * (1 / loss.numel()),
    "over a tensor of the rows": lambda x, loss, m: loss.sum() / torch.tensor(float(len(x))),
    "times a weight": lambda x, loss, m: (loss.sum() / len(x)) * 0.3,
    "two of them": lambda x, loss, m: (loss.sum() + x.sum()) / len(x),
    "with the weights' norm": lambda x, loss, m: loss.mean() + 0.01 * m.weight.square().sum() + m.weight.norm(),
    "zero": lambda x, loss, m: loss.sum() * 0,
    "with a weight that is learnt": lambda x, loss, m: loss.mean() * torch.exp(-m.bias[0]) + m.bias[0],
    "of sums by sample": lambda x, loss, m: loss.sum(1).mean(),
    "of masked values": lambda x, loss, m: (loss * MASK[:, None]).mean(),
    "in another order": lambda x, loss, m: loss[torch.tensor([3, 2, 1, 0, 5, 4])].mean(),
    "sample by sample": lambda x, loss, m: (
        sum((functional.mse_loss(a[:2], b[:2]) for a, b in zip(x, loss, strict=True))) / len(x)
    ),  # type: ignore[return-value]
    "stacked": lambda x, loss, m: torch.stack([functional.mse_loss(a, b) for a, b in zip(x, loss, strict=True)]).sum(),
    "another type": lambda x, loss, m: loss.mean().float(),
    "cross entropy": lambda x, loss, m: functional.cross_entropy(x, LABELS),
    "label smoothing": lambda x, loss, m: functional.cross_entropy(x, LABELS, label_smoothing=0.1),
    "equal class weights": lambda x, loss, m: functional.cross_entropy(x, LABELS, weight=torch.ones(3)),
    "of probabilities": lambda x, loss, m: functional.cross_entropy(x, x.detach().softmax(1)),
    "positives' weight": lambda x, loss, m: functional.binary_cross_entropy_with_logits(
        x, torch.ones(6, 3), pos_weight=torch.tensor(3.0)
    ),
    "divergence": lambda x, loss, m: functional.kl_div(x, x.detach().exp(), reduction="batchmean"),
}
SUMS: dict[str, Form] = {
    "sum": lambda x, loss, m: loss.sum(),
    "times": lambda x, loss, m: 0.01 * loss.sum(),
    "divided": lambda x, loss, m: loss.sum() / 100,
    "negative": lambda x, loss, m: -(-loss).sum() * 0.3,
    "of one column": lambda x, loss, m: loss[:, :1].sum(0).squeeze() * 0.5,
    "and a mean": lambda x, loss, m: (loss.sum() * 2 + loss.mean()) / 3,
    "reduction": lambda x, loss, m: 0.1 * functional.mse_loss(x, loss, reduction="sum"),
    "of classes": lambda x, loss, m: functional.cross_entropy(x, LABELS, reduction="sum") / 100,
    "flat": lambda x, loss, m: loss.flatten().sum() * 0.1,
    "of means by sample": lambda x, loss, m: loss.mean(1).sum(),
    "by a count of Python's": lambda x, loss, m: loss.sum() / int(MASK.sum()),
    "times what is learnt": lambda x, loss, m: loss.sum() * torch.exp(-m.bias[0]),
}
OTHERS: dict[str, tuple[str, Form]] = {
    "class weights": (
        "classes have weights",
        lambda x, loss, m: functional.cross_entropy(x, LABELS, weight=torch.arange(1.0, 4)),
    ),
    "labels left out": ("labels of -100 are left out", lambda x, loss, m: functional.cross_entropy(x, IGNORED)),
    "and smoothed": ("labels of -100", lambda x, loss, m: functional.cross_entropy(x, IGNORED, label_smoothing=0.1)),
    "positives": ("(4 where the batch has 6 samples", lambda x, loss, m: loss.sum() / MASK.sum()),
    "a selection": ("the mean over 4 that are selected from 6", lambda x, loss, m: loss[MASK].mean()),
    "a selection's labels": ("selected from 6", lambda x, loss, m: functional.cross_entropy(x[MASK], LABELS[MASK])),
    "a selection's error": ("selected from 6", lambda x, loss, m: functional.mse_loss(x[MASK], torch.ones(4, 3))),
    "root": ("the square root of a mean", lambda x, loss, m: loss.mean().sqrt()),
    "root and a mean": (
        "the square root of a mean",
        lambda x, loss, m: loss.mean() + functional.mse_loss(x, loss).sqrt(),
    ),
    "logarithm": ("the logarithm of", lambda x, loss, m: loss.sum().log()),
    "dice": ("a ratio or product", lambda x, loss, m: 1 - 2 * loss.sum() / (loss.sum() + x.abs().sum())),
    "norm": ("the norm over them", lambda x, loss, m: loss.norm()),
    "spread": ("the standard deviation over them", lambda x, loss, m: loss.std()),
    "groups": (
        "it adds up samples by groups",
        lambda x, loss, m: (torch.zeros(ROWS).index_add(0, LABELS, loss[:, 0]) / 2 * torch.ones(ROWS)).sum(),
    ),
}


def batch(rows: int) -> RankBatch:
    return RankBatch(None, rows, 2 * rows, 1.0, rows=rows)


def found(function: Form, caplog: Any, *, backward: bool, averaged: bool = True) -> str:
    """What is raised or logged for a loss, which is returned or has its backward pass run."""
    net = nn.Linear(4, 3)
    form = LossForm(net, averaged=averaged, warns=True)
    scores = net(torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(1)))
    loss = function(scores, scores.square(), net)
    caplog.clear()
    try:
        if backward:
            with form.of_step(batch(ROWS)):
                loss.backward()
            assert net.weight.grad is not None
        else:
            form.look_at(loss, batch(ROWS))
    except StepError as error:
        assert net.weight.grad is None
        return f"raised: {error}"
    finally:
        assert torch.autograd.backward.__module__ == "torch.autograd"
    return "".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("backward", [False, True])
def test_the_form_of_a_loss_is_seen(caplog: Any, backward: bool) -> None:
    caplog.set_level(logging.WARNING, logger="dtrain")
    for name, function in MEANS.items():
        assert found(function, caplog, backward=backward) == "", name
    for name, function in SUMS.items():
        assert found(function, caplog, backward=backward).startswith("raised: the loss is a sum"), name
        assert found(function, caplog, backward=backward, averaged=False) == "", name
    for name, (said, function) in OTHERS.items():
        told = found(function, caplog, backward=backward)
        assert told.startswith("the loss is no mean over the batch's samples: "), name
        assert said in told, name


def test_the_error_says_what_is_done_to_the_sum(caplog: Any) -> None:
    assert "(.sum(), or reduction='sum', times 0.01)" in found(SUMS["divided"], caplog, backward=False)


def test_a_constant_that_one_size_of_batch_explains_is_seen_with_another_size() -> None:
    """A sum over 100 samples divided by 100 is a mean, over 40 it is not; each size is looked at once, and two of them."""
    net = nn.Linear(4, 1)
    form = LossForm(net, averaged=True, warns=False)

    def look(rows: int, divisor: float) -> None:
        form.look_at(net(torch.ones(rows, 4)).sum() / divisor, batch(rows))

    look(50, 100)
    look(50, 3)  # not looked at
    with pytest.raises(StepError, match=r"times 0\.01"):
        look(40, 100)
    look(30, 3)  # two sizes were looked at


def test_one_warning_is_enough(caplog: Any) -> None:
    net = nn.Linear(4, 3)
    form = LossForm(net, averaged=True, warns=True)
    for rows in (6, 5):
        form.look_at(net(torch.ones(rows, 4)).mean().sqrt(), batch(rows))
    assert len(caplog.records) == 1
    LossForm(net, averaged=True, warns=False).look_at(net(torch.ones(6, 4)).mean().sqrt(), batch(6))
    assert len(caplog.records) == 1
