"""Batches that are no stacked tensors, on 1, 2 and 3 ranks, against plain torch in one process."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.batch_kinds import Encoding, Graph, Graphs
from helpers.commands import Dtrain
from helpers.ranks import run_ranks
from helpers.sweep import some
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader, IterableDataset

from dtrain.distributed.world import World

B, N, RATE = 4, 10, 0.1


def samples_of_all() -> tuple[list[Tensor], Tensor]:
    """Images of 3 channels and unequal size, each of which is also a sequence of vectors; and a number for each."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(3, 2 + i % 3, 3, generator=generator, dtype=torch.float64) for i in range(N)]
    return made, torch.arange(N, dtype=torch.float64) ** 2 / 10


IMAGES, NUMBERS = samples_of_all()
SEQUENCES = [image.flatten(1).T.contiguous() for image in IMAGES]  # (length, 3)
MEANS = torch.stack([image.mean((1, 2)) for image in IMAGES])  # (N, 3)
WEIGHTS = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)  # as long as a batch


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64))

    def forward(self, means: Tensor) -> Tensor:
        return means @ self.w


def means_of(features: Any) -> Tensor:
    """What a user's step makes of its features: a vector for each sample."""
    if isinstance(features, (list, tuple)) and not hasattr(features, "batch_sizes"):
        return torch.stack([one.mean((1, 2)) if one.ndim == 3 else one.mean(0) for one in features])
    if hasattr(features, "batch_sizes"):
        padded, lengths = pad_packed_sequence(features, batch_first=True)
        return padded.sum(1) / lengths[:, None]
    if isinstance(features, Graphs):
        return torch.stack([graph.x.mean(0) for graph in features.to_data_list()])
    if features.is_nested:
        return torch.stack([one.mean(0) for one in features.unbind()])
    return features


class Kind(NamedTuple):
    """How a batch of some samples looks, and what its step gets of it."""

    make: Any
    take: Any = lambda x, y: (means_of(x), y)
    functions: Any = None
    collate: Any = None
    predicts: bool = True


def graphs(picked: list[int]) -> Graphs:
    edges = torch.tensor([[0], [1]])
    return Graphs.from_data_list([Graph(SEQUENCES[i], edges) for i in picked])


def dicts(picked: list[int]) -> list[Any]:
    return [{"x": IMAGES[i], "y": NUMBERS[i]} for i in picked]


def of_dicts(*samples: Any) -> Any:
    assert all(isinstance(sample, dict) for sample in samples)
    return means_of([sample["x"] for sample in samples]), torch.stack([sample["y"] for sample in samples])


def of_encoding(batch: Any) -> Any:
    assert type(batch) is Encoding and batch._n_sequences == 2 and len(batch._encodings) == len(batch["x"])
    return batch["x"], batch["y"]


def time_first(picked: list[int]) -> Any:
    return pad_sequence([SEQUENCES[i] for i in picked]), torch.tensor([len(SEQUENCES[i]) for i in picked])


def of_time_first(x: Tensor, lengths: Tensor, y: Tensor) -> Any:
    return x.sum(0) / lengths[:, None], y


def split_time_first(batch: Any, sizes: list[int]) -> Any:
    return list(zip(batch[0].split(sizes, 1), *(part.split(sizes) for part in batch[1:]), strict=True))


def of_weighted(x: Tensor, y: Tensor, weights: Tensor) -> Any:
    assert torch.equal(weights, WEIGHTS)
    return x, y


def split_weighted(batch: Any, sizes: list[int]) -> Any:
    return [(x, y, batch[2]) for x, y in zip(batch[0].split(sizes), batch[1].split(sizes), strict=True)]


def transposed(samples: list[Any]) -> Any:
    return tuple(zip(*samples, strict=True))


KINDS = {
    "images": Kind(lambda p: ([IMAGES[i] for i in p], NUMBERS[p])),
    "detector": Kind(
        lambda p: (tuple(IMAGES[i] for i in p), tuple({"y": NUMBERS[i : i + 1]} for i in p)),
        lambda x, targets: (means_of(x), torch.cat([target["y"] for target in targets])),
    ),
    "dicts": Kind(dicts, of_dicts, predicts=False),
    "encoding": Kind(
        lambda p: Encoding({"x": MEANS[p], "y": NUMBERS[p]}, [str(i) for i in p], 2), of_encoding, predicts=False
    ),
    "graphs": Kind(lambda p: (graphs(p), NUMBERS[p])),
    "packed": Kind(lambda p: (pack_sequence([SEQUENCES[i] for i in p], enforce_sorted=False), NUMBERS[p])),
    "nested": Kind(lambda p: (torch.nested.nested_tensor([SEQUENCES[i] for i in p], layout=torch.jagged), NUMBERS[p])),
    "time first": Kind(
        lambda p: (*time_first(p), NUMBERS[p]),
        of_time_first,
        {"batch_size": lambda batch: len(batch[1]), "split_batch": split_time_first},
        predicts=False,
    ),
    "weighted": Kind(
        lambda p: (MEANS[p], NUMBERS[p], WEIGHTS),
        of_weighted,
        {"batch_size": lambda batch: len(batch[0]), "split_batch": split_weighted},
    ),
    "collated": Kind(None, lambda x, y: (means_of(x), torch.stack(y)), collate=transposed),
}


class Batches:
    """The batches of one kind, made anew in each pass."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def __iter__(self) -> Iterator[Any]:
        return (self.kind.make(list(range(start, min(start + B, N)))) for start in range(0, N, B))


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(list(zip(IMAGES, NUMBERS, strict=True)))


def loader_of(kind: Kind) -> Any:
    return Batches(kind) if kind.collate is None else DataLoader(Stream(), B, collate_fn=kind.collate)


def trained(world: World) -> dict[str, Any]:
    """One rank: for each kind and mode, the history's means, the weights and the predictions."""
    from dtrain.api.function import train_model
    from dtrain.data.batches import BatchFunctions
    from dtrain.engine.options import RunOptions
    from dtrain.engine.predict import predict

    found: dict[str, Any] = {}
    for name, kind in KINDS.items():
        functions = kind.functions or {}

        def step(model: Any, *batch: Any, kind: Kind = kind) -> Any:
            means, numbers = kind.take(*batch)
            return (model(means) - numbers).square().mean()

        for mode, accumulation in (("global", 1), ("per_rank", 1), ("per_rank", 2)):
            net = Net()
            rows = train_model(
                *(net, 1, loader_of(kind), loader_of(kind)),
                train_step=step,
                valid_step=step,
                optimizer=torch.optim.SGD(net.parameters(), lr=RATE),
                batch=mode,
                accumulation=accumulation,
                verbose=False,
                world=world,
                **functions,
            )
            row = rows.iloc[-1]
            found[f"{name} {mode} {accumulation}"] = [row["loss"], row["val_loss"], net.w.tolist()]
        if kind.predicts:
            told = predict(
                Net(),
                loader_of(kind),
                world,
                RunOptions(batch="global"),
                predict_step=lambda model, features: model(means_of(features)),
                batches=BatchFunctions(**functions),
            )
            found[f"{name} predicted"] = told.tolist()
    found["keras"] = in_keras_style(world)
    found["script"] = scripted()
    return found


class OverTime(nn.Module):
    """Takes (time, batch, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.mean(0))


def in_keras_style(world: World) -> list[Any]:
    """The functions are given once, to fit."""
    from dtrain.api.keras import KerasModel

    def make(picked: list[int]) -> Any:
        return MEANS[picked].expand(7, -1, -1), NUMBERS[picked]

    model = KerasModel(OverTime(), nn.functional.mse_loss, {}, None)
    model.optimizer = torch.optim.SGD(model.net.parameters(), lr=RATE)
    how: dict[str, Any] = {"batch": "global", "world": world}
    own = {"batch_size": lambda batch: len(batch[1]), "split_batch": split_time_first}
    loader = Batches(Kind(make))
    rows = model.fit(1, loader, loader, verbose=False, **how, **own)
    told = model.evaluate(loader, **how)["val_loss"], model.predict(loader, **how).tolist()
    return [[rows["loss"][0], rows["val_loss"][0], model.net.net.w.tolist()], *told]


def scripted() -> list[Any]:
    """A loop of the user's own over batches that only the user can count and cut."""
    import dtrain

    kind, net = KINDS["time first"], Net()
    net, loader = dtrain.prepare(net, Batches(kind), batch="global", cpu=True, **kind.functions)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    net.train()
    meter = dtrain.Meter()
    for batch in loader:
        means, numbers = kind.take(*batch)
        optimizer.zero_grad()
        loss = (net(means) - numbers).square().mean()
        loss.backward()
        optimizer.step()
        meter.add(loss=loss)
    return [meter.means()["loss"], net.w.tolist()]


def by_hand(steps: list[list[int]]) -> list[Any]:
    """Plain torch: an optimizer step for each list of samples."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    total = 0.0
    for picked in steps:
        optimizer.zero_grad()
        loss = (net(MEANS[picked]) - NUMBERS[picked]).square().mean()
        loss.backward()
        total += loss.item() * len(picked)
        optimizer.step()
    with torch.no_grad():
        return [total / N, (net(MEANS) - NUMBERS).square().mean().item(), net.w.tolist()]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_they_are_weighted_cut_and_dealt_as_in_one_process(ranks: int) -> None:
    batches = [list(range(start, min(start + B, N))) for start in range(0, N, B)]
    answers = run_ranks(trained, ranks)
    right = {"global 1": by_hand(batches)}
    for accumulation in (1, 2):
        width = ranks * accumulation
        joined = [list(chain(*batches[start : start + width])) for start in range(0, len(batches), width)]
        right[f"per_rank {accumulation}"] = by_hand(joined)
    with torch.no_grad():
        predicted = Net()(MEANS).tolist()
    for answer in answers:
        for case, got in answer.items():
            if case == "script":
                assert got[0] == pytest.approx(right["global 1"][0], rel=1e-12)
                assert got[1] == pytest.approx(right["global 1"][2], rel=1e-12)
            elif case == "keras":
                weights = torch.tensor(right["global 1"][2], dtype=torch.float64)
                assert got[0][:2] == pytest.approx(right["global 1"][:2], rel=1e-12)
                assert got[0][2] == pytest.approx(right["global 1"][2], rel=1e-12)
                assert got[1] == pytest.approx(right["global 1"][1], rel=1e-12)
                assert got[2] == pytest.approx((MEANS @ weights).tolist(), rel=1e-12)
            elif case.endswith("predicted"):
                assert got == pytest.approx(predicted, rel=1e-12), case
            else:
                expected = right[
                    case.partition(" per_rank" if "per_rank" in case else " global")[1].strip() + case[-2:]
                ]
                assert got[0] == pytest.approx(expected[0], rel=1e-12), case
                assert got[1] == pytest.approx(expected[1], rel=1e-12), case
                assert got[2] == pytest.approx(expected[2], rel=1e-12), case


@pytest.mark.parametrize(
    "words",
    some([["kind=detector"]], [["kind=detector", "batch=global"], ["kind=time"], ["kind=time", "batch=global"]]),
)
def test_parity_is_checked_with_them(dtrain: Dtrain, recipes: Path, words: list[str]) -> None:
    done = dtrain("check", "parity", recipes / "kinds.py", *words, "--steps", 3)
    if words == ["kind=time"]:  # batches that only the recipe can cut are not joined
        assert done.code == 1
        assert "With train.batch=global no batches are joined" in done.text
        return
    assert done.code == 0, done.text
    assert "equal: 2 ranks and 1 took the same samples in 3 optimizer steps" in done.out
