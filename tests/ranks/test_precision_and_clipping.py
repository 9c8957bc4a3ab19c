"""Precision and clipping: the same on any number of ranks, against NumPy and against float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import Dtrain
from helpers.ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dtrain as library
from dtrain.distributed.world import bring_up
from dtrain.errors import StepError, UsageError, WorldError

N, BATCH, RATE = 19, 6, 0.3


def points() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(N, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return x, (x @ torch.tensor([3.0, -4.0, 5.0], dtype=torch.float64))[:, None] * 4


def step_of(kind: str) -> Any:
    def step(model, x, y):
        loss = ((model(x) - y) ** 2).mean()
        if kind == "imperative" and model.training:
            model.optimizer.zero_grad()
            loss.backward()
            model.optimizer.step()
            return loss.item()
        if kind == "mean":
            return library.Mean(((model(x) - y) ** 2).sum(), len(x))
        return loss

    return step


def clipped(world, cases: list[list[Any]]) -> list[list[float]]:
    """One rank: the weights of a line after two epochs, for each case."""
    found = []
    for kind, accumulation, norm, value in cases:
        net = nn.Linear(3, 1, bias=False).double()
        nn.init.zeros_(net.weight)
        net.optimizer = torch.optim.SGD(net.parameters(), lr=RATE)  # type: ignore[assignment]
        library.train_model(
            net,
            2,
            DataLoader(TensorDataset(*points()), batch_size=BATCH),
            train_step=step_of(kind),
            batch="global",
            accumulation=accumulation,
            clip_norm=norm,
            clip_value=value,
            verbose=False,
            world=world,
        )
        found.append(net.weight.flatten().tolist())
    return found


def by_numpy(accumulation: int, norm: float | None, value: float | None) -> np.ndarray:
    """The same in NumPy, over the whole global batches."""
    x, y = (part.numpy() for part in points())
    weight = np.zeros(3)
    size = BATCH * accumulation
    for _ in range(2):
        for start in range(0, N, size):
            rows = slice(start, start + size)
            gradient = 2 * x[rows].T @ (x[rows] @ weight - y[rows, 0]) / len(x[rows])
            if value is not None:
                gradient = gradient.clip(-value, value)
            if norm is not None:
                gradient = gradient * min(1.0, norm / np.linalg.norm(gradient))
            weight = weight - RATE * gradient
    return weight


CASES = [
    [kind, accumulation, norm, value]
    for kind in ("imperative", "declarative", "mean")
    for accumulation in (1, 2)
    for norm, value in ((None, None), (0.5, None), (None, 0.25), (0.5, 0.4))
]


@pytest.mark.parametrize("ranks", [1, 3])
def test_clipping_is_that_of_the_whole_global_batch(ranks: int) -> None:
    """Its norm is not that of the gradients of a rank, nor of one micro-batch."""
    assert len({tuple(by_numpy(*case[1:])) for case in CASES}) == 8, "each limit changes something"
    for found in run_ranks(clipped, ranks, cases=CASES):
        for case, weight in zip(CASES, found, strict=True):
            np.testing.assert_allclose(weight, by_numpy(*case[1:]), rtol=1e-5, err_msg=str(case))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
        self.seen: set[str] = set()

    def forward(self, x):
        self.seen.add(str(self.layers[0](x).dtype))
        return self.layers(x)


def clipped_sparse(world, cases: list[list[Any]]) -> list[list[float]]:
    """Weights of a net with a table that is looked up, after steps on global batches."""
    from dtrain.api.function import train_model

    found = []
    for sparse, norm, value in cases:
        torch.manual_seed(2)
        net = nn.Sequential(nn.EmbeddingBag(6, 3, mode="sum", sparse=sparse), nn.Linear(3, 1)).double()
        rows = torch.randint(0, 6, (12, 4), generator=torch.Generator().manual_seed(1))  # the same index several times
        data = TensorDataset(rows, rows.sum(dim=1, keepdim=True).double())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)

        def train_step(model: Any, x: Any, y: Any) -> Any:
            return (model(x) - y).square().mean()

        train_model(
            net, 2, DataLoader(data, 6), train_step=train_step, optimizer=optimizer, batch="global", verbose=False,
            clip_norm=norm, clip_value=value, world=world,
        )  # fmt: skip
        found.append([number for p in net.parameters() for number in p.detach().flatten().tolist()])
    return found


@pytest.mark.parametrize("ranks", [1, 3])
def test_sparse_gradients_are_clipped_as_dense_ones_of_torch(ranks: int) -> None:
    limits = [[0.05, None], [None, 0.02], [0.05, 0.02], [1e9, None]]
    cases = [[sparse, *limit] for limit in limits for sparse in (True, False)]
    for found in run_ranks(clipped_sparse, ranks, cases=cases):
        for sparse, dense in zip(found[::2], found[1::2], strict=True):
            assert sparse == pytest.approx(dense, rel=1e-12, abs=1e-12)
        assert found[0] != found[6]


def trajectories(world, kinds: list[str]) -> dict[str, Any]:
    """One rank: for each kind of step, the losses of eight epochs by precision, and the type of the net's forward."""
    return {kind: losses_of(kind, world) for kind in kinds}


def losses_of(kind: str, world: Any) -> dict[str, Any]:
    x = torch.randn(90, 8, generator=torch.Generator().manual_seed(1)) * 0.5
    y = (x[:, :1] * 0.5 + x[:, 1:2] ** 2 * 0.1) * 0.1  # small, so that no step of float16 overflows
    found: dict[str, Any] = {}
    for precision in ("fp32", "bf16", "fp16")[: 2 if kind == "imperative" else 3]:
        torch.manual_seed(2)
        net = Net()
        net.optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)  # type: ignore[assignment]
        loaders = [DataLoader(TensorDataset(x, y), batch_size=16, shuffle=shuffle) for shuffle in (True, False)]
        frame = library.train_model(
            net,
            8,
            *loaders,
            train_step=step_of(kind),
            valid_step=step_of(kind),
            batch="global",
            precision=precision,
            verbose=False,
            world=world,
        )
        left = "forward" in vars(net) or net.layers[0].weight.dtype != torch.float32
        found[precision] = [frame[["loss", "val_loss"]].to_numpy().tolist(), sorted(net.seen), left]
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_mixed_precision_follows_float32(ranks: int) -> None:
    lowered = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}
    for answers in run_ranks(trajectories, ranks, kinds=["declarative", "imperative", "mean"]):
        for kind, found in answers.items():
            whole, seen, left = found.pop("fp32")
            assert seen == ["torch.float32"] and not left
            assert whole[-1][1] < 0.5 * whole[0][1], "something was learnt"
            assert len(found) == (1 if kind == "imperative" else 2)
            for precision, (losses, types, forgotten) in found.items():
                assert types == [lowered[precision]] and not forgotten
                assert losses != whole, "it is computed in another precision"
                if (kind, precision) == ("mean", "fp16"):  # sums overflow at first: some steps are left out
                    assert losses[-1][1] < 0.5 * whole[0][1]
                else:
                    np.testing.assert_allclose(losses, whole, rtol=0.1, err_msg=f"{kind} {precision}")


class Recursive(nn.Module):
    """A net that calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, depth=2):
        x = torch.tanh(self.layer(x))
        return x if depth == 0 else self(x, depth - 1)


def types_around_calls(world) -> list[list[Any]]:
    """One rank: what a step's own products are computed in after its calls of the net, and what follows training."""
    seen = []
    net = Recursive()
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)  # type: ignore[assignment]
    x = torch.ones(8, 8)

    def step(model, x):
        loss = model(x).square().mean()
        seen.append([torch.is_autocast_enabled("cpu"), str((x @ x.T).dtype)])
        return loss

    loaders = [DataLoader(TensorDataset(x), batch_size=4) for _ in range(2)]
    library.train_model(
        net, 1, *loaders, train_step=step, valid_step=step, precision="bf16", verbose=False, world=world
    )
    return [*seen, [torch.is_autocast_enabled("cpu"), str((x @ x.T).dtype)]]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_net_that_calls_itself_leaves_the_precision_as_it_was(ranks: int) -> None:
    for seen in run_ranks(types_around_calls, ranks):
        assert len(seen) >= 3 and seen == [[False, "torch.float32"]] * len(seen)


def test_float16_keeps_small_gradients_by_scaling() -> None:
    """Without the scaler a gradient of 1e-9 is 0 in float16, whose smallest number is 6e-8."""

    def step(model, x, y):
        return ((model(x) - y) ** 2).mean() * 1e-9

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    before = net[0].weight.detach().clone()
    net.optimizer = torch.optim.SGD(net.parameters(), lr=1e8)  # type: ignore[assignment]
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.float16):
        lost = torch.autograd.grad(step(net, x, x.sum(1, keepdim=True)), net[0].weight)[0]
    assert (lost == 0).all()
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
    library.train_model(net, 3, loader, train_step=step, precision="fp16", verbose=False, cpu=True)
    assert (net[0].weight != before).all()


def test_gradients_that_overflow_are_a_step_left_out() -> None:
    """The scale is too large at first: it is halved until a step goes through, and the weights stay finite."""

    def step(model, x, y):
        return ((model(x) - y) ** 2).mean() * 1e3

    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    before = net.weight.detach().clone()
    net.optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)  # type: ignore[assignment]
    x = torch.randn(8, 4) * 100
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
    how: dict[str, Any] = {"train_step": step, "precision": "fp16", "clip_norm": 1.0, "verbose": False, "cpu": True}
    schedule = torch.optim.lr_scheduler.LambdaLR(net.optimizer, lambda _: 1.0)
    how |= {"scheduler": schedule, "scheduler_interval": "step"}  # which waits, without a warning
    library.train_model(net, 1, loader, **how)
    assert torch.equal(net.weight, before), "the first step overflows"
    assert schedule.last_epoch == 0
    library.train_model(net, 30, loader, **how)
    assert torch.isfinite(net.weight).all() and not torch.equal(net.weight, before)
    assert 0 < schedule.last_epoch < 30, "as many as were taken"


def test_what_cannot_be_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(3, 1).double()
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)  # type: ignore[assignment]
    loader = DataLoader(TensorDataset(*points()), batch_size=BATCH)

    def train(kind: str = "declarative", **more: Any) -> None:
        library.train_model(net, 1, loader, train_step=step_of(kind), verbose=False, cpu=True, **more)

    with pytest.raises(UsageError, match=r"precision fp16: the train step calls backward\(\) itself"):
        train("imperative", precision="fp16")
    with pytest.raises(UsageError, match="precision = 'float16': should be 'fp32', 'bf16' or 'fp16'"):
        train(precision="float16")
    with pytest.raises(UsageError, match="clip_norm = 0: should be a number above 0"):
        train(clip_norm=0)
    for said, told in (("fp16", "needs a GPU"), ("fp8", "is not supported: use bf16, fp16 or no")):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", said)
        with pytest.raises(WorldError, match=told):
            bring_up(cpu=True)


def conflicting(world) -> str:
    try:
        clipped_case = nn.Linear(3, 1).double()
        clipped_case.optimizer = torch.optim.SGD(clipped_case.parameters(), lr=0.1)  # type: ignore[assignment]
        loader = DataLoader(TensorDataset(*points()), batch_size=BATCH)
        library.train_model(clipped_case, 1, loader, train_step=step_of("mean"), world=world, precision="fp16")
    except (UsageError, StepError) as error:
        return str(error)
    return ""


def test_a_launchers_precision_and_ones_own_must_agree() -> None:
    (told,) = run_ranks(conflicting, 1, env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert told.startswith("train.precision = fp16, but Accelerate's settings say bf16")


def test_a_runs_precision_holds_for_its_evaluation(dtrain: Dtrain, recipes: Path) -> None:
    words = ("epochs=2", "train.precision=bf16", "clip_norm=0.5", "run.name=it", "-n", 2, "--cpu")
    done = dtrain("train", recipes / "small.py", *words)
    assert done.code == 0, done.text
    loss = library.read_history(dtrain.folder / "runs/it")["val_loss"].iloc[-1]
    done = dtrain("evaluate", "runs/it", "--checkpoint", "last", "--cpu")
    assert f"val_loss = {loss:.6f}"[:16] in done.out, done.text
    plain = dtrain("evaluate", "runs/it", "--checkpoint", "last", "--cpu", "train.precision=fp32")
    assert plain.code == 0 and plain.out != done.out
