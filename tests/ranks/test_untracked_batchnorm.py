"""BatchNorm without running statistics has, in validation and prediction too, those of all ranks' rows of a batch."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import dtrain

N = 14


class Net(nn.Module):
    """Untracked BatchNorm of three kinds, nested, one of them without a weight; and one whose statistics were taken away."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        how = {"track_running_stats": False}
        self.lines = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Sequential(nn.BatchNorm1d(3, **how), nn.Tanh()))
        self.flat = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2, affine=False, **how), nn.InstanceNorm2d(2))
        self.deep = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2, **how))
        self.taken = nn.BatchNorm1d(4)
        self.taken.running_mean = self.taken.running_var = self.taken.num_batches_tracked = None
        self.tracked = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 1)

    def forward(self, x):  # (rows, 2, 5)
        lines = self.lines(x).flatten(1)
        flat = self.flat(x[:, None])
        deep = self.deep(x[:, None, None])
        four = torch.stack([lines[:, 0], lines.mean(1), flat.square().flatten(1)[:, 0], deep.flatten(1)[:, 3]], 1)
        return self.last(self.tracked(torch.tanh(self.taken(four))))


class Own(nn.Module):
    """A user's own layer, which no one can tell beforehand."""

    def forward(self, x):
        return nn.functional.batch_norm(x, None, None, training=True)


class Stream(IterableDataset):
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __iter__(self):
        yield from ((row,) for row in self.x)


def rows(n: int = N) -> torch.Tensor:
    return torch.randn(n, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 + 1


def step(model, x):
    return (model(x) - x.mean((1, 2))[:, None]).square().mean()


def own_net() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Flatten(), nn.Linear(10, 3), Own(), nn.Linear(3, 1)).double()


def cases(size: int) -> dict[str, tuple[torch.Tensor, str, int, bool]]:
    """Rows, whose batch size it is, the batch size, whether they are a stream."""
    return {
        "global": (rows(), "global", 6, False),
        "few": (rows(2), "global", 6, False),  # fewer than ranks
        "per_rank": (rows(), "per_rank", 4, False),
        "stream": (rows(), "per_rank", 4, True),
    }


def loader_of(x: torch.Tensor, batch_size: int, stream: bool) -> DataLoader:
    return DataLoader(Stream(x) if stream else TensorDataset(x), batch_size)


def on_ranks(world) -> dict[str, Any]:
    """One rank: everything that validates and predicts."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dtrain").addHandler(handler)
    found: dict[str, Any] = {}
    for name, (x, batch, size, stream) in cases(world.size).items():
        net = Net().double()
        keras = dtrain.KerasModel(net, lambda out, x: (out - x.mean((1, 2))[:, None]).square().mean())
        if not stream:
            pairs = DataLoader(TensorDataset(x, x), size)
            found[f"{name} evaluate"] = keras.evaluate(pairs, batch=batch, world=world)["val_loss"]
        found[f"{name} predict"] = (
            keras.predict(loader_of(x, size, stream), batch=batch, world=world).flatten().tolist()
        )
        found[f"{name} script"] = in_a_script(x, batch, size, stream)
    for synced in (True, False):
        net = Net().double()
        frame = train(net, world, sync_batchnorm=synced)
        found[f"trained {synced}"] = frame["val_loss"].tolist()
        found[f"weights {synced}"] = torch.cat([p.flatten() for p in net.parameters()]).tolist()
    for together in (True, False):
        told.append(f"own, {together}")
        found[f"own {together}"] = train(own_net(), world, 12, valid_together=together, sync_batchnorm=together)[
            "val_loss"
        ].tolist()
    if world.size > 1:
        with contextlib.suppress(dtrain.UsageError):
            train(Net().double(), world, compile=True)
            told.append("compiled")
    return {"found": found, "told": told}


def train(net: nn.Module, world: Any, valid: int = 11, **more: Any) -> Any:
    x = rows()
    return dtrain.train_model(
        net,
        2,
        DataLoader(TensorDataset(x), 6, drop_last=True),
        DataLoader(TensorDataset(x[:valid]), 4 if valid == 11 else 6),
        train_step=step,
        valid_step=step,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.05),
        batch="global",
        same_draws=False,
        verbose=False,
        world=world,
        **more,
    )


def in_a_script(x: torch.Tensor, batch: str, size: int, stream: bool) -> list[float]:
    """The loss of a loop by hand, and of one within a loop that trains; parts of the net called by themselves."""
    net, loader = dtrain.prepare(Net().double(), loader_of(x, size, stream), batch=batch)

    def validated() -> list[float]:
        net.eval()
        meter = dtrain.Meter()
        with torch.no_grad():
            for (part,) in loader:
                meter.add(loss=step(net, part), lines=net.lines(part).square().mean())
        return [meter.means()["loss"], meter.means()["lines"]]

    first = validated()
    net.train()
    for _ in loader:
        within = validated()
        net.train()
        break
    assert within == pytest.approx(first, rel=1e-12)
    return first


def of_one(x: torch.Tensor, size: int) -> tuple[float, list[float], float]:
    """In one plain process: the mean loss, the predictions, and a value of a part of the net."""
    net = Net().double().eval()
    with torch.no_grad():
        losses, lines = (
            [float(f(part)) * len(part) for part in x.split(size)]
            for f in (lambda part: step(net, part), lambda part: net.lines(part).square().mean())
        )
        return (
            sum(losses) / len(x),
            torch.cat([net(part) for part in x.split(size)]).flatten().tolist(),
            sum(lines) / len(x),
        )


def trained_by_one(net: nn.Module, valid: int = 11) -> tuple[list[float], list[float]]:
    """In one plain process: val_loss by epoch, and the weights."""
    x, optimizer, validated = rows(), torch.optim.SGD(net.parameters(), lr=0.05), []
    for _ in range(2):
        net.train()
        for part in x[:12].split(6):
            optimizer.zero_grad()
            step(net, part).backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            parts = x[:valid].split(4 if valid == 11 else 6)
            validated.append(sum(float(step(net, part)) * len(part) for part in parts) / valid)
    return validated, torch.cat([p.detach().flatten() for p in net.parameters()]).tolist()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_it_is_that_of_one_process(size: int) -> None:
    everyone = run_ranks(on_ranks, size)
    for rank, result in enumerate(everyone):
        found, told = result["found"], result["told"]
        for name, (x, batch, batch_size, stream) in cases(size).items():
            loss, predictions, lines = of_one(x, batch_size * (size if batch == "per_rank" else 1))
            if not stream:
                assert found[f"{name} evaluate"] == pytest.approx(loss, rel=1e-9), name
            assert found[f"{name} predict"] == pytest.approx(predictions, rel=1e-9), name
            assert found[f"{name} script"] == pytest.approx([loss, lines], rel=1e-9), name
        validated, weights = trained_by_one(Net().double())
        assert found["trained True"] == pytest.approx(validated, rel=1e-9)
        assert found["weights True"] == pytest.approx(weights, rel=1e-9, abs=1e-12)
        assert found["own True"] == pytest.approx(trained_by_one(own_net(), 12)[0], rel=1e-9)
        one, several = told.index("own, True"), told.index("own, False")
        warned = [text for text in told[several:] if "valid_together = True" in text]
        assert len(warned) == (size > 1 and rank == 0), "of a layer of one's own that was not foreseen"
        assert not [text for text in told[one:several] if "BatchNorm" in text]
        parts = [text for text in told if "from each rank's part of a batch in training" in text]
        assert bool(parts) is (size > 1 and rank == 0)
        assert "compiled" not in told
    assert everyone[0]["found"] == everyone[-1]["found"]
