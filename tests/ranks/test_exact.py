"""N ranks compute what one process would: against NumPy, and against loops written out by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.known import digits_loss_and_accuracy
from helpers.ranks import run_ranks
from helpers.sweep import some
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

RANKS = [1, 2, 3, 4]
RECIPE = Path(__file__).parent.parent / "recipes" / "digits_float64.py"


def train_digits(world, folder: str, sizes: list[int]) -> list[dict[str, Any]]:
    """One rank: trains the digits recipe for an epoch, for each size of the validation set."""
    from dtrain.config import load_settings
    from dtrain.trainer.train import train_run

    for size in sizes:
        words = [f"recipe={RECIPE}", "train.epochs=1", f"data.valid_samples={size}"]
        words += [f"run.dir={folder}", f"run.name=valid-{size}", "train.max_steps=12"]  # of 90
        train_run(load_settings("digits", words, {}), world)
    return []


@pytest.mark.parametrize("ranks", RANKS)
def test_validation_equals_numpy_over_all_samples(ranks: int, tmp_path: Path) -> None:
    import dtrain

    sizes = some([1, 7, 359], [2, 64])
    run_ranks(train_digits, ranks, folder=str(tmp_path), sizes=sizes)
    for size in sizes:
        run = tmp_path / f"valid-{size}"
        (row,) = dtrain.read_history(run).to_dict("records")
        loss, accuracy = digits_loss_and_accuracy(run / "checkpoints" / "epoch-1" / "model.safetensors", size)
        assert row["val_loss"] == pytest.approx(loss, rel=1e-9)
        # The recipe's accuracy is a float32, also of a batch.
        assert row["val_accuracy"] == pytest.approx(accuracy, abs=1e-6)


def regression_data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, (x**2).sum(dim=1, keepdim=True)


def fresh_net() -> nn.Module:
    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    return net


def declarative(model, x, y):
    loss = ((model(x) - y) ** 2).mean()
    return loss, loss.detach().sqrt()


def imperative(model, x, y):
    model.optimizer.zero_grad()
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    model.optimizer.step()
    return loss.item(), loss.item() ** 0.5


def cleared_last(model, x, y):
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    model.optimizer.step()
    model.zero_grad()
    return loss.item(), loss.item() ** 0.5


def weighted_tokens(model, x, y):
    """A loss whose weight is not the batch size: samples with a positive target count once, others thrice."""
    import dtrain

    weights = torch.where(y > 3, 1.0, 3.0).double()
    total = (weights * (model(x) - y) ** 2).sum()
    return {"loss": dtrain.Mean(total, weights.sum())}


STEPS = {
    "declarative": declarative,
    "imperative": imperative,
    "cleared last": cleared_last,
    "weighted": weighted_tokens,
}


def train_cases(world, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One rank: trains each case and returns weights and history."""
    from dtrain.api.function import train_model

    results = []
    for case in cases:
        net = fresh_net()
        data = TensorDataset(*regression_data(case["n"]))
        loader = DataLoader(data, batch_size=case["batch"])
        valid = DataLoader(TensorDataset(*regression_data(case["n_valid"])), batch_size=case["batch"])
        step = STEPS[case["kind"]]
        frame = train_model(
            net,
            2,
            loader,
            valid,
            train_step=step,
            valid_step=declarative,
            batch=case["mode"],
            accumulation=case.get("accumulation", 1),
            verbose=False,
            world=world,
        )
        weights = torch.cat([p.detach().flatten() for p in net.parameters()]).tolist()
        columns = ["loss", "val_loss", "val_metric"] + (["metric"] if "metric" in frame else [])
        results.append({"weights": weights, "history": frame[columns].to_dict("list")})
    return results


def by_hand(case: dict[str, Any], ranks: int) -> dict[str, Any]:
    """The same training in one process, with plain torch on the concatenated global batches."""
    net = fresh_net()
    x, y = regression_data(case["n"])
    xv, yv = regression_data(case["n_valid"])
    size = case["batch"] * (ranks if case["mode"] == "per_rank" else 1) * case.get("accumulation", 1)
    history: dict[str, list[float]] = {"loss": [], "val_loss": []}
    for _ in range(2):
        total = count = 0.0
        for start in range(0, case["n"], size):
            xb, yb = x[start : start + size], y[start : start + size]
            weights = torch.where(yb > 3, 1.0, 3.0).double() if case["kind"] == "weighted" else torch.ones_like(yb)
            loss_sum = (weights * (net(xb) - yb) ** 2).sum()
            net.optimizer.zero_grad()
            (loss_sum / weights.sum()).backward()
            net.optimizer.step()
            total, count = total + loss_sum.item(), count + weights.sum().item()
        history["loss"].append(total / count)
        weights_now = [p.detach().numpy() for p in net.parameters()]
        w0, b0, w1, b1 = copy.deepcopy(weights_now)
        predicted = np.tanh(xv.numpy() @ w0.T + b0) @ w1.T + b1
        history["val_loss"].append(float(((predicted - yv.numpy()) ** 2).mean()))
    return {"weights": torch.cat([p.detach().flatten() for p in net.parameters()]).tolist(), "history": history}


CASES = [
    {"kind": kind, "mode": mode, "n": n, "batch": batch, "n_valid": n_valid}
    for kind in STEPS
    for mode in ("per_rank", "global")
    for n, batch, n_valid in ((1, 1, 1), (2, 3, 5), (13, 4, 2), (16, 4, 7), (21, 5, 11))
] + [
    {"kind": kind, "mode": mode, "n": n, "batch": batch, "n_valid": 3, "accumulation": accumulation}
    for kind in STEPS
    for mode in ("per_rank", "global")
    for n, batch, accumulation in ((16, 2, 2), (23, 3, 2), (19, 2, 3), (5, 4, 4))
]


@pytest.mark.parametrize("ranks", RANKS)
def test_training_equals_one_process_on_the_same_global_batches(ranks: int) -> None:
    per_rank = run_ranks(train_cases, ranks, cases=CASES)
    for case, *results in zip(CASES, *per_rank, strict=True):
        expected = by_hand(case, ranks)
        for result in results:
            np.testing.assert_allclose(result["weights"], expected["weights"], rtol=1e-9, err_msg=str(case))
            for name, means in expected["history"].items():
                np.testing.assert_allclose(result["history"][name], means, rtol=1e-9, err_msg=f"{name} {case}")
        assert all(result == results[0] for result in results), f"the ranks' results differ: {case}"


class NormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        self.seen = 0

    def forward(self, x):
        return self.layers(x)


def train_with_batch_norm(world, n_valid: int) -> dict[str, Any]:
    """One rank: buffers before and after validation, and a counter that the step keeps on its model."""
    from dtrain.api.function import train_model

    torch.manual_seed(0)
    net = NormNet()
    during: list[list[float]] = []

    def train_step(model, x, y):
        model.seen = model.seen + 1
        return declarative(model, x.float(), y.float())

    def valid_step(model, x, y):
        assert type(model) is NormNet
        during.append(model.layers[1].running_mean.tolist())
        return declarative(model, x.float(), y.float())

    train = DataLoader(TensorDataset(*regression_data(24)), batch_size=4)
    valid = DataLoader(TensorDataset(*regression_data(n_valid)), batch_size=2)
    frame = train_model(net, 2, train, valid, train_step=train_step, valid_step=valid_step, verbose=False, world=world)
    return {
        "during": during,
        "after": net.layers[1].running_mean.tolist(),
        "seen": net.seen,
        "rows": frame["val_loss"].tolist(),
    }


def test_validation_neither_hangs_nor_changes_buffers_with_unequal_batches() -> None:
    results = run_ranks(train_with_batch_norm, 3, n_valid=7)
    steps = [len(result["during"]) for result in results]
    assert steps == [4, 2, 2], "4 batches of at most 2 samples, dealt to 3 ranks, in 2 epochs"
    for result in results:
        half = len(result["during"]) // 2
        assert all(means == result["after"] for means in result["during"][half:])
        assert result["seen"] == 4
        assert result["after"] == results[0]["after"], "all ranks validate with rank 0's statistics"
        assert result["rows"] == results[0]["rows"]


def go_past_ddp(world, own_backward: bool, averages: bool = False, average: str = "auto") -> list[Any]:
    """What a step is told that calls a part of the net, and how often it was called."""
    import torch.distributed as dist

    from dtrain.api.function import train_model
    from dtrain.errors import StepError

    torch.manual_seed(0)
    net, steps = NormNet(), []
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    loader = DataLoader(TensorDataset(*regression_data(16)), batch_size=4)

    def train_step(model, x, y):
        steps.append(len(x))
        loss = ((model.layers(x.float()) - y.float()) ** 2).mean()
        if own_backward:
            model.optimizer.zero_grad()
            loss.backward()
            for parameter in model.parameters() if averages else ():
                dist.all_reduce(parameter.grad)
                parameter.grad /= 2
            model.optimizer.step()
        return {"loss": loss.detach() if own_backward else loss}

    try:
        train_model(net, 1, loader, train_step=train_step, average=average, verbose=False, world=world)
    except StepError as error:
        return [str(error), len(steps)]
    return ["trained", len(steps)]


@pytest.mark.parametrize("own_backward", [False, True])
def test_a_step_that_goes_past_ddp_is_found_at_once_where_ddp_is_asked_for(own_backward: bool) -> None:
    for told, steps in run_ranks(go_past_ddp, 2, own_backward=own_backward, average="ddp"):
        assert "gradients come without a call of the model itself" in told
        assert "Set train.average=step" in told
        assert steps == 1
    if own_backward:  # a step may average by itself
        assert run_ranks(go_past_ddp, 2, own_backward=True, averages=True) == [["trained", 2]] * 2


def gradients_without_steps(world, clears: bool, accumulation: int, every: int) -> list[Any]:
    """How often a step was called that computes gradients and steps at every so many calls, and what it was told."""
    from dtrain.api.function import train_model
    from dtrain.errors import StepError

    net, calls = torch.nn.Linear(1, 1), []
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    loader = DataLoader(TensorDataset(torch.ones(150, 1)), batch_size=1)

    def train_step(model, x):
        calls.append(1)
        if clears:
            model.optimizer.zero_grad()
        loss = model(x).mean()
        loss.backward()
        if len(calls) % every == 0:
            model.optimizer.step()
            model.optimizer.zero_grad()
        return {"loss": loss.detach()}

    try:
        train_model(net, 1, loader, train_step=train_step, verbose=False, world=world, accumulation=accumulation)
    except StepError as error:
        return [len(calls), str(error)]
    return [len(calls), ""]


@pytest.mark.parametrize(
    ("clears", "accumulation", "every", "calls", "told"),
    [
        (True, 1, 1000, 100, "no optimizer's step() ran in 100 train steps"),
        (True, 6, 1000, 1, "calls backward() but not optimizer.step()"),
        (False, 1, 1000, 150, "no optimizer's step() ran in the whole epoch"),
        (False, 1, 120, 150, ""),  # it accumulates by itself
    ],
)
def test_gradients_that_are_never_stepped_on_are_found_soon(
    clears: bool, accumulation: int, every: int, calls: int, told: str
) -> None:
    ((called, words),) = run_ranks(gradients_without_steps, 1, clears=clears, accumulation=accumulation, every=every)
    assert called == calls
    assert told in words if told else not words, words


def random_streams(world) -> dict[str, Any]:
    from dtrain.api.function import train_model

    net = fresh_net()
    drawn: list[float] = []

    def train_step(model, x, y):
        drawn.append(torch.rand(1).item())
        return declarative(model, x, y)

    loader = DataLoader(TensorDataset(*regression_data(8)), batch_size=2, shuffle=True)
    train_model(net, 1, loader, train_step=train_step, verbose=False, world=world)
    return {"drawn": drawn, "weights": net[0].weight.tolist()}


def test_ranks_draw_different_dropout_and_the_same_run_twice_is_the_same_run() -> None:
    first, second = run_ranks(random_streams, 2), run_ranks(random_streams, 2)
    assert first == second
    assert first[0]["drawn"] != first[1]["drawn"]
    assert first[0]["weights"] == first[1]["weights"]
