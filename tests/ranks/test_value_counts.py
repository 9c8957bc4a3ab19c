"""A mean over more values for each sample on one rank than on the other one is no mean over the samples: a warning."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.pages import PAGES, blocks
from helpers.ranks import run_ranks
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

import dtrain

SAMPLES, BATCH = 24, 8
Step = Callable[[Any, Tensor, Tensor, Tensor], Any]  # (model, padded (rows, longest, 3), lengths, classes) -> a loss


class Sequences(Dataset[Any]):
    """Sequences of 2 to 9 vectors, and how long each is; the longest ones come last in each batch."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        length = 2 + index % BATCH
        generator = torch.Generator().manual_seed(index)
        return torch.randn(length, 3, generator=generator, dtype=torch.float64), length


def padded(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, ...]:
    lengths = torch.tensor([length for _, length in samples])
    return pad_sequence([x for x, _ in samples], batch_first=True), lengths, lengths % 2


def is_real(x: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(x.shape[1]) < lengths[:, None]


def over_all(m: Any, x: Tensor, lengths: Tensor, y: Tensor) -> Tensor:
    return (m(x) - 1).square().mean()


def masked_over_all(m: Any, x: Tensor, lengths: Tensor, y: Tensor) -> Tensor:
    return ((m(x) - 1).square() * is_real(x, lengths)[..., None]).mean()


def divided_by_all(m: Any, x: Tensor, lengths: Tensor, y: Tensor) -> Tensor:
    return (m(x) - 1).square().sum() / (2 * x.shape[0] * x.shape[1])


def classes_of_all(m: Any, x: Tensor, lengths: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(m(x).flatten(0, 1), y.repeat_interleave(x.shape[1]))


def by_sample_over_all(m: Any, x: Tensor, lengths: Tensor, y: Tensor) -> Tensor:
    return (m(x) - 1).square().mean((1, 2)).mean()


def imperative(m: Any, x: Tensor, lengths: Tensor, y: Tensor) -> Tensor:
    m.optimizer.zero_grad()
    loss = over_all(m, x, lengths, y)
    loss.backward()
    m.optimizer.step()
    return loss.detach()


def of_real_ones(m: Any, x: Tensor, lengths: Tensor, y: Tensor) -> Any:  # as the warning says
    import dtrain

    real = is_real(x, lengths)[..., None]
    return dtrain.Mean(((m(x) - 1).square() * real).sum(), 2 * real.sum())


def by_sample(m: Any, x: Tensor, lengths: Tensor, y: Tensor) -> Tensor:
    real = is_real(x, lengths)[..., None]
    return (((m(x) - 1).square() * real).sum((1, 2)) / lengths).mean()


def each_by_itself(m: Any, x: Tensor, lengths: Tensor, y: Tensor) -> Any:
    return sum((m(one[:length]) - 1).square().mean() for one, length in zip(x, lengths, strict=True)) / len(x)


def with_weights(m: Any, x: Tensor, lengths: Tensor, y: Tensor) -> Tensor:
    return by_sample(m, x, lengths, y) + (m.weight.T @ m.weight).abs().mean()


DIFFERING: list[Step] = [over_all, masked_over_all, divided_by_all, classes_of_all, by_sample_over_all, imperative]
RIGHT: list[Step] = [of_real_ones, by_sample, each_by_itself, with_weights]


def fresh() -> Any:
    torch.manual_seed(2)
    net: Any = nn.Linear(3, 2).double()
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return net


def weights(net: Any) -> list[float]:
    return [value for parameter in net.parameters() for value in parameter.flatten().tolist()]


def trained(world: Any) -> list[Any]:
    """Of each step and way of batching: what was logged, and the weights."""
    import dtrain

    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dtrain.engine.loss_form").addHandler(handler)
    found = []
    for same_draws in (True, False):  # parts of unequal and of equal size
        for step in (*DIFFERING, *RIGHT):
            net = fresh()
            dtrain.train_model(
                net,
                1,
                DataLoader(Sequences(), BATCH, collate_fn=padded),
                train_step=step,
                batch="global",
                same_draws=same_draws,
                verbose=False,
                world=world,
            )
            found.append([[*told], weights(net)])
            told.clear()
    return found


def test_ranks_with_other_numbers_of_values_for_each_sample_are_a_warning() -> None:
    main, other = run_ranks(trained, 2)
    steps = 2 * [*DIFFERING, *RIGHT]
    assert len(main) == len(steps)
    for (logged, after), (silent, _), step in zip(main, other, steps, strict=True):
        assert len(logged) == (step in DIFFERING), step.__name__
        assert all("values for each sample on the first rank and over" in text for text in logged)
        assert silent == []
        if step in RIGHT:  # which one process computes as well
            assert after == pytest.approx(alone(step), abs=1e-9), step.__name__


def alone(step: Step) -> list[float]:
    net = fresh()
    for start in range(0, SAMPLES, BATCH):
        loss = step(net, *padded([Sequences()[index] for index in range(start, start + BATCH)]))
        net.optimizer.zero_grad()
        (getattr(loss, "total", loss) / getattr(loss, "count", 1)).backward()
        net.optimizer.step()
    return weights(net)


def test_the_recipe_for_padded_texts_in_the_docs_is_the_mean_over_all_tokens() -> None:
    page = next(page for page in PAGES if page.name == "moving.md")
    (text,) = (block.text for block in blocks(page, "python") if "a causal language model" in block.text)
    known: dict[str, Any] = {"dtrain": dtrain, "torch": torch, "DataLoader": DataLoader}
    exec(text, known)  # noqa: S102 - the page's
    scores = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[1, 2, 3, -100, -100], [1, 2, 3, 4, 5], [6, 5, -100, -100, -100]])

    def model(labels: torch.Tensor, logits: torch.Tensor) -> Any:
        flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return SimpleNamespace(loss=nn.functional.cross_entropy(*flat))

    parts = [known["train_step"](model, {"labels": labels[rows], "logits": scores[rows]}) for rows in ([0, 2], [1])]
    real = [(row, at) for row in range(3) for at in range(4) if labels[row, at + 1] >= 0]
    errors = [-scores[row, at].log_softmax(0)[labels[row, at + 1]] for row, at in real]
    assert sum(part.count for part in parts) == len(real) == 7
    assert float(sum(part.total for part in parts)) == pytest.approx(float(sum(errors)), rel=1e-6)
