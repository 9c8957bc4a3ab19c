"""Steps of every kind on several ranks: right as in one process, or told at the first steps, at any learning rate."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import torch
from helpers import right_steps as _right
from helpers import right_steps_experts as _experts
from helpers import right_steps_more as _more
from helpers import wrong_steps as _wrong
from helpers.commands import Dtrain
from helpers.drift_nets import RIGHT, WRONG, both, distance, in_one_process, mse, on_ranks
from helpers.ranks import run_ranks
from helpers.sweep import FULL
from torch import nn

STEPS = (_right, _more, _experts, _wrong)  # which add themselves to RIGHT and WRONG


def right_steps(world: Any, names: list[str]) -> dict[str, Any]:
    found = {}
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dtrain.engine.loss_form").addHandler(handler)
    for name in names:
        step, how = RIGHT[name]
        try:
            net = on_ranks(world, step, how, 0.05)
            found[name] = told.pop() if told else distance(net, in_one_process(step, how, 0.05))
        except Exception as error:  # noqa: BLE001 - told with its name
            found[name] = f"{type(error).__name__}: {error}"
            break  # the others may wait
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_right_steps_are_as_in_one_process(ranks: int) -> None:
    assert len(RIGHT) >= 40
    for found in run_ranks(right_steps, ranks, names=list(RIGHT)):
        assert {name: how for name, how in found.items() if isinstance(how, str) or how > 1e-9} == {}
        assert list(found) == list(RIGHT)


class SlowStore:
    """A store to which rank 1's values come no sooner than they must, and later than rank 0 looks, where that can be."""

    def __init__(self, store: Any, rank: int) -> None:
        self._store, self._rank = store, rank
        self._set: list[tuple[str, str]] = []
        self._looks = 0

    def set(self, key: str, value: str) -> None:
        if self._rank == 1:
            self._set.append((key, value))
        else:
            self._store.set(key, value)

    def check(self, keys: list[str]) -> bool:
        several = len(keys) > 1
        if several and self._set:
            self._store.wait([f"looked/{self._looks}"])
        for key, value in self._set:
            self._store.set(key, value)
        self._set.clear()
        found: bool = self._store.check(keys)
        if several:
            if self._rank == 0:
                self._store.set(f"looked/{self._looks}", "")
            self._looks += 1
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def right_steps_with_a_slow_store(world: Any, names: list[str]) -> dict[str, Any]:
    from dtrain.model.gradients import completion

    store = SlowStore(completion._get_default_store(), world.rank)
    completion._get_default_store = lambda: store
    return right_steps(world, names)


def test_ranks_that_leave_parameters_out_know_so_however_slow_the_store_is() -> None:
    for found in run_ranks(right_steps_with_a_slow_store, 2, timeout=100, names=["heads_later", "a_part_later"]):
        assert all(how <= 1e-9 for how in found.values()), found
        assert len(found) == 2


def wrong_steps(world: Any, names: list[str]) -> dict[str, Any]:
    from dtrain import DtrainError

    found = {}
    for name in names:
        step, how, _ = WRONG[name]
        calls = []

        def counted(m: Any, x: Any, y: Any, step: Any = step, calls: Any = calls) -> Any:
            calls.append(1)
            return step(m, x, y)

        try:
            on_ranks(world, counted, how, 1e-6)
        except DtrainError as error:
            found[name] = [len(calls), str(error)]
        else:
            found[name] = [len(calls), "was not told"]
    return found


def test_wrong_steps_are_told_at_the_first_ones_however_small_the_learning_rate() -> None:
    assert len(WRONG) >= 20
    for found in run_ranks(wrong_steps, 2, names=list(WRONG)):
        for name, (_, how, told) in WRONG.items():
            steps, text = found[name]
            assert told in text, name
            assert steps <= how.get("at", 2), name


def random_freezing(world: Any, seeds: list[int]) -> list[float]:
    """Each example: random freezing and unfreezing of parts, before, within and after calls, and random kinds of steps."""
    found = []
    for seed in seeds:
        way = random.Random(seed)
        plans = [
            {
                "frozen": [name for name in ("trunk", "one", "two") if way.random() < 0.4][:2],
                "when": way.choice(["before", "always", "between"]),
                "kind": way.choice(["both", "both", "one", "two", "part", "retained", "twice", "none"]),
                "clip": way.random() < 0.3,
            }
            for _ in range(4)
        ]
        plans[0]["kind"] = way.choice(
            ["both", "retained", "part"]
        )  # a run does not begin with a step that does nothing
        length = way.choice([1, 2, 5])  # how long a plan is kept to: DDP is chosen, and given up
        declared = way.random() < 0.3

        def step(m: Any, x: Any, y: Any, plans: Any = plans, length: int = length, declared: bool = declared) -> Any:
            plan = plans[m.count // length % len(plans)]
            m.count += 1
            return planned(m, x, y, plan, declared=declared)

        how: dict[str, Any] = {"adam": way.random() < 0.5}
        net = on_ranks(world, step, how, 0.05)
        found.append(distance(net, in_one_process(step, how, 0.05)))
    return found


def planned(  # noqa: C901
    m: Any, x: Any, y: Any, plan: dict[str, Any], *, declared: bool
) -> Any:
    if plan["when"] != "between":
        for name in ("trunk", "one", "two"):
            getattr(m, name).requires_grad_(name not in plan["frozen"])
    kind = plan["kind"] if not declared or plan["kind"] not in ("retained", "twice", "none") else "both"
    if kind == "none":
        return 0.0
    if kind in ("one", "two"):
        getattr(m, kind).requires_grad_(True)
        loss = mse(m(x, kind), y)
    elif kind == "part":
        m.one.requires_grad_(True)
        loss = mse(m.one(torch.tanh(m.trunk(x))), y)
    else:
        loss = both(m, x, y)
    if declared:
        return loss
    m.optimizer.zero_grad()
    loss.backward(retain_graph=kind == "retained")
    if plan["when"] == "between":
        m.trunk.requires_grad_("trunk" not in plan["frozen"])
    if kind == "retained":
        (0.3 * loss).backward()
    if kind == "twice":
        both(m, x, y, 0.9).backward()
    if plan["clip"]:
        nn.utils.clip_grad_norm_(m.parameters(), 0.1)
    m.optimizer.step()
    return loss.detach()


def test_random_freezing_is_as_in_one_process() -> None:
    seeds = list(range(200 if FULL else 25))
    for found in run_ranks(random_freezing, 2, seeds=seeds):
        assert max(found) < 1e-9, found


ZERO = """
import dtrain, torch
from dtrain.distributed import standing
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

standing._PASS_SECONDS = 1.0


def build_model():
    return nn.Linear(3, 1)


def build_dataloaders():
    return DataLoader(TensorDataset(torch.randn(24, 3)), batch_size=2), None


def build_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=1e-6)


def train_step(model, x):
    model.steps = getattr(model, "steps", 0) + 1
    if model.steps == 3 and dtrain.rank():
        return torch.zeros((), requires_grad=True)
    return model(x).square().mean()
"""


def test_a_loss_without_the_net_on_one_rank_is_told_with_ddp_and_right_without(dtrain: Dtrain) -> None:
    (dtrain.folder / "zero.py").write_text(ZERO)
    done = dtrain("train", "zero.py", "epochs=1", "-n", 2, "--cpu")
    assert done.code == 1, done.text
    assert "in train step 3 rank 1 ran no backward pass that reaches the net" in done.err
    assert "loss = model(x).sum() * 0" in done.err
    assert dtrain("train", "zero.py", "epochs=1", "average=step", "-n", 2, "--cpu").code == 0
