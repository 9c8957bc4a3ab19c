"""A sharded net learns what a whole one does: the history and the weights of one rank with the same global batches."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.callbacks import on
from helpers.ranks import run_ranks
from helpers.sweep import some
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dtrain as library
from dtrain.checkpoint.compat import check_shapes
from dtrain.checkpoint.locate import Parts, find_good, read
from dtrain.checkpoint.saver import Checkpointer
from dtrain.checkpoint.state import restore
from dtrain.checkpoint.tree import flatten
from dtrain.config.schema import CheckpointConfig
from dtrain.distributed.dtensor import is_sharded, local_part, whole_tensor
from dtrain.distributed.fsdp_settings import Sharding
from dtrain.distributed.world import World
from dtrain.engine.callback import Order
from dtrain.engine.loop import Engine
from dtrain.engine.options import RunOptions
from dtrain.engine.train_step import Task
from dtrain.errors import StepError, StopRequested


class Block(nn.Module):
    """The net's repeated part; 5 rows, so that no number of ranks but 1 and 5 cuts it evenly."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5, bias=not norm)  # before BatchNorm its gradient is noise
        self.norm = nn.BatchNorm1d(5) if norm else nn.LayerNorm(5)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + torch.tanh(self.norm(self.linear(x)))


class Net(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.blocks = nn.ModuleList([Block(norm) for _ in range(2)])
        self.last = nn.Linear(5, 1)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def data(n: int, seed: int = 1, dtype: torch.dtype = torch.float64, bad: bool = False) -> TensorDataset:
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    x[3:4] = torch.nan if bad else x[3:4]
    return TensorDataset(x, x.sum(1, keepdim=True) ** 2)


def loss_of(model, x, y):
    return model.loss_func(model(x), y)


def imperative(model, x, y):
    model.optimizer.zero_grad()
    loss = loss_of(model, x, y)
    loss.backward()
    if model.own_clip:
        nn.utils.clip_grad_norm_(model.parameters(), model.own_clip)
    model.optimizer.step()
    return loss.item()


def again(model, x, y):
    """Calls the net twice, the second time with what came of the first; and counts in its own way."""
    once = model(x)
    loss = loss_of(model, x * once.tanh(), y)
    return {"loss": library.Mean(loss * len(x), len(x)), "calls": float(model.blocks[0].calls > 0)}


def looking(model, x, y):
    """Looks at its predictions before the optimizer's step, and after it."""
    model.optimizer.zero_grad()
    loss = loss_of(model, x, y)
    loss.backward()
    with torch.no_grad():
        before = loss_of(model, x, y)
    model.optimizer.step()
    with torch.no_grad():
        return {"loss": loss.detach(), "before": before, "after": loss_of(model, x, y)}


def part(model, x, y):
    return model.loss_func(model.last(model.first(x)), y)


def penalised(model, x, y):
    return loss_of(model, x, y) + 0.1 * sum(p.square().sum() for p in model.parameters())


STEPS = {"declarative": loss_of, "imperative": imperative, "again": again, "looking": looking}
STEPS |= {"part": part, "penalised": penalised}


def engine_of(world: World, case: dict[str, Any]) -> Engine:
    torch.manual_seed(3 + world.rank * case.get("other_start", 0))
    dtype = torch.float32 if "precision" in case else torch.float64
    net = Net(case.get("norm", False)).to(dtype)
    net.loss_func, net.own_clip = nn.functional.mse_loss, case.get("own_clip")  # type: ignore[assignment]
    for name in case.get("frozen", ()):
        net.get_submodule(name).requires_grad_(False)
    groups = [
        {"params": [p for p in net.parameters() if p.requires_grad and p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in net.parameters() if p.requires_grad and p.ndim == 1], "weight_decay": 0.0},
    ]
    maker = getattr(torch.optim, case.get("optimizer", "AdamW"))
    net.optimizer = maker(groups, lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(net.optimizer, 2, 0.5) if case.get("schedule") else None
    valid = case.get("valid", 7)
    return Engine(
        Task(
            net,
            STEPS[case["kind"]],
            DataLoader(data(case.get("n", 14), 1, dtype, bad="nan" in case), batch_size=6, shuffle=True),
            loss_of,
            DataLoader(data(valid, 2, dtype), batch_size=3) if valid else None,
            scheduler=schedule,
            interval="step",
        ),
        world,
        epochs=2,
        sharding=None
        if case.get("whole")
        else Sharding(case.get("modules"), None, case.get("reshard", True), case.get("validate_whole", True)),
        nan=case.get("nan", "stop"),
        options=RunOptions(
            batch="global",
            accumulation=case.get("accumulation", 1),
            clip_norm=case.get("clip_norm"),
            clip_value=case.get("clip_value"),
            ema_decay=case.get("ema"),
            sync_batchnorm=case.get("norm", False),
            precision=case.get("precision"),
        ),
    )


def rows_of(engine: Engine) -> list[list[float]]:
    times = ("seconds", "samples_per_second")
    return [[value for name, value in row.items() if name not in times] for row in engine.history.rows]


def trained(world: World, cases: list[dict[str, Any]]) -> list[Any]:
    """One rank: for each case the history, and the weights in the end; each rank has a part of them alone."""
    found = []
    for case in cases:
        engine = engine_of(world, case)
        if "refused" in case:  # on several ranks
            with pytest.raises(StepError, match=case["refused"]):
                engine.fit()
            continue
        engine.fit()
        net = engine.task.module
        if world.size > 1:
            assert all(is_sharded(p) for p in net.parameters())
            whole = sum(p.numel() for p in net.parameters())
            assert sum(local_part(p).numel() for p in net.parameters()) < 0.7 * whole, "each rank has its part"
            assert isinstance(net, Net) and net.optimizer is engine.task.optimizer
        averages = {} if engine.average is None else engine.average.weights()
        state = {**net.state_dict(), **{f"average {name}": value for name, value in averages.items()}}
        numbers = {name: whole_tensor(value).tolist() for name, value in state.items()}
        found.append([rows_of(engine), numbers])
    return found


CASES: list[dict[str, Any]] = [
    {"kind": "declarative", "valid": 1, "clip_norm": 0.3, "ema": 0.8, "schedule": True},
    {"kind": "imperative", "valid": 2, "clip_value": 0.01, "accumulation": 3, "frozen": ["first", "blocks.0"]},
    {"kind": "again", "valid": 7, "norm": True, "accumulation": 2, "optimizer": "Adagrad", "modules": []},
    {"kind": "imperative", "own_clip": 0.2, "optimizer": "RMSprop", "modules": ["Block", "last"], "reshard": False},
    {"kind": "declarative", "valid": 0, "n": 2, "ema": 0.5, "other_start": 1},
    {"kind": "imperative", "valid": 5, "norm": True, "ema": 0.5, "validate_whole": False},
    {"kind": "declarative", "nan": "skip", "valid": 1, "validate_whole": False},
    {"kind": "looking", "valid": 4, "ema": 0.5},
    {"kind": "imperative", "precision": "bf16"},
    {"kind": "declarative", "precision": "fp16", "clip_norm": 0.5},
]


REFUSED = [
    {"kind": "imperative", "own_clip": 0.2, "accumulation": 2, "refused": "changes the gradients after backward"}
]


def closeness(case: dict[str, Any]) -> dict[str, Any]:
    """How equal the numbers of two runs are."""
    if "precision" in case:
        return {"rtol": 0.05, "atol": 0.02}
    # Of float64, too, torch's BatchNorm takes the running mean in float32.
    return {"rtol": 1e-6, "atol": 1e-6} if "norm" in case else {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(scope="module")
def alone() -> list[Any]:
    (found,) = run_ranks(trained, 1, cases=CASES)
    assert len({str(rows) for rows, _ in found}) == len(CASES), "each case is another one"
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_sharded_net_learns_what_a_whole_one_does(ranks: int, alone: list[Any]) -> None:
    for found in run_ranks(trained, ranks, cases=CASES + REFUSED):
        for case, (rows, weights), (rows_alone, weights_alone) in zip(CASES, found, alone, strict=True):
            close = closeness(case)
            first = 2 if "nan" in case else 0  # the mean loss leaves out the samples of the rank with the bad one alone
            here, there = (np.array(one)[:, first:] for one in (rows, rows_alone))
            np.testing.assert_allclose(here, there, err_msg=str(case), **close)
            if case.get("precision") == "fp16":
                continue  # which of the first steps overflow, and are left out, depends on the ranks
            for name, values in weights.items():
                np.testing.assert_allclose(values, weights_alone[name], err_msg=f"{case} {name}", **close)


def gone_on(world: World, jobs: list[dict[str, Any]]) -> list[Any]:
    """One rank: the runs of each job, one after the other; then copies of their folder, for others."""
    found = []
    for job in jobs:
        found.append([run_in(Path(job["folder"]), world, case) for case in job["cases"]])
        if world.is_main:
            for copy in job.get("copies", ()):
                shutil.copytree(job["folder"], copy)
        world.gather_json(None)
    return found


def run_in(folder: Path, world: World, case: dict[str, Any]) -> list[Any]:
    """A run that resuming from what is in its folder and is saved there; its rows, and all of its state in the end."""
    engine = engine_of(world, case)
    good = find_good(folder / case["name"]) if world.is_main else None
    if world.gather_json(good is not None)[0]:
        loaded = (Parts() if good is None else read(good.saved.path)).shared(world).loaded()
        check_shapes(engine, loaded)
        engine.history.rows = list(loaded.run["rows"])
        restore(engine, loaded.weights, loaded.run, loaded.ranks)
    policy = CheckpointConfig(every_epochs=case.get("every_epochs", 0), asynchronous=case.get("asynchronous", True))
    keeper = Checkpointer(engine, folder / case["name"], policy, lambda: {"format": 1, "ranks": world.size})
    keeper.attach()

    def stop(at: Any) -> None:
        if at.updates == case.get("stop_at"):
            raise RuntimeError("killed") if case.get("killed") else StopRequested("saved")

    engine.callbacks.add(on(Order.LAST, on_save_point=stop))
    try:
        engine.fit()
    except (RuntimeError, StopRequested) as error:
        assert str(error) in ("killed", "saved") and case.get("stop_at")
    keeper.on_train_end()
    named = {"net": engine.task.module.state_dict(), "by": engine.learner.optimizers()[0].state_dict()}
    state = {name: whole_tensor(value).tolist() for name, value in flatten(named, "")[1].items()}
    return [rows_of(engine), state]


RESUMED: list[dict[str, Any]] = some(
    [
        {"kind": "declarative", "valid": 5, "ema": 0.7, "schedule": True, "accumulation": 2},
        {"kind": "imperative", "valid": 5, "norm": True, "optimizer": "Adagrad", "asynchronous": False},
    ],
    [{"kind": "declarative", "valid": 5, "optimizer": "RAdam", "modules": []}],
)


@pytest.mark.parametrize("ranks", some([3], [2]))
def test_a_resumed_run_equals_one_that_was_not_and_other_ranks_go_on_with_it(ranks: int, tmp_path: Path) -> None:
    """To the last bit on the same number of ranks; on others, and with whole nets, as exact as floating point is."""
    uncut = [{**case, "name": f"uncut-{n}"} for n, case in enumerate(RESUMED)]
    within = [{**case, "name": f"within-{n}", "stop_at": 1} for n, case in enumerate(RESUMED)]
    killed = [
        {**case, "name": f"killed-{n}", "stop_at": 4 // case.get("accumulation", 1), "every_epochs": 1, "killed": True}
        for n, case in enumerate(RESUMED)
    ]
    ends = [{**case, "stop_at": None} for case in within + killed]
    same, begun, whole, fewer, alone = (str(tmp_path / name) for name in ("same", "begun", "whole", "fewer", "alone"))
    jobs = [
        {"folder": same, "cases": uncut + within + killed, "copies": [whole, fewer, alone]},
        {"folder": same, "cases": ends},
        {"folder": whole, "cases": [{**case, "whole": True} for case in ends]},
        {"folder": begun, "cases": [{**case, "whole": True} for case in within]},
        {"folder": begun, "cases": ends[: len(within)]},
    ]
    found = run_ranks(gone_on, ranks, jobs=jobs)
    expected = found[0][0][: len(RESUMED)] * 2
    assert all(rank[1] == expected for rank in found)
    others = {"gone on whole": found[0][2], "begun whole": found[0][4]}
    for name, count, folder in (("fewer", 5 - ranks, fewer), ("alone", 1, alone)):
        others[name] = run_ranks(gone_on, count, jobs=[{"folder": folder, "cases": ends}])[0][0]
    for name, runs in others.items():
        for case, (rows, state), (rows_uncut, state_uncut) in zip(ends, runs, expected, strict=False):
            close = closeness(case)
            np.testing.assert_allclose(rows, rows_uncut, err_msg=f"{name} {case}", **close)
            for key, values in state.items():
                np.testing.assert_allclose(values, state_uncut[key], err_msg=f"{name} {case} {key}", **close)
