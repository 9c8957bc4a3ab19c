"""What one number of samples leaves open in a loss's graph is told by another one."""

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

FEATURES = 4
Loss = Callable[[Any, Tensor], Tensor]  # (the net, inputs)


def labels(x: Tensor) -> Tensor:
    return torch.arange(len(x)) % 4


def penalty(m: Any) -> Tensor:
    return sum((p**2).sum() for p in m.parameters()) / 2  # type: ignore[return-value]


FOLLOWS: dict[str, Loss] = {
    "times the samples": lambda m, x: m(x).square().mean() * len(x) / 6,
    "a part": lambda m, x: m(x).square().mean() + penalty(m) * len(x) / 23,
    "a sum over the samples twice": lambda m, x: m(x).sum() / len(x) * (len(x) / 6),
    "of classes": lambda m, x: functional.cross_entropy(m(x), labels(x)) * (len(x) * 0.5),
}
RIGHT: dict[str, Loss] = {
    "plain": lambda m, x: m(x).square().mean(),
    "there and back": lambda m, x: m(x).square().mean() * len(x) / len(x),
    "of a sum": lambda m, x: m(x).sum() / len(x) * 0.5,
    "penalty": lambda m, x: m(x).square().mean() + 0.1 * penalty(m),
    "penalty for a sample": lambda m, x: m(x).square().mean() + penalty(m) / len(x),
    "of classes": lambda m, x: functional.cross_entropy(m(x), labels(x)),
    "as many, whatever the samples": lambda m, x: m(x).square().mean() + (m.weight @ x.T @ x).sum(),
}


def looked(loss: Loss, sizes: tuple[int, ...], caplog: Any, *, backward: bool = False) -> list[str]:
    """What each of two steps logs or raises."""
    torch.manual_seed(1)
    net, told = nn.Linear(FEATURES, 5), []
    form = LossForm(net, averaged=True, warns=True)
    for rows in sizes:
        caplog.clear()
        value, batch = (
            loss(net, torch.randn(rows, FEATURES)),
            RankBatch(None, rows, 2 * rows, 1.0, rows=rows, varied=True),
        )
        try:
            if backward:
                with form.of_step(batch):
                    value.backward()
            else:
                form.look_at(value, batch)
        except StepError as error:
            told.append(str(error))
        else:
            told.append("".join(record.getMessage() for record in caplog.records))
    return told


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("sizes", [(3, 2), (4, 3), (3, 4), (6, 5)])
def test_a_factor_that_follows_the_samples_is_refused_as_a_sum_is(
    caplog: Any, sizes: tuple[int, int], backward: bool
) -> None:
    caplog.set_level(logging.WARNING, logger="dtrain")
    for name, loss in FOLLOWS.items():
        first, second = looked(loss, sizes, caplog, backward=backward)
        assert first == "", name
        assert "which follows the number of samples" in second, name
        assert "dtrain.Mean(total, count)" in second, name


@pytest.mark.parametrize("sizes", [(3, 2), (4, 3), (3, 4), (6, 5)])
def test_losses_that_follow_nothing_are_not_told(caplog: Any, sizes: tuple[int, int]) -> None:
    caplog.set_level(logging.WARNING, logger="dtrain")
    for name, loss in RIGHT.items():
        assert looked(loss, sizes, caplog) == ["", ""], name


def test_scores_are_of_pairs_where_they_are_square_for_two_numbers_of_samples(caplog: Any) -> None:
    caplog.set_level(logging.WARNING, logger="dtrain")

    def pairs(m: Any, x: Tensor) -> Tensor:
        return functional.cross_entropy(m(x) @ m(x).T, torch.arange(len(x)))

    first, second = looked(pairs, (4, 3), caplog)
    assert first == ""
    assert "it compares each of them with all others of the batch" in second


def test_a_look_that_leaves_it_open_is_taken_once_more(caplog: Any) -> None:
    caplog.set_level(logging.WARNING, logger="dtrain")
    masks = iter([[0, 0, 0], [1, 1, 1], [1, 0, 1]])

    def masked(m: Any, x: Tensor) -> Tensor:
        mask, loss = torch.tensor(next(masks), dtype=torch.bool), m(x).square().mean(1)
        return loss[mask].mean() if mask.any() else loss.sum() * 0

    told = looked(masked, (3, 3, 3), caplog)
    assert told[:2] == ["", ""]
    assert "it is the mean over 2 that are selected from 3 samples" in told[2]


def test_what_is_left_open_is_looked_at_ten_times_more(caplog: Any) -> None:
    losses = iter([0.0] * 11 + [1.0])

    def nothing(m: Any, x: Tensor) -> Tensor:
        return m(x).sum() * next(losses)  # a sum in the end

    assert looked(nothing, (3,) * 12, caplog) == [""] * 12
