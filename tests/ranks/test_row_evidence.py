"""Random numbers whose shape looks like the batch's by chance are told from those of its samples."""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

RANKS, ROWS = 2, 4  # of a rank in a whole batch; its last batch has 2 and 1
SAMPLES = 2 * RANKS * ROWS + 3

# name -> what draws something with rows for the samples, or the same for all
OF_SAMPLES: dict[str, Callable[[Tensor], Tensor]] = {
    "one each": lambda x: torch.rand(len(x)),
    "several each": lambda x: torch.rand(len(x), ROWS),
    "flat": lambda x: torch.rand(3 * len(x)).view(len(x), 3),
    "time first": lambda x: torch.rand(ROWS, len(x), 2).transpose(0, 1),
    "as many steps as samples": lambda x: torch.rand(len(x), ROWS, 2),
    "last": lambda x: torch.rand(3, 5, len(x)).movedim(2, 0),
    "dropout": lambda x: nn.functional.dropout(x, 0.5),
    "choices": lambda x: torch.multinomial(torch.ones(9), 2 * len(x), True).view(-1, 2),
}
COMMON: dict[str, Callable[[Tensor], Any]] = {
    "of as many features": lambda x: torch.rand(ROWS).tolist(),
    "of features, kept": lambda x: torch.rand(1, ROWS).tolist(),
    "of twice as many": lambda x: torch.randn(2 * ROWS, 5).tolist(),
    "of all samples' number": lambda x: torch.randn(RANKS * ROWS, 3).tolist(),
    "a mask of features": lambda x: nn.functional.dropout(torch.ones(ROWS, ROWS), 0.5).tolist(),
    "an order of features": lambda x: torch.randperm(ROWS).tolist(),
    "choices": lambda x: torch.multinomial(torch.ones(9), 2 * ROWS, True).tolist(),
    "a scalar": lambda x: torch.rand(1).tolist(),
    "the first rank's rows": lambda x: torch.rand(ROWS + 1, 3).tolist(),
    "the last rank's rows": lambda x: torch.rand(ROWS - 1).tolist(),
}


def drawn(world: Any) -> dict[str, Any]:
    """What each function gives in train and valid steps, and in a loop of one's own."""
    import dtrain
    from dtrain.api.prepared import PROCESS
    from dtrain.engine.loop import Engine
    from dtrain.engine.options import RunOptions
    from dtrain.engine.train_step import Task

    found: dict[str, list[Any]] = {"train": [], "valid": [], "loop": []}
    x = torch.randn(SAMPLES, ROWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loader = DataLoader(TensorDataset(x, torch.arange(SAMPLES)), RANKS * ROWS)

    def look(split: str, x: Tensor, index: Tensor) -> None:
        rows = {
            name: function(x).detach().flatten(1).tolist()
            if name != "one each"
            else [[v] for v in function(x).tolist()]
            for name, function in OF_SAMPLES.items()
        }
        found[split].append({"index": index.tolist(), "rows": rows, "common": {n: f(x) for n, f in COMMON.items()}})

    def step(split: str) -> Callable[..., Tensor]:
        def taken(model: Any, x: Tensor, index: Tensor) -> Tensor:
            look(split, x, index)
            return model(x).mean()

        return taken

    net = nn.Linear(ROWS, 1).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    engine = Engine(
        Task(net, step("train"), loader, step("valid"), loader, optimizer),
        world,
        epochs=2,
        options=RunOptions(batch="global"),
    )
    engine.fit()
    assert engine.draws is not None
    told = engine.draws.evidence.state()
    PROCESS.world = world
    net, loader = dtrain.prepare(nn.Linear(ROWS, 1).double(), loader, batch="global")
    for x, index in loader:
        look("loop", x, index)
        net(x).sum().backward()
    found["late"] = late(world)
    return {**found, "places": len(told)}


def late(world: Any) -> list[str]:
    """Where no two sizes are known before the first draw: batches of each rank, pairs of samples."""
    from dtrain import train_model
    from dtrain.errors import StepError

    def of_features(model: Any, x: Tensor) -> Tensor:
        return (model(x * torch.rand(ROWS))).mean()

    def of_samples(model: Any, x: Tensor) -> Tensor:
        return (model(x) * torch.rand(len(x), 1)).mean()

    def of_pairs(model: Any, x: Tensor) -> Tensor:
        return model(x).mean() * torch.rand(len(x), len(x)).mean()

    def seeds_of_compiled_code(model: Any, x: Tensor) -> Tensor:
        torch.ops.aten.randint.low_out(-(2**63), 2**63 - 1, [1], out=torch.empty(1, dtype=torch.int64))
        return model(x).mean()

    told = []
    cases = (
        (of_features, "per_rank"),
        (of_samples, "per_rank"),
        (of_pairs, "global"),
        (seeds_of_compiled_code, "global"),
    )
    for function, batch in cases:
        net = nn.Linear(ROWS, 1).double()
        net.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        x = torch.ones(2 * RANKS * ROWS + RANKS, ROWS).double()  # the last batches have one sample less or more
        batches = [x[:ROWS], x[:ROWS], x[: ROWS - 1], x[: ROWS - 1]] if batch == "per_rank" else DataLoader(x, 2 * ROWS)
        try:
            train_model(
                net,
                1,
                batches,
                train_step=lambda m, *b, f=function: f(m, *b),
                batch=batch,
                same_draws=True,
                verbose=False,
                world=world,
            )  # type: ignore[misc]
            told.append("")
        except StepError as error:
            told.append(str(error))
    return told


@functools.cache
def drawn_on(ranks: int) -> list[dict[str, Any]]:
    return run_ranks(drawn, ranks)


@pytest.mark.parametrize("split", ["train", "valid", "loop"])
def test_what_looks_like_the_batch_by_chance_is_common_to_all_ranks(split: str) -> None:
    alone, together = drawn_on(1)[0][split], [rank[split] for rank in drawn_on(RANKS)]
    assert len(alone) == (3 if split == "loop" else 6)
    for step, one in enumerate(alone):
        for name in COMMON:
            for rank in together:
                assert rank[step]["common"][name] == one["common"][name], (step, name)
        for name in OF_SAMPLES:
            known = dict(zip(one["index"], one["rows"][name], strict=True))
            for rank in together:
                here = dict(zip(rank[step]["index"], rank[step]["rows"][name], strict=True))
                for index, row in here.items():
                    np.testing.assert_allclose(row, known[index], err_msg=f"{step} {name}")


def test_shapes_that_were_misjudged_are_told_with_the_place() -> None:
    for rank in drawn_on(RANKS):
        of_features, of_samples, of_pairs, compiled = rank["late"]
        assert "test_row_evidence.py:" in of_features
        assert f"drew random numbers of shape ({ROWS},) where the rank had {ROWS} samples" in of_features
        assert "so they are common to the batch" in of_features
        assert f"torch.rand({ROWS + 1})[:{ROWS}]" in of_features
        assert of_samples == ""
        assert "are for pairs of the batch's" in of_pairs
        assert "compiled by torch.compile draws random numbers" in compiled
        assert rank["places"] > len(COMMON)


def by_sample(x: Tensor) -> Tensor:
    return torch.stack([torch.rand(2).sum() for _ in x])


UNLIKE: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {  # with what is logged of each
    "for each sample in turn": ("different numbers of random numbers from torch:", by_sample),
    "scalars in turn": ("numbers from torch:", lambda x: torch.stack([torch.rand(()) for _ in x])),
    "Python's": ("numbers from Python:", lambda x: torch.tensor([random.random() for _ in x])),
    "NumPy's": ("numbers from NumPy:", lambda x: torch.from_numpy(np.random.rand(len(x)))),
    "mixup": ("an order of the batch's samples", lambda x: torch.randperm(len(x)).double()),
    "rrelu": ("rrelu_with_noise", lambda x: nn.functional.rrelu(x - 2, training=True).sum(1)),
    "gamma": (
        "standard_gamma",
        lambda x: torch.distributions.Gamma(x[:, 0].abs() + torch.arange(len(x)), 1.0).sample(),
    ),
}
ALIKE: dict[str, Callable[[Tensor], Tensor]] = {
    **OF_SAMPLES,
    "Python's number": lambda x: x * random.random(),
    "NumPy's number": lambda x: x * np.random.rand(),
    "the same layer several times": lambda x: functools.reduce(lambda y, _: nn.functional.dropout(y, 0.3), range(3), x),
}


def logged(world: Any) -> dict[str, list[str]]:
    """What each function has logged, in a train step."""
    from dtrain import train_model

    found = {}
    for name, function in {**{name: one for name, (_, one) in UNLIKE.items()}, **ALIKE}.items():
        net = nn.Linear(ROWS, 1).double()
        net.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        records: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, records=records: records.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("dtrain").addHandler(handler)
        x = torch.ones(2 * RANKS * ROWS, ROWS).double()

        def step(model: Any, x: Tensor, function: Any = function) -> Tensor:
            return (model(x).squeeze(1) * function(x).reshape(len(x), -1).sum(1)).mean()

        try:
            train_model(
                net, 2, DataLoader(x, RANKS * ROWS), train_step=step, batch="global", verbose=False, world=world
            )
        finally:
            logging.getLogger("dtrain").removeHandler(handler)
        found[name] = records
    return found


def test_what_a_rank_cannot_draw_as_one_process_is_a_warning() -> None:
    main, other = run_ranks(logged, RANKS)
    assert not any(other.values())
    for name, (said, _) in UNLIKE.items():
        assert len(main[name]) == 1, (name, main[name])
        assert said in main[name][0], name
    assert {name: main[name] for name in ALIKE if main[name]} == {}


def in_turns(world: Any) -> list[Any]:
    """The weights after steps with numbers of both kinds, of batches of each rank."""
    from dtrain import train_model

    torch.manual_seed(1)
    net = nn.Linear(ROWS, 1).double()
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = torch.randn(3 * RANKS * ROWS + 3, ROWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def step(model: Any, x: Tensor) -> Tensor:
        return (model(x * torch.rand(ROWS)) * torch.rand(len(x), 1) + torch.randn(2 * ROWS, 5).mean()).square().mean()

    size = ROWS * RANKS // world.size
    history = train_model(net, 2, DataLoader(x, size), train_step=step, same_draws=True, verbose=False, world=world)
    return [*net.weight.flatten().tolist(), *net.bias.tolist(), *history["loss"]]


def test_batches_of_each_rank_show_which_numbers_are_their_samples_too() -> None:
    (alone,) = run_ranks(in_turns, 1)
    for together in run_ranks(in_turns, RANKS):
        np.testing.assert_allclose(together, alone, rtol=1e-12)
