"""Epochs of so many optimizer steps, which go on with the data: what one plain loop computes, on any number of ranks."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Dtrain
from helpers.ranks import run_ranks
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

import dtrain
from dtrain.config import load_settings
from dtrain.distributed.world import World, bring_up
from dtrain.engine.loop import Engine
from dtrain.engine.position import Limits
from dtrain.engine.train_step import Task
from dtrain.rundir.history import read_history
from dtrain.trainer.plan import make_plan
from dtrain.trainer.setup import load_task
from dtrain.trainer.train import train_run

RECIPE = """
import itertools
import torch
from torch import nn, optim
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset


def data(n, seed):
    draw = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 4, generator=draw).double(), torch.randint(3, (n,), generator=draw))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data(21, 0))


def build_model(dropout: float = 0.0):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(dropout)).double()


def build_dataloaders(kind: str = "indices"):
    loaders = {
        "indices": lambda: DataLoader(data(21, 0), 6),
        "shuffled": lambda: DataLoader(data(21, 0), 6, shuffle=True),
        "stream": lambda: DataLoader(Stream(), 6),
        "iterator": lambda: itertools.chain.from_iterable(DataLoader(data(21, 0), 6) for _ in range(9)),
    }
    return loaders[kind](), DataLoader(data(10, 1), 4)


def build_optimizer(model, lr: float = 0.1, steps_per_epoch=None, total_steps=None, epochs=None):
    model.told = [steps_per_epoch, total_steps, epochs]
    return optim.SGD(model.parameters(), lr=lr)


def train_step(model, x, y):
    return cross_entropy(model(x), y)


valid_step = train_step
"""
OWN: dict[str, Any] = {}
exec(RECIPE, OWN)  # noqa: S102 - its own text
STEPS, EPOCHS = 3, 4
KINDS = ("indices", "stream", "iterator")


def start(folder: Path, *words: str, world: World | None = None) -> Path:
    how = [f"run.dir={folder}", "run.name=it", "train.batch=global", *words]
    return train_run(settings(folder, *how), world or bring_up(cpu=True))


def settings(folder: Path, *words: str) -> Any:
    recipe = folder / "steps.py"
    if not recipe.exists():
        recipe.write_text(RECIPE)
    return load_settings(str(recipe), words, {})


def plain(accumulation: int) -> list[tuple[float, float, float]]:
    """One loop by hand: (loss, val_loss, lr) of each epoch; the rate falls by a cosine to the end of the run."""
    torch.manual_seed(3)
    net = nn.Linear(4, 3).double()
    x, y = OWN["data"](21, 0).tensors
    other = OWN["data"](10, 1).tensors
    batches = [(x[at : at + 6], y[at : at + 6]) for at in range(0, 21, 6)]
    groups = [batches[at : at + accumulation] for at in range(0, len(batches), accumulation)]
    endless, rows = itertools.cycle(groups), []
    for step, group in enumerate(itertools.islice(endless, STEPS * EPOCHS)):
        if step % STEPS == 0:
            total, count = 0.0, 0
        net.zero_grad()
        samples = sum(len(part) for _, part in group)
        losses = [cross_entropy(net(inputs), part, reduction="sum") for inputs, part in group]
        (sum(losses) / samples).backward()
        rate = 0.1 * (1 + math.cos(math.pi * step / (STEPS * EPOCHS))) / 2
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.sub_(rate * parameter.grad)
        total, count = total + float(sum(loss.detach() for loss in losses)), count + samples
        if step % STEPS == STEPS - 1:
            rows.append((total / count, float(cross_entropy(net(other[0]), other[1]).detach()), rate))
    return rows


def of_ranks(world: World, folder: str) -> list[int]:
    how = [f"epochs={EPOCHS}", f"epoch_steps={STEPS}", "train.schedule=cosine"]
    for kind in KINDS:
        start(Path(folder), *how, f"kind={kind}", f"run.name={kind}", world=world)
    start(Path(folder), *how, "train.accumulation=2", "run.name=accumulated", world=world)
    start(Path(folder), *how, "kind=shuffled", "model.dropout=0.5", "val_every_steps=2", "run.name=draws", world=world)
    seen: list[int] = []

    def step(model: Any, x: Any, y: Any) -> Any:
        seen.append(int(torch.rand(len(x), 1)[0, 0] * 2**24))
        return cross_entropy(model(x), y)

    net = OWN["build_model"]()
    loader = DataLoader(OWN["data"](21, 0), 6)
    more: dict[str, Any] = {"optimizer": torch.optim.SGD(net.parameters(), lr=0.1), "batch": "global"}
    frame = dtrain.train_model(net, 2, loader, train_step=step, epoch_steps=10, world=world, verbose=False, **more)
    assert len(frame) == 2
    return seen


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """The runs of 1, 2 and 3 ranks: their folder, and what each rank's steps drew."""
    found = {}
    for ranks in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"ranks-{ranks}")
        (folder / "steps.py").write_text(RECIPE)
        found[ranks] = folder, run_ranks(of_ranks, ranks, folder=str(folder))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_rows_are_those_of_a_plain_loop(runs: dict[int, Any], ranks: int) -> None:
    folder, drawn = runs[ranks]
    for name, accumulation in [*((kind, 1) for kind in KINDS), ("accumulated", 2)]:
        frame = read_history(folder / name)
        rows = list(zip(frame["loss"], frame["val_loss"], frame["lr"], strict=True))
        assert [pytest.approx(row, rel=1e-12) for row in rows] == plain(accumulation), name
    alone = read_history(runs[1][0] / "draws")
    several = read_history(folder / "draws")
    assert several[["loss", "val_loss"]].to_numpy() == pytest.approx(alone[["loss", "val_loss"]].to_numpy(), rel=1e-12)
    assert drawn[0] == runs[1][1][0], "rank 0 draws what one process does"
    assert len(set(drawn[0])) == 20, "each pass has its own random numbers, also within an epoch"


def test_a_pass_after_another_has_its_own_order(runs: dict[int, Any], tmp_path: Path) -> None:
    by_passes = start(tmp_path, "kind=shuffled", "epochs=3")  # 4 steps each
    on_end = start(tmp_path, "kind=shuffled", "epochs=2", "epoch_steps=6", "run.name=steps")
    assert read_history(on_end)["val_loss"].iloc[-1] == read_history(by_passes)["val_loss"].iloc[-1]


@pytest.mark.parametrize("words", [["kind=indices"], ["kind=stream"], ["train.max_steps=11"]])
def test_builders_and_the_dry_run_know_the_length(tmp_path: Path, words: list[str]) -> None:
    most = [int(word.partition("=")[2]) for word in words if "max_steps" in word]
    length = [] if most else ["epochs=5"]
    how = settings(tmp_path, "epoch_steps=7", *length, *words)
    task = load_task(how)
    total = most[0] if most else 35
    assert task.module.told == [7, total, -(-total // 7)]
    plan = make_plan(task, how, 1)
    assert (plan.steps_per_epoch, plan.epochs, plan.optimizer_steps) == (7, -(-total // 7), total)


def test_steps_alone_are_enough_for_a_stream_without_a_length(tmp_path: Path) -> None:
    run = start(tmp_path, "kind=stream", "max_steps=10", "checkpoint.every_steps=4")
    frame = read_history(run)
    assert list(frame["epoch"]) == [1]
    assert (run / "checkpoints/epoch-1-step-8").exists() or (run / "checkpoints/epoch-1").exists()
    plan = make_plan(load_task(how := settings(tmp_path, "kind=stream", "max_steps=10")), how, 2)
    assert (plan.steps_per_epoch, plan.epochs, plan.optimizer_steps) == (10, 1, 10)
    with pytest.raises(dtrain.UsageError, match=r"no length.*Also set train\.epochs"):
        start(tmp_path, "kind=stream", "max_steps=10", "limit_batches=2", "run.name=other")


class Told(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(4).double(), torch.tensor(1)

    def set_epoch(self, epoch: int) -> None:
        pass


class Lazy(IterableDataset):
    def __iter__(self) -> Any:
        return iter(OWN["data"](8, 0))


def engine(train: Any, valid: Any, *, step: Any = None, **how: Any) -> Engine:
    net = OWN["build_model"]()
    task = Task(net, step or OWN["train_step"], train, OWN["valid_step"], valid, torch.optim.SGD(net.parameters(), 0.1))
    return Engine(task, bring_up(cpu=True), epochs=3, **{"epoch_steps": 3, **how})


def test_what_could_not_be_right_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told, draw = Told(), torch.Generator()
    with pytest.raises(dtrain.UsageError, match=r"dl_train\.dataset \(Told\) belongs to a validation loader"):
        engine(DataLoader(told, 4), DataLoader(told, 4))
    with pytest.raises(dtrain.UsageError, match=r"\(Generator\) belongs to a validation loader"):
        sampler = RandomSampler(range(8), generator=draw)
        engine(
            DataLoader(Told(), 4, sampler=sampler),
            DataLoader(Told(), 4, sampler=RandomSampler(range(8), generator=draw)),
        )
    few = itertools.chain(DataLoader(OWN["data"](20, 0), 4))
    with pytest.raises(dtrain.DataError, match=r"exhausted after 1 pass and 5 optimizer steps.*an iterator"):
        engine(few, None).fit()

    def idle(model: Any, x: Any, y: Any) -> Any:
        loss = cross_entropy(model(x), y)
        if next(counted) < 2:
            model.optimizer.zero_grad()
            loss.backward()
            model.optimizer.step()
        return loss.detach()

    counted = itertools.count()
    with pytest.raises(dtrain.StepError, match=r"a whole pass over the training data had no optimizer step"):
        engine(DataLoader(OWN["data"](8, 0), 4), None, step=idle).fit()
    for key in ("limit_batches", "overfit_batches"):
        with pytest.raises(dtrain.UsageError, match=f"epoch_steps and {key} both say"):
            settings(tmp_path, "epoch_steps=3", f"{key}=2")
    with pytest.raises(dtrain.UsageError, match="epoch_steps = 0"):
        dtrain.train_model(OWN["build_model"](), 1, [], epoch_steps=0)
    with pytest.raises(dtrain.DataError, match="the train loader yielded no batch"):
        engine(iter([]), None).fit()


def test_limited_batches_of_a_stream_that_begins_anew_are_told(caplog: pytest.LogCaptureFixture) -> None:
    how: dict[str, Any] = {"epoch_steps": None, "limits": Limits(2, None)}
    engine(DataLoader(OWN["data"](20, 0), 4), None, **how)
    assert not caplog.records
    engine(DataLoader(Lazy(), 4), None, **how)
    assert "all epochs have the same first batches" in caplog.text
    assert "train.epoch_steps=2" in caplog.text


def test_killed_in_the_midst_it_is_resumed_to_the_last_bit(tmp_path: Path) -> None:
    (tmp_path / "steps.py").write_text(RECIPE)
    words = ["epoch_steps=5", "kind=stream", "train.batch=global", "model.dropout=0.5", "--steps", 5, "-n", 2]
    done = Dtrain(tmp_path)("check", "resume", "steps.py", *words, CUDA_VISIBLE_DEVICES="")
    assert done.code == 0, done.text
    assert "the same, killed after step" in done.out  # a random one
    assert "equal: samples, losses, weights, optimizer and history, to the last bit, on 2 ranks." in done.out


def test_another_number_of_ranks_within_a_pass_is_refused(tmp_path: Path) -> None:
    start(tmp_path, "epoch_steps=3", "epochs=1", "train.batch=per_rank")
    with pytest.raises(AssertionError, match="exit codes"):
        run_ranks(resumed, 2, folder=str(tmp_path))
    assert len(read_history(tmp_path / "it")) == 1


def resumed(world: World, folder: str) -> None:
    how = ["epoch_steps=3", "epochs=2", "train.batch=per_rank", "checkpoint.change_ranks=true"]
    start(Path(folder), *how, world=world)
