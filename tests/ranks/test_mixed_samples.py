"""Losses that mix the samples of a batch, on real ranks: warned of once, by rank 0, and looking changes no number."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from helpers.ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCH, SAMPLES = 12, 32
Step = Callable[[Any, Tensor], Tensor]


def centred(out: Tensor) -> Tensor:
    return (out - out.mean(0)).square().mean()


def imperative(model: Any, x: Tensor) -> Tensor:
    model.optimizer.zero_grad()
    loss = centred(model(x))
    loss.backward()
    model.optimizer.step()
    return loss.detach()


def likelihood(model: Any, x: Tensor) -> Tensor:
    risk = model(x.float().double())[:, 0]  # no tensor of the batch: the second size decides
    return -(risk - torch.logcumsumexp(risk, 0)).mean()


def in_parts(model: Any, x: Tensor) -> Tensor:
    return torch.cdist(*[torch.tanh(model[1](model[0](x)))] * 2).mean()


def totalled(model: Any, x: Tensor) -> Any:
    import dtrain

    return dtrain.Mean(centred(model(x)) * len(x), len(x))


def plain(model: Any, x: Tensor) -> Tensor:
    return model(x).square().mean()


def plain_imperative(model: Any, x: Tensor) -> Tensor:
    model.optimizer.zero_grad()
    loss = model(x).abs().mean()
    loss.backward()
    model.optimizer.step()
    return loss.detach()


def returned(model: Any, x: Tensor) -> Tensor:
    return centred(model(x))


MIXED: list[tuple[Step, dict[str, Any]]] = [
    (returned, {}),
    (returned, {"accumulation": 2}),
    (returned, {"average": "ddp"}),
    (returned, {"batch": "per_rank"}),
    (imperative, {}),
    (likelihood, {}),
    (in_parts, {}),
    (totalled, {}),
]
MEANS: list[tuple[Step, dict[str, Any]]] = [(plain, {}), (plain, {"accumulation": 2}), (plain_imperative, {})]


def trained(world: Any, step: Step, how: dict[str, Any]) -> list[float]:
    import dtrain

    torch.manual_seed(4)
    net: Any = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    arguments = {"batch": "global"} | how
    dtrain.train_model(
        net, 1, DataLoader(TensorDataset(x), BATCH), train_step=step, verbose=False, world=world, **arguments
    )
    return [value for parameter in net.parameters() for value in parameter.flatten().tolist()]


def looked_at(world: Any) -> list[Any]:
    """Of each step: what was logged, and whether the weights are those of a run that looks at no loss."""
    from dtrain.engine.sample_mixing import SampleMixing

    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dtrain.engine.loss_form").addHandler(handler)
    found, own = [], SampleMixing.found
    for step, how in [*MIXED, *MEANS]:
        weights = trained(world, step, how)
        logged = [*told]
        SampleMixing.found = lambda *_: False  # type: ignore[method-assign]
        try:
            found.append([logged, weights == trained(world, step, how)])
        finally:
            SampleMixing.found = own  # type: ignore[method-assign]
        told.clear()
    return found


def test_rank_0_warns_of_mixed_samples_and_no_number_changes() -> None:
    main, other = run_ranks(looked_at, 2)
    for (logged, same), (silent, as_well), (step, how) in zip(main, other, [*MIXED, *MEANS], strict=True):
        name = f"{step.__name__} {how}"
        assert len(logged) == ((step, how) in MIXED), name
        assert all("depends on other samples of the batch" in text for text in logged), name
        assert (silent, same, as_well) == ([], True, True), name


def test_accumulation_on_one_rank_warns_and_one_batch_for_each_step_does_not() -> None:
    """Nothing is averaged in the latter."""
    assert run_ranks(alone, 1) == [[1, 0]]


def alone(world: Any) -> list[int]:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dtrain.engine.loss_form").addHandler(handler)
    counts = []
    for how in ({"accumulation": 2}, {}):
        trained(world, returned, how)
        counts.append(len(told))
        told.clear()
    return counts
