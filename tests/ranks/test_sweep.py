"""A sweep over sizes, ranks, loaders and kinds of step against NumPy: every number, every weight.

DTRAIN_TEST_SWEEP=full pytest tests/ranks/test_sweep.py    # a thousand examples for each number of ranks
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.rank_pool import RankPool
from helpers.sweep import FULL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

EXAMPLES = 1000 if FULL else 40
LEARNING_RATE, MOMENTUM, EPOCHS = 0.05, 0.5, 2


class Stream(IterableDataset):
    """Rows without a length."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y

    def __iter__(self):
        return iter(zip(self.x, self.y, strict=True))


def data(n: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(n).normal(size=(n, 3))
    # No line fits these, so that no loss vanishes and relative differences mean something.
    return x, (x @ [[1.0], [-2.0], [0.5]]) + np.sin(5 * x[:, :1])


def train_example(world, case: dict[str, Any]) -> dict[str, Any]:
    """One rank: trains a linear net on one case and returns what it computed, or the error's kind."""
    from dtrain.api.function import train_model
    from dtrain.errors import DtrainError

    net = nn.Linear(3, 1).double()
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    net.optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    visited: list[float] = []

    def loader(n: int, drop_last: bool = False) -> DataLoader:
        x, y = (torch.tensor(part) for part in data(n))
        dataset = Stream(x, y) if case["stream"] else TensorDataset(x, y)
        return DataLoader(dataset, batch_size=case["batch"], drop_last=drop_last)

    def train_step(model, x, y):
        errors = model(x) - y
        loss = (errors**2).mean()
        if case["imperative"]:
            model.optimizer.zero_grad()
            loss.backward()
            model.optimizer.step()
            loss = loss.item()
        return loss, errors.abs().mean().item()

    def valid_step(model, x, y):
        visited.extend(x[:, 0].tolist())
        errors = model(x) - y
        return (errors**2).mean(), errors.abs().mean()

    try:
        frame = train_model(
            net,
            EPOCHS,
            loader(case["n"], case["drop_last"]),
            loader(case["n_valid"]),
            train_step=train_step,
            valid_step=valid_step,
            batch=case["mode"],
            accumulation=case["accumulation"],
            verbose=False,
            world=world,
        )
    except DtrainError as error:
        return {"error": type(error).__name__}
    return {
        "weights": [*net.weight[0].tolist(), *net.bias.tolist()],
        "rows": frame[["loss", "metric", "val_loss", "val_metric"]].to_numpy().tolist(),
        "visited": visited,
    }


def expected(case: dict[str, Any], ranks: int) -> dict[str, Any]:
    """The same with NumPy, in one process, with the gradient written out."""
    x, y = data(case["n"])
    if case["drop_last"]:
        kept = case["n"] // case["batch"] * case["batch"]
        x, y = x[:kept], y[:kept]
    xv, yv = data(case["n_valid"])
    if len(x) == 0 or len(xv) == 0:
        return {"error": "DataError"}
    micro = case["batch"] * (ranks if case["mode"] == "per_rank" else 1)
    step = micro * case["accumulation"]
    weights, velocity = np.zeros(4), np.zeros(4)
    rows = []
    for _ in range(EPOCHS):
        squares = absolutes = 0.0
        for start in range(0, len(x), step):
            features = np.hstack([x[start : start + step], np.ones((len(x[start : start + step]), 1))])
            errors = features @ weights[:, None] - y[start : start + step]
            squares, absolutes = squares + (errors**2).sum(), absolutes + np.abs(errors).sum()
            velocity = MOMENTUM * velocity + 2 * (features * errors).mean(axis=0)
            weights = weights - LEARNING_RATE * velocity
        errors = np.hstack([xv, np.ones((len(xv), 1))]) @ weights[:, None] - yv
        rows.append([squares / len(x), absolutes / len(x), (errors**2).mean(), np.abs(errors).mean()])
    return {"weights": weights.tolist(), "rows": rows, "visited": sorted(xv[:, 0].tolist() * EPOCHS)}


CASES = st.fixed_dictionaries(
    {
        "n": st.integers(0, 130),
        "n_valid": st.integers(0, 40),
        "batch": st.integers(1, 33),
        "mode": st.sampled_from(["per_rank", "global"]),
        "stream": st.booleans(),
        "drop_last": st.booleans(),
        "accumulation": st.integers(1, 4),
        "imperative": st.booleans(),
    }
)


@pytest.mark.timeout(3600 if FULL else 400)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_number_equals_numpys(ranks: int) -> None:
    with RankPool(train_example, ranks) as pool:

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            derandomize=not FULL,
        )
        @given(case=CASES)
        def sweep(case: dict[str, Any]) -> None:
            results, answer = pool(case=case), expected(case, ranks)
            if "error" in answer:
                assert results == [answer] * ranks
                return
            for result in results:
                np.testing.assert_allclose(result["weights"], answer["weights"], rtol=1e-8, atol=1e-12)
                np.testing.assert_allclose(result["rows"], answer["rows"], rtol=1e-8)
            assert sorted(v for result in results for v in result["visited"]) == answer["visited"]

        sweep()
