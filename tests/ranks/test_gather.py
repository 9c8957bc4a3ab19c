"""`dtrain.gather`: losses over all ranks' rows are those of one process, however unequal the ranks' parts are."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import Dtrain
from helpers.ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dtrain as dt
from dtrain.config import load_settings
from dtrain.distributed.world import World, bring_up
from dtrain.errors import StepError
from dtrain.model.gather import PRESENT
from dtrain.rundir.history import read_history
from dtrain.trainer.train import train_run

RECIPE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dtrain

valid_together = True


def build_model():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def build_dataloaders(n: int = 29, m: int = 10, batch_size: int = 8):
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(3)).double()
    data, other = TensorDataset(x), TensorDataset(x[:m])
    return DataLoader(data, batch_size), DataLoader(other, batch_size)


def build_optimizer(model, lr: float = 0.5):
    return torch.optim.SGD(model.parameters(), lr=lr)


# Mean over the queries a, b of this process, against the keys of all.
def contrastive(a, b, all_a, all_b, first):
    queries, keys, n, m = torch.cat([a, b]), torch.cat([all_a, all_b]), len(a), len(all_a)
    own = torch.arange(n) + first
    logits = queries @ keys.T / 0.5
    logits = logits.masked_fill(nn.functional.one_hot(torch.cat([own, own + m]), 2 * m).bool(), -1e9)
    return nn.functional.cross_entropy(logits, torch.cat([own + m, own]))


def embed(model, x):
    return [nn.functional.normalize(model(view), dim=1) for view in (x, x.roll(1, 1))]


def train_step(model, x):
    a, b = embed(model, x)
    (all_a, first), all_b = dtrain.gather(a, with_offset=True), dtrain.gather(b)
    return {"loss": contrastive(a, b, all_a, all_b, first)}


valid_step = train_step
"""


def start(folder: Path, *words: str, world: World | None = None, text: str = RECIPE) -> Path:
    recipe = folder / "gathers.py"
    if not recipe.exists():
        recipe.write_text(text)
    how = [f"run.dir={folder}", "run.name=it", "epochs=3", *words]
    return train_run(load_settings(str(recipe), how, {}), world or bring_up(cpu=True))


def of_ranks(world: World, folder: str, words: list[str]) -> None:
    start(Path(folder), *words, world=world)


def alone(batches: Any, valid: Any, *, steps: int = 1) -> tuple[list[float], list[float]]:
    """The same in one plain process, whose loss is over whole batches."""
    known: dict[str, Any] = {}
    exec(RECIPE, known)  # noqa: S102 - the recipe above
    torch.manual_seed(42)
    model = known["build_model"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        a, b = known["embed"](model, x)
        return known["contrastive"](a, b, a, b, 0)

    train, validated = [], []
    for _ in range(3):
        losses = []
        for group in range(0, len(batches), steps):
            parts = batches[group : group + steps]
            whole = sum(len(part) for part in parts)
            optimizer.zero_grad()
            for part in parts:
                loss = loss_of(part)
                losses.append((loss.item(), len(part)))
                (loss * len(part) / whole).backward()
            optimizer.step()
        train.append(np.average([one for one, _ in losses], weights=[count for _, count in losses]))
        with torch.no_grad():
            validated.append(
                np.average([loss_of(part).item() for part in valid], weights=[len(part) for part in valid])
            )
    return train, validated


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("average", ["ddp", "step"])
def test_it_is_the_loss_of_the_whole_global_batch(tmp_path: Path, ranks: int, average: str) -> None:
    (tmp_path / "gathers.py").write_text(RECIPE)
    words = ["train.batch=global", f"train.average={average}"]
    run_ranks(of_ranks, ranks, folder=str(tmp_path), words=words)
    x = torch.randn(29, 5, generator=torch.Generator().manual_seed(3)).double()
    history = read_history(tmp_path / "it")
    train, valid = alone(x.split(8), x[:10].split(8))
    assert history["loss"].tolist() == pytest.approx(train, rel=1e-10)
    assert history["val_loss"].tolist() == pytest.approx(valid, rel=1e-10), (
        "its last batch has fewer samples than ranks"
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_batches_of_each_rank_and_accumulation(tmp_path: Path, ranks: int) -> None:
    (tmp_path / "gathers.py").write_text(RECIPE)
    words = ["train.batch=per_rank", "train.accumulation=2", "data.batch_size=4"]
    run_ranks(of_ranks, ranks, folder=str(tmp_path), words=words)
    x = torch.randn(29, 5, generator=torch.Generator().manual_seed(3)).double()
    train, valid = alone(x.split(4 * ranks), x[:10].split(4 * ranks), steps=2)
    history = read_history(tmp_path / "it")
    assert history["loss"].tolist() == pytest.approx(train, rel=1e-10)
    assert history["val_loss"].tolist() == pytest.approx(valid, rel=1e-10)


def in_a_script(world: World) -> list[float]:
    known: dict[str, Any] = {}
    exec(RECIPE, known)  # noqa: S102 - the recipe above
    torch.manual_seed(42)
    net = known["build_model"]()
    x = torch.randn(29, 5, generator=torch.Generator().manual_seed(3)).double()
    net, loader = dt.prepare(net, DataLoader(TensorDataset(x), 8), batch="global", cpu=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(3):
        net.train()
        for (part,) in loader:
            optimizer.zero_grad()
            known["train_step"](net, part)["loss"].backward()
            optimizer.step()
    return [float(number) for number in torch.cat([p.detach().flatten() for p in net.parameters()])]


def test_in_a_loop_of_ones_own() -> None:
    one, (two, other) = run_ranks(in_a_script, 1)[0], run_ranks(in_a_script, 2)
    assert two == pytest.approx(one, rel=1e-9)
    assert two == other


def around_loops(world: World, way: str) -> list[float]:
    """What both ranks' rows come to where rank 1's last batch is a filler, and the loop was left there."""
    x = torch.arange(12.0).view(6, 2)
    net, loader, validation = dt.prepare(nn.Linear(2, 1), DataLoader(TensorDataset(x), 2), DataLoader(x, 2), cpu=True)
    rows, learning = torch.full((3,), float(world.rank)), torch.ones(1, requires_grad=True)
    net.train()
    if way == "break":
        for number, _ in enumerate(loader, 1):
            if number == 2:
                break
        with pytest.raises(StepError, match="outside of a step"):
            dt.gather(learning)
        return [float(number) for number in dt.gather(rows)]
    held = iter(loader)
    for _ in range(2):
        next(held)
    assert len(dt.gather(rows)) == 3 * (world.rank + 1), "in the step, where rank 1 has none"
    net.eval()
    for _ in validation:
        with pytest.raises(StepError, match=r"gather the rows after the loop.*\(del it\)"):
            dt.gather(rows)
        break
    assert dt.gather(learning).requires_grad, "it is in the train step again"
    found = [float(number) for number in dt.gather(rows)]
    del held
    assert PRESENT.rank_batch is None
    return found


@pytest.mark.parametrize("way", ["break", "held"])
def test_rows_after_a_loop_that_was_left_are_those_of_all_ranks(way: str) -> None:
    assert run_ranks(around_loops, 2, way=way) == [[0.0] * 3 + [1.0] * 3] * 2


def refused(world: World, folder: str) -> list[str]:
    with pytest.raises(StepError, match="outside of a step"):
        dt.gather(torch.ones(2, requires_grad=True))
    told = [str(dt.gather(torch.full((world.rank, 2), float(world.rank))).tolist())]
    path = Path(folder) / "gathers.py"
    wide = "b = embed(model, x)\n    dtrain.gather(a[:, : 2 + dtrain.rank()])"
    for name, text in (
        ("apart", RECIPE.replace("valid_together = True", "")),
        ("shapes", RECIPE.replace("b = embed(model, x)", wide)),
    ):
        if world.is_main:
            path.with_name(f"{name}.py").write_text(text)
        world.gather_json(0)
        settings = load_settings(
            str(path.with_name(f"{name}.py")), [f"run.dir={folder}", f"run.name={name}", "data.m=24"], {}
        )
        with pytest.raises(StepError) as raised:
            train_run(settings, world)
        told.append(str(raised.value))
    return told


def test_what_would_hang_or_be_wrong_is_refused_on_all_ranks(tmp_path: Path) -> None:
    told = run_ranks(refused, 3, folder=str(tmp_path))
    assert told[0] == told[1] == told[2]
    assert "set valid_together = True in the recipe" in told[0][1]
    assert "rank 0: float64 rows of shape (2,); rank 1: float64 rows of shape (3,); rank 2" in told[0][2]
    assert told[0][0] == "[[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]", "outside of steps, without a gradient"


def after_a_failure(world: World, folder: str) -> bool:
    path = Path(folder) / "fails.py"
    if world.is_main:
        path.write_text(RECIPE.replace("    a, b = embed(model, x)\n", "    raise KeyError\n", 1))
    world.gather_json(0)
    with pytest.raises(KeyError):
        train_run(load_settings(str(path), [f"run.dir={folder}"], {}), world)
    gc.collect()
    return PRESENT.rank_batch is None


def test_a_step_that_fails_leaves_no_weight_behind(tmp_path: Path) -> None:
    assert run_ranks(after_a_failure, 1, folder=str(tmp_path)) == [True]


def test_alone_it_is_the_identity() -> None:
    x = torch.ones(3, requires_grad=True)
    assert dt.gather(x) is x
    assert dt.gather(x, with_offset=True) == (x, 0)
    with pytest.raises(StepError, match=r"shape \(\)"):
        dt.gather(torch.tensor(1.0))


def test_a_switch_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(dt.DtrainError, match="valid_together = 3: should be True or False"):
        start(tmp_path, text=RECIPE.replace("valid_together = True", "valid_together = 3"))
    with pytest.raises(dt.UsageError, match="valid_together"):
        dt.train_model(nn.Linear(1, 1), 1, [], valid_together="yes")


UNEQUAL = """
import torch.distributed as dist


def train_step(model, x):
    rows = model(x)
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.detach())
    return {"loss": (rows - torch.cat(parts).mean(0)).square().mean()}
"""


def test_a_collective_of_unequal_parts_is_told_with_a_way_out(tmp_path: Path, dtrain: Dtrain) -> None:
    (tmp_path / "gathers.py").write_text(RECIPE + UNEQUAL)
    done = dtrain("train", "gathers.py", "--cpu", "-n", 2, "batch=global", "data.batch_size=7", "run.name=it")
    assert done.code == 1
    assert "was killed by SIGABRT" in done.err
    assert "dtrain.gather() takes these" in done.err
