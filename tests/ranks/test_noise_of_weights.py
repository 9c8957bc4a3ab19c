"""Noise of a parameter that has as many rows as a rank's part of the batch is common to the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from helpers.ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader

RANKS, ROWS = 3, 2  # parts of two are never cut unequally, so that no evidence comes
PAIRED = (ROWS, 5)

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "like": torch.randn_like,
    "detached": lambda w: torch.rand_like(w.detach()),
    "data": lambda w: torch.randint_like(w.data, 9),
    "normal": lambda w: torch.normal(w.detach(), 0.1),
    "dropout": lambda w: nn.functional.dropout(w, 0.5),
}
SAMPLES: dict[str, Callable[[Tensor], Tensor]] = {
    "like": torch.randn_like,
    "dropout": lambda h: nn.functional.dropout(h, 0.5),
    "bernoulli": lambda h: torch.bernoulli(h.detach().sigmoid()),
    "gumbel": nn.functional.gumbel_softmax,
    "in another shape": lambda h: torch.randn(*h.shape, 1, dtype=h.dtype)[..., 0],
}
IN_DOUBT: dict[str, Callable[[Tensor], Tensor]] = {
    "shape": lambda h: torch.randn(PAIRED, dtype=h.dtype) * h.detach().sum(),
    "distribution": lambda h: torch.distributions.Normal(torch.zeros(PAIRED), torch.ones(PAIRED)).sample(),
}


def drawn(world: Any) -> dict[str, Any]:
    """What each function gives in the steps, and what it is refused with."""
    from dtrain import train_model
    from dtrain.errors import StepError

    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, ROWS)).double()
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.0)  # type: ignore[assignment]
    found: dict[str, Any] = {"weights": [], "samples": [], "refused": []}

    def step(model: Any, x: Tensor) -> Tensor:
        hidden = model[0](x)
        found["weights"].append({name: f(model[1].weight).tolist() for name, f in WEIGHTS.items()})
        found["samples"].append({name: f(hidden).tolist() for name, f in SAMPLES.items()})
        for name, function in IN_DOUBT.items():
            try:
                function(hidden)
            except StepError as error:
                found["refused"].append((name, str(error)))
        return model[1](hidden).square().mean()

    x = torch.randn(2 * RANKS * ROWS, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    how = {"verbose": False, "world": world, "train_step": step}
    train_model(net, 1, DataLoader(x, RANKS * ROWS), batch="global", **how)
    return found


def test_noise_of_a_parameter_is_common_and_that_of_samples_follows_them() -> None:
    (alone,) = run_ranks(drawn, 1)
    together = run_ranks(drawn, RANKS)
    for step, one in enumerate(alone["weights"]):
        for found in together:
            for name in WEIGHTS:
                np.testing.assert_allclose(found["weights"][step][name], one[name], rtol=1e-12, err_msg=name)
    for step, one in enumerate(alone["samples"]):
        for name in SAMPLES:
            joined = [row for found in together for row in found["samples"][step][name]]
            np.testing.assert_allclose(joined, one[name], rtol=1e-12, err_msg=name)
    for found in together:
        assert [name for name, _ in found["refused"]] == 2 * list(IN_DOUBT)
        for _, said in found["refused"]:
            assert "random numbers of shape (2, 5)" in said
            assert "randn_like(parameter)" in said
