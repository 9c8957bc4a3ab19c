"""What counts optimizer steps follows those that are really taken, equally on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.callbacks import on
from helpers.counted_steps import BATCH, DECAY, SAMPLES, STEPS, STEPS_TAKEN, Net, data, each_second, loss_of, warm_up
from helpers.ranks import run_ranks
from helpers.step_programs import by_dtrain, by_hand, flat, fresh_net
from helpers.sweep import some
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dtrain.distributed.world import bring_up


def on_ranks(function: Any, ranks: int, **arguments: Any) -> list[Any]:
    """One rank is this process."""
    return [function(bring_up(cpu=True), **arguments)] if ranks == 1 else run_ranks(function, ranks, **arguments)


def followed(world: Any, kinds: list[str]) -> list[dict[str, Any]]:
    """Trains with each kind of step, and returns what counted its steps."""
    from dtrain.engine.loop import Engine
    from dtrain.engine.options import RunOptions
    from dtrain.engine.train_step import Task

    found = []
    for kind in kinds:
        net = Net()
        loader = DataLoader(TensorDataset(*data()), BATCH)
        scheduler = warm_up(net.optimizer)
        task = Task(net, STEPS[kind], loader, loss_of, loader, scheduler=scheduler, interval="step")
        engine = Engine(task, world, 2, val_every_steps=3, options=RunOptions(batch="global", ema_decay=DECAY))
        updates: list[int] = []
        told: list[int] = []
        noted = on(
            on_step_end=lambda place, updates=updates: updates.append(place.updates),
            on_save_point=lambda place, told=told: told.append(place.updates),
        )
        engine.callbacks.add(noted)
        engine.fit()
        average = engine.average.weights()
        found.append(
            {
                "updates": engine.place.updates,
                "after": updates,
                "told": told,
                "scheduled": scheduler.last_epoch,
                "lr": [row["lr"] for row in engine.history.rows],
                "validations": [row["step"] for row in engine.validations.rows],
                "weights": flat(net),
                "average": torch.cat([average[name].flatten() for name, _ in net.named_parameters()]).tolist(),
            }
        )
    return found


def followed_by_hand(kind: str) -> dict[str, Any]:
    """The same with plain torch: after each real step of the optimizer that counts, the schedule and the average."""
    net = Net()
    scheduler = warm_up(net.optimizer)
    state: dict[str, Any] = {"updates": 0, "average": [], "rate": 0.0}
    x, y = data()

    def after(*_: Any) -> None:
        weights = [p.detach().clone() for p in net.parameters()]
        before = state["average"] or weights
        state["average"] = [
            w if not state["updates"] else DECAY * a + (1 - DECAY) * w for a, w in zip(before, weights, strict=True)
        ]
        state["updates"] += 1
        state["rate"] = net.optimizer.param_groups[0]["lr"]
        scheduler.step()

    net.optimizer.register_step_post_hook(after)
    if kind == "takes_over":
        net.second.register_step_post_hook(after)
    net.optimizer._opt_called = True
    rates = []
    for _ in range(2):
        for start in range(0, SAMPLES, BATCH):
            STEPS[kind](net, x[start : start + BATCH], y[start : start + BATCH])
        rates.append(state["rate"])
    average = torch.cat([one.flatten() for one in state["average"]]).tolist()
    return {"updates": state["updates"], "lr": rates, "weights": flat(net), "average": average}


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_counts_steps_follows_those_that_are_taken(ranks: int) -> None:
    kinds = list(STEPS)
    by_rank = on_ranks(followed, ranks, kinds=kinds)
    for number, kind in enumerate(kinds):
        expected = followed_by_hand(kind)
        assert expected["updates"] == STEPS_TAKEN[kind]
        for rank in by_rank:
            found = rank[number]
            assert found["updates"] == found["scheduled"] == expected["updates"], kind
            each = 2 if kind == "twice" else 1
            assert found["after"] == list(range(each, expected["updates"] + 1, each)), kind
            half = expected["updates"] // 2
            assert found["told"] == sorted([*found["after"], half, 2 * half]), kind
            np.testing.assert_allclose(found["lr"], expected["lr"], rtol=1e-12, err_msg=kind)
            np.testing.assert_allclose(found["weights"], expected["weights"], rtol=1e-9, err_msg=kind)
            np.testing.assert_allclose(found["average"], expected["average"], rtol=1e-9, err_msg=kind)
        assert by_rank[0][number]["validations"] == {
            "each_second": [3],
            "twice": [4, 6, 10, 12],
            "skips_some": [3],
        }.get(kind, [3, 6]), kind


def ended(world: Any, most: int) -> list[Any]:
    """Trains until so many steps were taken."""
    from dtrain.engine.loop import Engine
    from dtrain.engine.options import RunOptions
    from dtrain.engine.train_step import Task

    found = []
    for kind in ("each_second", "twice"):
        net = Net()
        loader = DataLoader(TensorDataset(*data()), BATCH)
        engine = Engine(Task(net, STEPS[kind], loader), world, 5, max_steps=most, options=RunOptions(batch="global"))
        engine.fit()
        found.append([engine.place.updates, len(engine.history.rows), flat(net)])
    return found


def parted(world: Any) -> list[Any]:
    """An optimizer that steps on one rank alone, from some batch on; and what is told of it."""
    from dtrain.engine.loop import Engine
    from dtrain.engine.options import RunOptions
    from dtrain.engine.train_step import Task
    from dtrain.errors import StepError

    found = []
    for first, every in ((1, None), (4, 3), (6, None)):
        net = Net()
        net.optimizer.param_groups[0]["lr"] = 0.0
        calls: list[int] = []

        def step(model: Any, x: Any, y: Any, calls: list[int] = calls, first: int = first) -> Any:
            calls.append(1)
            model.optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            if world.rank == 0 or len(calls) < first:
                model.optimizer.step()
            return loss.detach()

        loader = DataLoader(TensorDataset(*data()), 4)
        engine = Engine(
            Task(net, step, loader, loss_of, loader),
            world,
            1,
            val_every_steps=every,
            options=RunOptions(batch="global"),
        )
        try:
            engine.fit()
            found.append(["", 0])
        except StepError as error:
            found.append([str(error), len(calls), error.on_all_ranks])
    return found


def left_out(world: Any, why: str) -> dict[str, Any]:
    """Declarative steps of which some are left out: a loss that is not finite, or float16's overflow."""
    from dtrain.engine.loop import Engine
    from dtrain.engine.options import RunOptions
    from dtrain.engine.train_step import Task

    x, y = data()
    net = Net() if why == "nan" else Net().float()
    if why == "nan":
        y[1], y[8] = float("nan"), float("nan")
    else:
        x, y = x.float(), y.float()
    scheduler = warm_up(net.optimizer)
    rates: list[float] = []
    net.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    task = Task(net, loss_of, DataLoader(TensorDataset(x, y * 40), BATCH), scheduler=scheduler, interval="step")
    nan, precision = ("skip", None) if why == "nan" else ("ignore", "fp16")
    engine = Engine(task, world, 3, nan=nan, options=RunOptions(batch="global", precision=precision, ema_decay=DECAY))
    engine.fit()
    return {"updates": engine.place.updates, "rates": rates, "averaged": engine.average.updates, "batches": 12}


def counted(world: Any) -> dict[str, Any]:
    """All three in one group of ranks."""
    return {
        "ended": ended(world, 3),
        "parted": parted(world),
        "left": [left_out(world, w) for w in ("nan", "overflow")],
    }


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, Any]]:
    return run_ranks(counted, 2)


def test_training_ends_after_so_many_real_steps(by_rank: list[dict[str, Any]]) -> None:
    x, y = data()
    expected = Net()
    for number in range(6):
        each_second(expected, x[number % 4 * BATCH :][:BATCH], y[number % 4 * BATCH :][:BATCH])
    for rank in by_rank:
        second, two = rank["ended"]
        assert second[:2] == [3, 2]
        np.testing.assert_allclose(second[2], flat(expected), rtol=1e-9)
        assert two[0] == 4, "the train step in which the limit is reached is taken to its end"


def test_ranks_whose_steps_part_are_told_with_their_counts(by_rank: list[dict[str, Any]]) -> None:
    for rank in by_rank:
        at_once, before_validation, at_the_end = rank["parted"]
        assert "1 on rank 0, 0 on rank 1" in at_once[0]
        assert at_once[1:] == [1, True]
        assert "4 on rank 0, 3 on rank 1" in before_validation[0]
        assert "6 on rank 0, 5 on rank 1" in at_the_end[0]


def test_steps_that_are_left_out_advance_nothing(by_rank: list[dict[str, Any]]) -> None:
    for rank in by_rank:
        for found in rank["left"]:
            taken = found["updates"]
            assert 0 < taken < found["batches"]
            assert taken == found["averaged"] == len(found["rates"])
            np.testing.assert_allclose(found["rates"], [0.05 * (k + 1) / 16 for k in range(taken)], rtol=1e-12)
        assert rank["left"][0]["updates"] == 6


def resumed(world: Any, folder: str, kinds: list[str]) -> list[Any]:
    """Trains without a stop; and stopped, saved and resumed with everything new."""
    from dtrain.checkpoint.folder import Saved
    from dtrain.checkpoint.locate import read, read_saved
    from dtrain.checkpoint.saver import Checkpointer
    from dtrain.checkpoint.state import restore
    from dtrain.config.schema import CheckpointConfig
    from dtrain.engine.loop import Engine
    from dtrain.engine.options import RunOptions
    from dtrain.engine.train_step import Task

    def engine_of(kind: str, epochs: int) -> Engine:
        loader = DataLoader(TensorDataset(*data()), 8)
        return Engine(
            Task(Net(), SWITCHING.get(kind) or STEPS[kind], loader), world, epochs, options=RunOptions(batch="global")
        )

    found = []
    for kind in kinds:
        whole = engine_of(kind, 4)
        whole.fit()
        first = engine_of(kind, 3)
        where = Path(folder) / kind
        keeper = Checkpointer(first, where, CheckpointConfig(asynchronous=False), lambda: {"format": 1})
        keeper.attach()
        first.fit()
        keeper.on_train_end()
        world.gather_json(None)
        saved: Saved = read_saved(where / "epoch-3", 3, None)
        loaded = read(saved.path).loaded()
        again = engine_of(kind, 4)
        restore(again, loaded.weights, loaded.run, loaded.ranks)
        again.fit()
        own = type(again.task.module.optimizer).__name__
        equal = flat(again.task.module) == flat(whole.task.module)
        found.append([kind, equal, sorted(loaded.run["gradients"]), len(loaded.run["optimizers"]), own])
    return found


def switched(net: Any, x: Tensor, y: Tensor) -> Tensor:
    """Declarative; another optimizer from the fourth batch on."""
    net.seen += 1
    if int(net.seen) > 3:
        net.optimizer = net.second
    return loss_of(net, x, y)


def plain(net: Any, x: Tensor, y: Tensor) -> Tensor:
    net.optimizer.zero_grad()
    loss = loss_of(net, x, y)
    loss.backward()
    net.optimizer.step()
    return loss.detach()


SWITCHING = {"switched": switched, "plain": plain}


@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_with_gradients_that_wait_and_other_optimizers(ranks: int, tmp_path: Path) -> None:
    kinds = ["each_second", "takes_over", "two_optimizers", "switched", "plain"]
    names = [name for name, _ in Net().named_parameters()]
    for rank in on_ranks(resumed, ranks, folder=str(tmp_path), kinds=kinds):
        by_kind = {kind: rest for kind, *rest in rank}
        assert by_kind["each_second"] == [True, sorted(names), 1, "SGD"], "nine batches: the last one's gradient waits"
        assert by_kind["takes_over"] == [True, [], 2, "SGD"]
        assert by_kind["two_optimizers"] == [True, [], 2, "SGD"]
        assert by_kind["switched"] == [True, [], 2, "Adam"]
        assert by_kind["plain"] == [True, [], 1, "SGD"]


PROGRAMS = [
    [["zero", "backward", "step"]],
    [["backward", "step", "zero to zeros"]],
    [["zero", "backward", "backward of another", "step"]],
    [["zero", "backward", "step"], ["zero", "backward", "clip", "step"]],
    [["zero", "backward", "clip by data", "step"]],
    [["zero", "backward", "step"], ["zero", "backward", "climb", "zero", "backward", "step"]],
    [["closure"]],
    [["clear", "backward", "step"]],
]


def accumulated(world: Any) -> list[Any]:
    return [by_dtrain(world, fresh_net(), programs, 2) for programs in PROGRAMS]


@pytest.mark.parametrize("ranks", some([2], [3]))
def test_accumulation_on_ranks_is_right_or_refused(ranks: int) -> None:
    for rank in run_ranks(accumulated, ranks):
        for programs, (weights, told) in zip(PROGRAMS, rank, strict=True):
            states = by_hand(fresh_net(), programs, 3 * 2 * ranks)
            right = len(programs) == 1 and programs[0][0] != "clear" and "step" in programs[0]
            right = right and not any("clip" in name for name in programs[0])
            assert bool(told) != right, (programs, told)
            before = states[-1] if right else states[len(programs) - 1]
            if "climb" not in programs[-1]:
                np.testing.assert_allclose(weights, before, rtol=1e-9, err_msg=str(programs))
