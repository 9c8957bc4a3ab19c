"""Sending a call to ranks and bringing its results back, without the ranks."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain.api.spawn.parcel import SYS_PATH, read_parcel, write_parcel
from dtrain.api.spawn.results import check_returnable, read_results, write_results
from dtrain.api.spawn.surroundings import Surroundings
from dtrain.errors import UsageError
from dtrain.launch.terminal.notebook_relay import Relay

THIS = sys.modules[__name__]


@pytest.fixture(autouse=True)
def by_value() -> Any:
    """What this module defines is taken along like a notebook's."""
    cloudpickle.register_pickle_by_value(THIS)
    yield
    cloudpickle.unregister_pickle_by_value(THIS)


# --- there and back -----------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)
        self.two.weight = self.one.weight
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("grows", torch.zeros(1))
        self.register_buffer("passing", torch.zeros(2), persistent=False)


def sent(folder: Path, **arguments: Any) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """The arguments as a rank has them, and what changes, there and here."""
    here = write_parcel(folder, dict, arguments)
    assert json.loads((folder / SYS_PATH).read_text()) == sys.path
    with warnings.catch_warnings():  # a rank takes this process's filters over
        function, got, there = read_parcel(folder)
    assert function is dict
    return got, there, here


def train(net: nn.Module, optimizer: Any, scheduler: Any = None) -> None:
    """Changes all that training may change."""
    optimizer.zero_grad()
    for number, parameter in enumerate(net.parameters(), 1):
        parameter.grad = torch.full_like(parameter, number)
    optimizer.step(lambda: torch.tensor(1.0))
    if scheduler is not None:
        scheduler.step()
    net.norm.running_mean.add_(3.0)
    net.passing.add_(1.0)
    net.grows = torch.ones(5)
    net.eval()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=np.float64(0.1)),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.LBFGS(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
    ],
    ids=["AdamW", "SGD", "LBFGS", "Adagrad"],
)
def test_all_that_training_changes_comes_back_in_place(tmp_path: Path, make: Callable[..., Any]) -> None:
    net = Tied()
    optimizer = make(net.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = {name: id(p) for name, p in net.named_parameters()}
    got, there, here = sent(tmp_path, model=net, optimizer=optimizer, scheduler=scheduler)
    assert got["optimizer"].param_groups[0]["params"][0] is got["model"].one.weight is got["model"].two.weight
    assert got["scheduler"].optimizer is got["optimizer"]
    with pytest.warns(UserWarning, match="overridden"):  # a rank is told not to
        train(got["model"], got["optimizer"], got["scheduler"])
    rows = [{"epoch": 1, "loss": 0.1 + 0.2, "val_loss": float("inf"), "n": np.float64(1 / 3)}]
    write_results(tmp_path, rows, there)
    assert read_results(tmp_path, here) == rows
    assert {name: id(p) for name, p in net.named_parameters()} == before
    assert optimizer.param_groups[0]["params"][0] is net.one.weight
    assert not net.training
    assert not net.norm.training
    for (name, one), other in zip(
        [*net.named_parameters(), *net.named_buffers()],
        [*got["model"].parameters(), *got["model"].buffers()],
        strict=True,
    ):
        assert torch.equal(one, other), name
    assert net.grows.tolist() == [1.0] * 5
    assert net.passing.tolist() == [1.0] * 2
    assert scheduler.last_epoch == 1
    assert optimizer.param_groups[0]["lr"] == 0.05
    torch.testing.assert_close(optimizer.state_dict(), got["optimizer"].state_dict(), rtol=0, atol=0)


def test_a_lazy_layer_that_has_seen_its_first_batch_comes_back(tmp_path: Path) -> None:
    net = nn.LazyLinear(2)
    got, there, here = sent(tmp_path, model=net)
    got["model"](torch.ones(1, 3))
    write_results(tmp_path, [], there)
    read_results(tmp_path, here)
    assert torch.equal(net.weight, got["model"].weight)
    assert torch.equal(net(torch.ones(4, 3)), got["model"](torch.ones(4, 3)))


def test_tensors_that_share_memory_are_sent_once_and_stay_so(tmp_path: Path) -> None:
    whole = torch.arange(500_000.0)
    got, _, _ = sent(tmp_path, train=TensorDataset(whole[:300]), valid=TensorDataset(whole[300:]))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2.2e6
    got["train"].tensors[0].untyped_storage()[0] = 1
    assert got["train"].tensors[0].untyped_storage().data_ptr() == got["valid"].tensors[0].untyped_storage().data_ptr()


def test_loaders_are_sent_whatever_they_have_begun(tmp_path: Path) -> None:
    from dtrain.data.loader import ShardedLoader
    from dtrain.data.partition import ShardSpec

    own = torch.Generator().manual_seed(3)
    mine = DataLoader(TensorDataset(torch.arange(8)), 2, shuffle=True, generator=own)
    begun = DataLoader(TensorDataset(torch.arange(8)), 2, shuffle=True, num_workers=1, persistent_workers=True)
    next(iter(begun))
    assert begun._iterator is not None
    dealt = DataLoader(TensorDataset(torch.arange(8)), 2, shuffle=True)
    list(ShardedLoader(dealt, ShardSpec(0, 1, "global", fill=False), 0, "valid").iter_batches(1))
    try:
        got, there, here = sent(tmp_path, mine=mine, begun=begun, dealt=dealt)
    finally:
        begun._iterator._shutdown_workers()
    assert got["begun"]._iterator is None
    assert got["dealt"].sampler.generator.of_dtrain
    first = [batch[0].tolist() for batch in got["mine"]]
    write_results(tmp_path, [], there)
    same = torch.Generator().manual_seed(3)
    assert first == [batch[0].tolist() for batch in DataLoader(mine.dataset, 2, shuffle=True, generator=same)]
    read_results(tmp_path, here)
    assert torch.equal(own.get_state(), same.get_state())


def test_the_settings_of_this_process_hold_in_a_rank_too() -> None:
    def patterns() -> list[Any]:
        return [tuple(getattr(part, "pattern", part) or "" for part in one) for one in warnings.filters]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "some words", DeprecationWarning, "a_module", 3)
        warnings.simplefilter("error", UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        before, here = patterns(), Surroundings.here()
        warnings.resetwarnings()
        torch.use_deterministic_algorithms(False)
        here.restore()
        try:
            assert patterns()[1:] == before
            assert torch.is_deterministic_algorithms_warn_only_enabled()
        finally:
            torch.use_deterministic_algorithms(False)


class Odd(torch.optim.lr_scheduler.LRScheduler):
    def __init__(self, optimizer: Any) -> None:
        self.shape = [lambda step: 1.0]
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [0.1]


def test_a_state_that_cannot_come_back_is_refused_by_name() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    check_returnable([optimizer, nn.Linear(1, 1)])
    with pytest.raises(
        UsageError, match=r"Odd\.state_dict\(\)\['shape'\]\[0\] is a function, which cannot be returned"
    ):
        check_returnable([Odd(optimizer)])


# --- what cannot be sent ------------------------------------------------------------------------------

LOCK = threading.Lock()


class Slotted:
    __slots__ = ("lock",)

    def __init__(self) -> None:
        self.lock = threading.Lock()


class ClassLock:
    lock = LOCK


class Secretive:
    """Sends only a part of itself."""

    def __init__(self) -> None:
        self.lock, self.kept = threading.Lock(), [iter(x for x in [1])]

    def __getstate__(self) -> dict[str, Any]:
        return {"kept": self.kept}


class Refusing:
    def __reduce__(self) -> Any:
        raise RuntimeError("not me")


def uses_global() -> Any:
    return [LOCK for _ in range(1)]


def uses_closure() -> Any:
    log = open("/dev/null", "w")  # noqa: SIM115, PTH123

    def step() -> None:
        print(file=log)

    return step, log


def with_lock(thing: Any) -> Any:
    thing.lock = threading.Lock()
    return thing


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "itself": (threading.Lock, "arg is a _thread.lock, which"),
    "net": (lambda: nn.Sequential(nn.Linear(1, 1), with_lock(nn.Tanh())), "arg[1].lock is a _thread.lock, which"),
    "dict": (lambda: {"acc": [1, threading.Lock()]}, "arg['acc'][1] is a _thread.lock, which"),
    "generator": (lambda: (batch for batch in [1]), "arg is a generator, which"),
    "global": (lambda: uses_global, "arg, through LOCK is a _thread.lock, which"),
    "partial": (lambda: partial(max, key=LOCK), "arg.keywords['key'] is a _thread.lock, which"),
    "method": (lambda: with_lock(nn.Tanh()).forward, "arg.__self__.lock is a _thread.lock, which"),
    "slots": (Slotted, "arg.lock is a _thread.lock, which"),
    "class": (ClassLock, "arg, through its class ClassLock.lock is a _thread.lock, which"),
    "getstate": (Secretive, "arg.kept[0] is a generator, which"),
    "reduce": (Refusing, "test_spawn.Refusing, which cannot be sent to the ranks (not me). Create it where"),
    "dataset": (
        lambda: DataLoader(with_lock(TensorDataset(torch.ones(2))), 2),
        "arg.dataset.lock is a _thread.lock, which",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_sent_is_named_with_the_way_to_it(tmp_path: Path, case: str) -> None:
    make, told = REFUSED[case]
    with pytest.raises(UsageError) as caught:
        write_parcel(tmp_path, dict, {"fine": nn.Linear(1, 1), "arg": make()})
    assert told in str(caught.value)
    assert "or omit num_processes" in str(caught.value)


def test_a_closure_is_named(tmp_path: Path) -> None:
    step, log = uses_closure()
    with log, pytest.raises(UsageError, match=r"arg, through log is a _io\.TextIOWrapper"):
        write_parcel(tmp_path, dict, {"arg": step})


def test_a_module_that_a_rank_does_not_find_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "passing_module.py").write_text("def step(): pass")
    monkeypatch.syspath_prepend(tmp_path)
    write_parcel(tmp_path, dict, {"arg": importlib.import_module("passing_module").step})
    del sys.modules["passing_module"]
    monkeypatch.undo()
    with pytest.raises(UsageError, match="cannot find what the call needs: No module named 'passing_module'"):
        read_parcel(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"the call could not be written to {tmp_path}/none for the ranks: "):
        write_parcel(tmp_path / "none", dict, {"arg": 1})


# --- what ranks print ---------------------------------------------------------------------------------

PRINTS = """
import subprocess, sys
print("one\\ntw\u00f6", flush=True)
print("bar 1\\rbar 2", end="", file=sys.stderr, flush=True)
if {lingers}:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
"""


@pytest.mark.parametrize("lingers", [False, True])
def test_output_is_relayed_by_lines_and_nobody_is_waited_for(monkeypatch: pytest.MonkeyPatch, lingers: bool) -> None:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    relay = Relay()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-X", "utf8", "-c", PRINTS.format(lingers=lingers)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for _ in range(2)
    ]
    try:
        for number, rank in enumerate(ranks):
            relay.add(number, rank)
        while any(rank.poll() is None for rank in ranks):
            relay.wait(0.05)
        relay.close()
    finally:
        for rank in ranks:
            if lingers:
                os.killpg(rank.pid, signal.SIGKILL)
    assert sorted(out.getvalue().splitlines()) == ["[rank 1] one", "[rank 1] tw\u00f6", "one", "tw\u00f6"]
    assert "[rank 1] bar 1\r" in err.getvalue()
    assert err.getvalue().count("bar 2") == 2
    assert all(rank.stdout is not None and rank.stdout.closed for rank in ranks)
