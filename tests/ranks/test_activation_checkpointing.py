"""Parts whose forward is computed again in the backward: the same numbers to the last bit, and fewer saved tensors."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.sweep import some
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain.config import load_settings
from dtrain.distributed.world import World, bring_up
from dtrain.engine.loop import Engine
from dtrain.engine.options import RunOptions
from dtrain.engine.train_step import Task
from dtrain.errors import ConfigError, UsageError
from dtrain.model.activation_checkpointing import recompute
from dtrain.trainer.setup import configured_engine, load_task

RECIPES = Path(__file__).parent.parent / "recipes"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 8))
        self.calls = 0

    def forward(self, x: Any, *, scale: float = 1.0) -> Any:
        self.calls += 1
        return x + self.layers(x) * scale


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(x)


def made() -> Net:
    torch.manual_seed(0)
    return Net()


def digest(net: nn.Module) -> str:
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in net.state_dict().values())).hexdigest()


def refused(world: World) -> str:
    """One rank: the words."""
    net = made()
    recompute(net, ["blocks.*"], "test")
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)  # type: ignore[assignment]
    data = DataLoader(TensorDataset(torch.randn(8, 8)), batch_size=4)
    try:
        Engine(
            Task(net, lambda model, x: model(x).mean(), data), world, epochs=1, options=RunOptions(sync_batchnorm=True)
        )
    except UsageError as error:
        return str(error)
    return ""


def trained(world: World, kinds: list[str]) -> list[list[Any]]:
    """One rank: for each kind of step, weights, buffers and history without and with recomputing; calls of a part."""
    x = torch.randn(44, 8, generator=torch.Generator().manual_seed(3))
    found = []
    for kind in kinds:
        for patterns in ([], ["blocks.*"]):
            net = made()
            recompute(net, patterns, "test")
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)

            def train_step(model: Any, x: Any, optimizer: Any = optimizer, kind: str = kind) -> Any:
                loss = (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
                if kind == "imperative" and model.training:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    return loss.item()
                return loss

            data = DataLoader(TensorDataset(x), batch_size=8, shuffle=True)
            task = Task(net, train_step, data, train_step if kind != "imperative" else None, None, optimizer)
            precision = "bf16" if kind == "bf16" else None
            engine = Engine(
                task, world, epochs=2, options=RunOptions(accumulation=2, precision=precision, ema_decay=0.9)
            )
            engine.fit()
            rows = [{k: v for k, v in row.items() if "second" not in k} for row in engine.history.rows]
            found.append([digest(net), rows, net.blocks[0].calls])
    return [*found, refused(world)]


@pytest.mark.parametrize("ranks", some([2], [1]))
def test_numbers_are_the_same_to_the_last_bit(ranks: int) -> None:
    """With dropout, whose numbers are drawn again, and BatchNorm, whose statistics change once."""
    kinds = ["declarative", "imperative", "bf16"]
    for *answer, told in run_ranks(trained, ranks, kinds=kinds):
        assert ("train.activation_checkpointing: blocks.0 has BatchNorm in it" in told) == (ranks > 1)
        for kind, without, with_ in zip(kinds, answer[::2], answer[1::2], strict=True):
            assert without[:2] == with_[:2], kind
            assert with_[2] == 2 * without[2], f"{kind}: each forward of a part is computed twice"


def saved_numbers(net: nn.Module) -> tuple[int, list[torch.Tensor]]:
    """How many numbers are kept for the backward; and the gradients."""
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.data_ptr()] = tensor
        return tensor

    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(7)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net(x).square().sum()
    count = sum(tensor.numel() for tensor in kept.values())
    loss.backward()
    return count, [p.grad for p in net.parameters() if p.grad is not None]


def test_fewer_tensors_are_kept_and_gradients_are_equal() -> None:
    plain, thrifty = made(), made()
    assert recompute(thrifty, ["blocks.*"], "test") == ["blocks.0", "blocks.1", "blocks.2"]
    (much, one), (little, two) = saved_numbers(plain), saved_numbers(thrifty)
    assert little < 0.3 * much
    assert len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert digest(plain) == digest(thrifty), "BatchNorm's statistics"


def test_the_net_stays_as_it_is() -> None:
    plain, net = made(), made()
    net.blocks[1].mine = 5  # type: ignore[assignment]
    recompute(net, ["blocks.1"], "test")
    assert list(net.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in net.named_modules()] == [name for name, _ in plain.named_modules()]
    assert type(net.blocks[1]) is Block and net.blocks[1].mine == 5
    other = copy.deepcopy(net)
    other(torch.randn(4, 8)).sum().backward()
    assert (net.blocks[1].calls, other.blocks[1].calls) == (0, 2), "a copy computes with its own weights"
    assert net.blocks[1].layers[0].weight.grad is None and other.blocks[1].layers[0].weight.grad is not None
    with torch.no_grad():
        net(torch.randn(4, 8))
    assert net.blocks[1].calls == 1


def test_patterns() -> None:
    assert recompute(made(), ["blocks*"], "test") == ["blocks.0", "blocks.1", "blocks.2"], "outermost, no containers"
    assert recompute(made(), ["*.layers.0", "head"], "test")[-1] == "head"
    with pytest.raises(ConfigError, match=r"activation_checkpointing = 'block\.0' \(here\): no module .*'blocks\.0'"):
        recompute(made(), ["blocks.1", "block.0"], "here")


def test_by_config(tmp_path: Path) -> None:
    words = ["train.activation_checkpointing=[layers]", "epochs=1", f"run.dir={tmp_path}"]
    settings = load_settings(str(RECIPES / "resumable.py"), words, {})
    task = load_task(settings)
    configured_engine(task, bring_up(cpu=True), settings, epochs=1).fit()
    assert task.module.layers.forward.__func__.recomputes
    settings = load_settings(str(RECIPES / "resumable.py"), ["train.activation_checkpointing=[layer]"], {})
    with pytest.raises(
        ConfigError, match=r"'layer' \(command line\): no module of the model has this name\..*'layers'"
    ):
        load_task(settings)
