"""What is said of indices out of range, of asserts on a GPU, and of memory that ran out. The GPU is simulated."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from dtrain.distributed import world as world_module
from dtrain.distributed.world import bring_up
from dtrain.engine import passes
from dtrain.engine.callback import Callbacks
from dtrain.engine.device_copy import BatchMover
from dtrain.engine.device_errors import ExplainErrors, Memory
from dtrain.engine.device_memory import Peak, PeakMemory
from dtrain.engine.loop import Engine
from dtrain.engine.options import RunOptions
from dtrain.engine.train_step import Task
from dtrain.errors import notes_of


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 4)
        self.head = nn.Linear(4, 3)
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

    def forward(self, x: Any) -> Any:
        return self.head(self.tokens(x).mean(1))


def engine(step: Any, x: torch.Tensor, y: torch.Tensor, valid: Any = None, **more: Any) -> Engine:
    """Rows of a data set with 3 classes and tokens 0 to 19, in batches of 4, shuffled."""
    loader = DataLoader(TensorDataset(x, y), 4, shuffle=True)
    task = Task(Text(), step, loader, valid, loader if valid else None)
    return Engine(task, bring_up(cpu=True), epochs=1, **more)


def notes(one: Engine, kind: type[BaseException]) -> list[str]:
    with pytest.raises(kind) as raised:
        one.fit()
    return notes_of(raised.value)[1:]


def data(n: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(n * 3).reshape(n, 3) % 20, torch.arange(n) % 3


def learn(model: Any, x: Any, y: Any) -> Any:
    loss = functional.cross_entropy(model(x), y)
    return loss, loss.detach()


def check(model: Any, x: Any, y: Any) -> Any:
    return learn(model, x, y)


@pytest.mark.parametrize("wrong", [3, -1])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_label_out_of_range_is_named_with_its_sample(wrong: int, split: str) -> None:
    x, y = data()
    y[11] = wrong
    step = learn if split == "train" else lambda model, x, y: learn(model, x, y.clamp(0, 2))
    found = notes(engine(step, x, y, valid=check), IndexError)
    assert len(found) == 1
    assert found[0].startswith(f"the label {wrong} of the sample with index 11 in the dataset (row ")
    assert found[0].endswith("is out of range: cross_entropy got scores of 3 classes, so it should be 0 to 2")


@pytest.mark.parametrize("wrong", [20, -4])
def test_a_token_out_of_range_is_named_with_its_embedding(wrong: int) -> None:
    x, y = data()
    x[7, 1] = wrong
    found = notes(engine(learn, x, y), IndexError)
    assert f"the index {wrong} of the sample with index 7 in the dataset" in found[0]
    assert found[0].endswith("is out of range: the embedding tokens has 20 rows, so it should be 0 to 19")


def test_labels_of_every_place_in_a_text_and_those_that_are_ignored() -> None:
    x = torch.zeros(16, 3, dtype=torch.int64)
    y = torch.full((16, 3), -100)
    y[5, 2] = 3
    y[5, 1] = 2

    def step(model: Any, x: Any, y: Any) -> Any:
        scores = model.head(model.tokens(x))
        loss = functional.cross_entropy(scores.reshape(-1, 3), y.reshape(-1))
        return loss, loss.detach()

    found = notes(engine(step, x, y), IndexError)
    assert "the label 3 of the sample with index 5 in the dataset" in found[0]


def test_nothing_is_said_of_other_errors() -> None:
    def own(model: Any, x: Any, y: Any) -> Any:
        raise IndexError("list index out of range")

    def shapes(model: Any, x: Any, y: Any) -> Any:
        return functional.cross_entropy(model(x), y[:2]), 0.0

    assert notes(engine(own, *data()), IndexError) == []
    assert notes(engine(shapes, *data()), ValueError) == []


ASSERT = (
    "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)


@pytest.mark.parametrize("kind", [torch.AcceleratorError, RuntimeError])
def test_an_assert_on_the_gpu_leads_to_a_sample_of_the_last_batches(
    kind: type[RuntimeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "mover_of", lambda *_, **__: BatchMover(torch.device("cpu")))
    monkeypatch.setattr(sys, "argv", ["/usr/bin/dtrain", "train", "recipe.py", "data.api_key=abc", "epochs=3"])
    x, y = data()
    y[9] = 7
    steps = []

    def late(model: Any, x: Any, y: Any) -> Any:
        """Notices a step late that a label was wrong."""
        if steps and steps[-1] > 2:
            raise kind(ASSERT) if kind is RuntimeError else kind(ASSERT, 59)
        steps.append(int(y.max()))
        return learn(model, x, y.clamp(max=2))

    def at_once(model: Any, x: Any, y: Any) -> Any:
        raise kind("CUDA error: an illegal memory access was encountered")

    found = notes(engine(late, torch.cat([x] * 3), torch.cat([y, y.clamp(max=2), y.clamp(max=2)])), kind)
    assert found[0].startswith("the GPU reports errors late: the cause is in train step ")
    assert "printed above (stderr)" in found[1]
    assert f"likely cause, in train step {len(steps)}: batch[1]: the label 7 of the sample with index 9 " in found[2]
    assert found[2].endswith("the last layer, head, has 3 outputs, so it should be 0 to 2")
    assert found[3] == (
        "run it again to see the line, slower: CUDA_LAUNCH_BLOCKING=1 dtrain train recipe.py 'data.api_key=***' epochs=3"
    )
    if kind is RuntimeError:
        other = notes(engine(at_once, *data()), kind)
        assert [one.split(":")[0] for one in other] == [
            "the GPU reports errors late",
            "run it again to see the line, slower",
        ]


def out_of_memory(model: Any, x: Any, y: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_out_of_memory_names_the_peak_and_a_batch_that_keeps_the_global_one() -> None:
    one = engine(out_of_memory, *data(), options=RunOptions(accumulation=3))
    explain = ExplainErrors(one, lambda: Memory(60 << 30, 79 << 30))
    one.callbacks = Callbacks(explain)
    one.train_loader.on_device = "train (2.3 GB)"
    found = notes(one, torch.OutOfMemoryError)
    assert found[0] == "GPU memory: tensors took up to 60.00 GiB of 79.00 GiB"
    assert found[1] == "the data of train (2.3 GB) are kept on the GPU: train.data_on_device=false frees that"
    assert found[2].startswith(
        "try batch_size=2 with train.accumulation=6, which keeps the global batch (now 4 x 3); `dtrain find batch` "
        "finds the largest that fits, below 4; train.precision=bf16"
    )
    found = notes(engine(learn, *data(), valid=out_of_memory), torch.OutOfMemoryError)
    assert found[0].startswith("memory: this rank took up to ")
    assert found[1].startswith("use a smaller batch_size in the validation loader")


@pytest.mark.parametrize(
    ("size", "words"), [(1, "a batch of 1 does not fit"), (9, "batch_size=3 with train.accumulation=3")]
)
def test_the_batch_to_try_divides_the_one_that_there_is(size: int, words: str) -> None:
    x, y = data(18)
    task = Task(Text(), out_of_memory, DataLoader(TensorDataset(x, y), size))
    assert words in notes(Engine(task, bring_up(cpu=True), epochs=1), torch.OutOfMemoryError)[-1]


def test_the_peak_is_a_column_of_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([3 << 20, 5 << 19])
    resets: list[int] = []
    one = engine(learn, *data(), valid=check)
    one.epochs = 2
    one.callbacks.add(PeakMemory(one.world, Peak(lambda: resets.append(1), lambda: next(peaks))))
    rows = one.fit().rows
    assert [row["gpu_memory_mib"] for row in rows] == [3, 2.5]
    assert list(rows[0])[-2:] == ["samples_per_second", "gpu_memory_mib"]
    assert len(resets) == 2


@pytest.mark.parametrize("failed", [False, True])
def test_a_group_of_one_rank_is_always_left(failed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torchrun starts one rank on a GPU, it has a group, and NCCL warns where that was not destroyed."""
    registered: list[Any] = []
    monkeypatch.setattr(world_module.atexit, "register", registered.append)
    bring_up(cpu=True)
    assert registered == [world_module._leave_group]
    monkeypatch.setattr(sys, "last_value", ValueError("a failure"), raising=False)
    if not failed:
        monkeypatch.delattr(sys, "last_value")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        registered[0]()
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
