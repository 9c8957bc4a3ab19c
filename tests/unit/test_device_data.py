"""Batches that are taken out of copies on the device are those that the loader makes; a change of the data counts.

The "device" is the CPU here: the same code, with copies of the tensors. On a GPU: tests/gpu.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from dtrain.data import device_data
from dtrain.data.device_data import Card, DeviceStore, device_store, dry_words
from dtrain.data.loader import ShardedLoader
from dtrain.data.partition import ShardSpec
from dtrain.distributed.world import bring_up
from dtrain.engine.callback import Callbacks, EngineCallback
from dtrain.engine.loop import Engine
from dtrain.engine.options import RunOptions
from dtrain.engine.train_step import Task
from dtrain.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:.pin_memory. argument")

CPU = torch.device("cpu")
PLENTY = 1 << 30


def store(*, asked: bool = False, free: int = PLENTY) -> DeviceStore:
    return DeviceStore(Card(CPU, lambda: free), asked=asked)


def view(loader: Any, how: ShardSpec | None = None, kept: DeviceStore | None = None, **more: Any) -> ShardedLoader:
    return ShardedLoader(loader, how or ShardSpec(0, 1, "global", fill=True), 7, "train", store=kept, **more)


def properties(found: ShardedLoader, epoch: int, skip: int = 0) -> list[Any]:
    return [
        (
            type(share.batch),
            [(t.tolist(), t.dtype, t.stride(), t.requires_grad) for t in share.batch],
            torch.as_tensor(share.indices).tolist(),
            (share.count, share.total, share.scale, share.first, share.last, share.start, share.rows),
        )
        for share in found.iter_batches(epoch, skip)
    ]


def data(n: int = 23) -> TensorDataset:
    x = torch.arange(n * 4, dtype=torch.float32).reshape(n, 2, 2).to(torch.bfloat16)
    return TensorDataset(x.mT, torch.arange(n), torch.ones(n, 1, dtype=torch.bool).expand(n, 3))


SPECS = [
    ShardSpec(0, 1, "global", fill=True),
    ShardSpec(1, 2, "per_rank", fill=True, group=2),
    ShardSpec(2, 3, "global", fill=True, group=3),
    ShardSpec(2, 3, "per_rank", fill=True),  # a filler at the end
    ShardSpec(0, 2, "per_rank", fill=True, merge=2, limit=5),
]


@pytest.mark.parametrize("how", SPECS)
@pytest.mark.parametrize("kind", ["plain", "shuffled", "subset", "own order", "replaced", "pinned"])
def test_batches_are_equal_in_every_property(how: ShardSpec, kind: str) -> None:
    dataset: Any = data()
    if kind == "subset":
        dataset = Subset(Subset(dataset, list(range(22, 2, -1))), [*range(0, 20, 2), 1, 3])
    options: dict[str, Any] = {"shuffle": kind in ("shuffled", "subset", "pinned"), "drop_last": kind == "subset"}
    if kind == "own order":
        options = {"sampler": [5, 3, -1, 0, 7, 7, 22]}
    if kind == "replaced":
        options = {"sampler": torch.utils.data.WeightedRandomSampler([1.0] * 23, 23)}
    loader = DataLoader(dataset, 2, pin_memory=kind == "pinned", **options)
    one, other = view(loader, how, store()), view(loader, how)
    one.varied = other.varied = how.size > 1
    for epoch, skip in ((1, 0), (2, 0), (3, 1), (3, 2)):
        assert properties(one, epoch, skip) == properties(other, epoch, skip)
        assert one.fingerprint == other.fingerprint > 0


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    net.optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)  # type: ignore[assignment]
    x = torch.randn(50, 4)
    return net, x, x.sum(1, keepdim=True)


def step(model: Any, x: Any, y: Any) -> Any:
    loss = (model(x) - y).square().mean()
    return loss, loss.detach().sqrt()


def train(monkeypatch: pytest.MonkeyPatch, card: Card | None, callbacks: Any = None, **more: Any) -> tuple[Any, Any]:
    monkeypatch.setattr(device_data, "card_of", lambda _: card)
    net, x, y = problem()
    whole = TensorDataset(x, y)
    loaders = [DataLoader(Subset(whole, part), 8, shuffle=True) for part in (range(40), range(40, 50))]
    options = RunOptions(accumulation=more.pop("accumulation", 1))
    task = Task(net, step, loaders[0], step, loaders[1])
    engine = Engine(
        task, bring_up(cpu=True), epochs=3, options=options, callbacks=Callbacks(callbacks and callbacks(whole)), **more
    )
    rows = engine.fit().rows
    assert ("train" in engine.train_loader.on_device) is (card is not None)
    timeless = [{key: row[key] for key in row if key not in ("seconds", "samples_per_second")} for row in rows]
    return timeless, [parameter.tolist() for parameter in net.parameters()]


@pytest.mark.parametrize("more", [{}, {"accumulation": 2, "val_every_steps": 2}, {"epoch_steps": 3}])
def test_a_run_is_the_same_to_the_last_bit(monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]) -> None:
    copied = []
    renew = device_data._Copy.renew
    monkeypatch.setattr(device_data._Copy, "renew", lambda copy: copied.append(id(copy.source)) or renew(copy))
    with_it = train(monkeypatch, Card(CPU, lambda: PLENTY), **more)
    assert len(set(copied)) == 2  # x and y, for both loaders
    assert with_it == train(monkeypatch, None, **more)


class Halved(EngineCallback):
    """Changes the data within an epoch and between two, and looks for no more than the run's numbers."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset, self.steps = dataset, itertools.count()

    def on_optimizer_step(self) -> None:
        number = next(self.steps)
        x, y = self.dataset.tensors
        if number == 2:
            x.mul_(0.5)
        if number == 4:
            self.dataset.tensors = (x.clone() + 1, y)
        if number == 7:
            x[3:9] = 0

    def on_epoch_end(self, row: Any) -> None:
        if row["epoch"] == 1:
            self.dataset.tensors[1].data.neg_()  # of which the version tells nothing


def test_changed_data_count_as_they_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(monkeypatch, None)
    changed = train(monkeypatch, None, Halved)
    assert changed != plain
    assert train(monkeypatch, Card(CPU, lambda: PLENTY), Halved) == changed


def sums(found: ShardedLoader, epoch: int) -> list[float]:
    return [share.batch[0].sum().item() for share in found.iter_batches(epoch)]


def test_what_numpy_writes_is_seen_or_the_data_stay(caplog: pytest.LogCaptureFixture) -> None:
    array = np.ones(4, np.float32)
    dataset = TensorDataset(torch.from_numpy(array))
    loader = DataLoader(dataset, 2)
    kept = view(loader, kept=store())
    assert "shared with a NumPy array" in kept.on_device
    shares = kept.iter_batches(1)
    assert next(shares).batch[0].sum() == 2
    array[:] = 3
    assert next(shares).batch[0].sum() == 6
    # Where it is asked for, from the next pass on; and an array that is taken later has the data stay again.
    asked = view(loader, kept=store(asked=True))
    assert sums(asked, 1) == [6, 6]
    array[:] = 4
    assert sums(asked, 2) == [8, 8]
    own = TensorDataset(torch.ones(4))
    later = view(DataLoader(own, 2), kept=store())
    assert sums(later, 1) == [2, 2]
    array = own.tensors[0].numpy()
    shares = later.iter_batches(2)
    assert next(shares).batch[0].sum() == 2
    array[:] = 5
    assert next(shares).batch[0].sum() == 10
    assert "made on the CPU" in caplog.text


def test_other_tensors_of_another_length_are_never_read_beyond_their_end() -> None:
    dataset = TensorDataset(torch.ones(6))
    kept = view(DataLoader(dataset, 2), kept=store())
    shares = kept.iter_batches(1)
    next(shares)
    dataset.tensors = (torch.zeros(5),)
    assert next(shares).batch[0].tolist() == [0, 0]
    with pytest.raises(IndexError):
        next(shares)
    assert sums(kept, 2) == [0, 0, 0]
    dataset.tensors = (torch.ones(5), torch.ones(5))
    assert [len(share.batch) for share in kept.iter_batches(3)] == [2, 2, 2]


def test_data_that_grow_beyond_the_memory_are_read_on_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    dataset = TensorDataset(torch.ones(4))
    kept = view(DataLoader(dataset, 2, pin_memory=True), kept=store(free=1000))
    assert sums(kept, 1) == [2, 2]
    dataset.tensors = (torch.ones(400),)
    assert len(sums(kept, 2)) == 200
    assert "no longer fit" in caplog.text
    other = TensorDataset(torch.ones(4))
    asked = view(DataLoader(other, 2), kept=store(asked=True, free=1000))
    assert sums(asked, 1) == [2, 2]
    other.tensors = (torch.ones(400),)
    with pytest.raises(UsageError, match=r"cannot be kept on cpu\. Use data_on_device=auto"):
        sums(asked, 2)


def rows(**options: Any) -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(4, 2)), 2, **options)


class Squares(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        return tuple(part**2 for part in super().__getitem__(index))


def stacked(samples: Any) -> Any:
    return torch.stack([sample[0] for sample in samples])


REFUSED = [
    (rows(num_workers=2), "num_workers=2, and its workers would have nothing to do. Set num_workers=0"),
    (rows(collate_fn=stacked), r"its collate_fn \(stacked\) makes the batches. Remove the collate_fn"),
    (DataLoader(Squares(torch.ones(4)), 2), "the samples of its Squares are made by the dataset's own code"),
    (DataLoader([torch.ones(2)] * 4, 2), "the samples of its list are made"),
    ([torch.ones(2, 2)], "it is a list, and no DataLoader over a TensorDataset"),
    (DataLoader(TensorDataset(torch.ones(4, requires_grad=True)), 2), "requires a gradient.*clone"),
    (DataLoader(TensorDataset(torch.ones(4).to_sparse()), 2), "is not plain"),
    (DataLoader(TensorDataset(torch.ones(50_000)), 2), r"0\.2 MB do not fit into the 0\.1 MB that are free"),
]


@pytest.mark.parametrize(("loader", "words"), REFUSED)
def test_what_would_be_passed_over_is_refused_by_name_or_left_alone(loader: Any, words: str) -> None:
    with pytest.raises(
        UsageError, match=rf"data_on_device=true: the train loader's data.*{words}.*data_on_device=auto"
    ):
        view(loader, kept=store(asked=True, free=100_000))
    left = view(loader, kept=store(free=100_000))
    assert left.on_device.startswith("not train: ")
    assert torch.equal(_first(left), _first(view(loader)))


def _first(found: ShardedLoader) -> torch.Tensor:
    batch = next(found.iter_batches(1)).batch
    return (batch[0] if isinstance(batch, list) else batch).detach().to_dense()


def test_auto_takes_a_tenth_of_what_is_free_and_counts_shared_data_once() -> None:
    whole = TensorDataset(torch.ones(1000))  # 4,000 bytes
    parts = [DataLoader(Subset(whole, range(n)), 2) for n in (800, 200)]
    assert [view(part, kept=store(free=39_000)).on_device.split(":")[0] for part in parts] == ["not train"] * 2
    one = store(free=41_000)
    assert [view(part, kept=one).on_device for part in parts] == ["train (0.0 MB)"] * 2
    assert "10% of the 0.0 MB" in view(DataLoader(TensorDataset(torch.ones(1000)), 2), kept=one).on_device


def test_on_the_cpu_there_is_nothing_of_it() -> None:
    assert device_store("auto", CPU) is None
    assert device_store(False, CPU) is None
    with pytest.raises(UsageError, match=r"needs a CUDA GPU, and this rank computes on cpu\. Use data_on_device=auto"):
        device_store(True, CPU)
    assert view(rows()).on_device == ""
    with pytest.raises(UsageError, match="data_on_device = 'yes': should be 'auto', True or False"):
        RunOptions(data_on_device="yes")  # type: ignore[arg-type]


def test_the_dry_run_says_what_would_be_done() -> None:
    loaders = {"train": rows(), "valid": rows(num_workers=1)}
    how: dict[str, Any] = {"fetch_batches": True}
    assert dry_words(False, loaders, cpu=False, **how) == "no"
    assert dry_words("auto", loaders, cpu=True, **how) == "no: ranks compute on the CPU"
    assert "refused" in dry_words(True, loaders, cpu=True, **how)
    assert dry_words("auto", loaders, cpu=False, **how) == (
        "train, if 10% of its free memory holds 0.0 MB; not valid: num_workers=1, and its workers would have nothing "
        "to do"
    )
    assert "refused: valid" in dry_words(True, loaders, cpu=False, **how)
