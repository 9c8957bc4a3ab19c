"""Predictions in the data's order and evaluation over all samples, on any number of ranks, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

SIZES = [1, 2, 7, 11]
LOADERS = ["map", "shuffled", "drop_last", "iterable", "ragged"]


def rows(n: int) -> torch.Tensor:
    return torch.arange(n * 2, dtype=torch.float64).reshape(n, 2) / 7


class Stream(IterableDataset):
    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self):
        return iter(zip(rows(self.n), rows(self.n).sum(dim=1), strict=True))


def loader_of(kind: str, n: int) -> Any:
    data = TensorDataset(rows(n), rows(n).sum(dim=1))
    if kind == "iterable":
        return DataLoader(Stream(n), batch_size=3)
    if kind == "ragged":  # batches of 1, 0, 2, 0, 3, ... samples: some smaller than the number of ranks
        x, y = data.tensors
        cuts = np.cumsum([0, 1, 0, 2, 0, 3, 0, 1, 0, 4, 0])
        return [(x[a:b], y[a:b]) for a, b in zip(cuts, [*cuts[1:], n], strict=True)]
    return DataLoader(data, batch_size=3, shuffle=kind == "shuffled", drop_last=kind == "drop_last")


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(2, 3), nn.Dropout(), nn.Tanh(), nn.BatchNorm1d(3)).double()


def known(n: int) -> np.ndarray:
    weight, bias = (p.detach().numpy() for p in net()[0].parameters())
    return np.tanh(rows(n).numpy() @ weight.T + bias) / np.sqrt(1 + 1e-5)


def infer(world, cases: list[Any]) -> list[Any]:
    """One rank: predictions and means of each case."""
    from dtrain.engine.loop import Task
    from dtrain.engine.options import RunOptions
    from dtrain.engine.predict import evaluate_task, predict

    def valid_step(model, x, y):
        return {"loss": ((model(x).sum(dim=1) - y) ** 2).mean()}

    results = []
    for kind, n, mode in cases:
        predicted = predict(net(), loader_of(kind, n), world, RunOptions(batch=mode))
        task = Task(net(), valid_step, None, valid_step, loader_of(kind, n))
        means = None if kind == "drop_last" else evaluate_task(task, world, RunOptions(batch=mode)).means
        results.append([predicted.tolist(), str(predicted.dtype), means])
    return results


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_predictions_and_means_equal_numpy(ranks: int) -> None:
    cases = [(kind, n, mode) for kind in LOADERS for n in SIZES for mode in ("per_rank", "global")]
    for answers in run_ranks(infer, ranks, cases=cases):
        for (kind, n, mode), (predicted, dtype, means) in zip(cases, answers, strict=True):
            expected = known(n)
            assert dtype == "torch.float64"
            np.testing.assert_allclose(predicted, expected, rtol=1e-12, err_msg=f"{kind} {n} {mode}")
            if means is not None:
                loss = ((expected.sum(axis=1) - rows(n).numpy().sum(axis=1)) ** 2).mean()
                assert means["loss"] == pytest.approx(loss, rel=1e-12)


def nested(world, n: int) -> Any:
    """One rank: a nested result of several types, of which some ranks see nothing."""
    from dtrain.engine.predict import predict

    def step(model, x):
        return {"half": x.bfloat16(), "pair": (x[:, 0] > 1, (x * 7).long())}

    found = predict(net(), loader_of("map", n), world, predict_step=step)
    half, (flag, whole) = found["half"], found["pair"]
    assert (half.dtype, flag.dtype, whole.dtype) == (torch.bfloat16, torch.bool, torch.int64)
    return [half.float().tolist(), flag.tolist(), whole.tolist()]


@pytest.mark.parametrize("ranks", [1, 3])
def test_nested_predictions_keep_structure_and_types(ranks: int) -> None:
    for answer in run_ranks(nested, ranks, n=7):
        x = rows(7)
        assert answer == [x.bfloat16().float().tolist(), (x[:, 0] > 1).tolist(), (x * 7).long().tolist()]


PIECE = 500  # bytes


def as_bytes(tensor: torch.Tensor) -> list[Any]:
    numbers = tensor.float() if tensor.dtype == torch.bfloat16 else tensor.resolve_conj()  # NumPy has none
    return [str(tensor.dtype), list(tensor.shape), list(numbers.numpy().tobytes())]


def pieces(world, sizes: list[int]) -> list[Any]:
    """One rank: predictions of several types as bytes, and the most bytes that a collective made room for."""
    import dtrain.distributed.world
    from dtrain.engine.predict import predict
    from dtrain.errors import DataError

    most, gather = [0], torch.distributed.all_gather

    def all_gather(room, mine):
        most.append(sum(part.nbytes for part in room))
        gather(room, mine)

    dtrain.distributed.world._PIECE_BYTES, torch.distributed.all_gather = PIECE, all_gather

    results = []
    with pytest.raises(DataError, match="yielded no batch"):
        predict(net(), loader_of("ragged", 0), world)
    for n in sizes:
        for loader in (loader_of("ragged", n), loader_of("shuffled", n)):
            found = predict(net(), loader, world, predict_step=lambda model, x: several_types(x))
            assert all(part.is_cpu for part in found)
            results.append([as_bytes(part) for part in found])
        ones = [torch.full((2,), rank) if rank != 1 else None for rank in range(world.size)]
        parts = world.gather_tensors(ones[world.rank])
        assert [None if part is None else part.tolist() for part in parts] == [
            None if one is None else one.tolist() for one in ones
        ]
    return [results, max(most)]


def several_types(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    wave = torch.complex(x, -x)
    return x, x.bfloat16(), x > 1, wave.conj(), x[:, :0], (x * 7).long()[:, 0], x.unsqueeze(2).expand(-1, -1, 3)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_predictions_pass_the_devices_in_pieces_and_stay_what_they_are(ranks: int) -> None:
    sizes = [1, 5, 101]
    expected = [[as_bytes(part) for part in several_types(rows(n))] for n in sizes for _ in range(2)]
    for results, most in run_ranks(pieces, ranks, sizes=sizes):
        assert results == expected
        assert most <= PIECE, "a device has room for all predictions of all ranks"


def refuse(world, how: str) -> str:
    from dtrain.engine.predict import predict
    from dtrain.errors import DtrainError

    steps = {"mean": lambda model, x: model(x).mean(), "text": lambda model, x: "no"}
    try:
        predict(net(), loader_of("map", 4 if how != "empty" else 0), world, predict_step=steps.get(how))
    except DtrainError as error:
        return str(error)
    return "predicted"


@pytest.mark.parametrize(
    ("how", "told"), [("mean", "one row per sample"), ("text", "returned a str"), ("empty", "yielded no batch")]
)
def test_what_is_no_prediction_is_refused(how: str, told: str) -> None:
    assert told in run_ranks(refuse, 1, how=how)[0]
