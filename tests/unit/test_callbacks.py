"""The list of callbacks: its order, what a hook costs that nobody has, and how a run ends for all of them."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.callbacks import on
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain.callbacks.progress import progress_of
from dtrain.distributed.world import bring_up
from dtrain.engine import callback
from dtrain.engine.callback import HOOKS, Callbacks, EngineCallback, Order
from dtrain.engine.loop import Engine
from dtrain.engine.options import RunOptions
from dtrain.engine.train_step import Task
from dtrain.errors import StopRequested, UsageError

DOCS = Path(__file__).resolve().parents[2] / "docs"


def engine_of(*callbacks: EngineCallback, accumulation: int = 1, **how: Any) -> Engine:
    net = nn.Linear(2, 1)
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)  # type: ignore[assignment]

    def step(model: Any, x: Any, y: Any) -> Any:
        loss = (model(x) - y).square().mean()
        return {"loss": loss}

    loader = DataLoader(TensorDataset(torch.ones(6, 2), torch.ones(6, 1)), batch_size=2)
    how |= {"callbacks": Callbacks(*callbacks), "options": RunOptions(accumulation=accumulation)}
    return Engine(Task(net, step, loader, step, loader), bring_up(cpu=True), epochs=1, **how)


def noting(told: list[str], name: str = "", **how: Any) -> EngineCallback:
    """Notes each hook that is called."""

    def note(hook: str) -> Callable[..., Any]:
        return lambda *_args, **_kwargs: told.append(f"{name}{hook}")

    return on(**how, **{hook: note(hook) for hook in (*HOOKS, "close")})


def test_all_hooks_come_in_the_order_that_the_docstring_shows() -> None:
    told: list[str] = []
    engine_of(noting(told), accumulation=2, val_every_steps=1).fit()
    fetched = ["on_fetch_start", "on_fetch_end"]
    valid = ["on_progress", "on_validation_step"]
    within = ["on_pass_start", "on_values_known", *valid, *2 * valid, "on_validation_end"]
    assert told == [
        *("on_train_start", "on_epoch_start", "on_pass_start"),
        *(*fetched, "on_batch_start", "on_step_kind", "on_batch_end", "on_values_known", "on_progress"),
        *(*fetched, "on_batch_start", "on_optimizer_step", "on_batch_end", "on_progress"),
        *("on_step_end", *within, "on_group_end", "on_save_point"),
        *(*fetched, "on_batch_start", "on_optimizer_step", "on_batch_end", "on_progress"),
        *("on_step_end", "on_group_end", "on_save_point"),
        *fetched,
        *("on_train_pass_end", "on_pass_start", "on_values_known", *3 * valid, "on_epoch_row", "on_epoch_end"),
        *("on_group_end", "on_save_point"),
        *("on_train_end", "close"),
    ]
    assert set(HOOKS) - set(told) == {"on_exception"}


def test_at_each_hook_they_are_called_in_the_order_of_the_list() -> None:
    told: list[str] = []
    orders = list(Order)
    callbacks = Callbacks(*[noting(told, f"{order.name} ", order=order) for order in reversed(orders)])
    callbacks.add(noting(told, "second ", order=Order.USER))
    for hook in callbacks.on_epoch_start:
        hook(1)
    expected = [order.name for order in orders]
    expected.insert(expected.index("USER") + 1, "second")
    assert [one.split()[0] for one in told] == expected


def test_the_page_shows_the_order() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `Order\.(\w+)`", text, re.M) == [order.name for order in Order]


def test_a_hook_that_nobody_has_is_not_called() -> None:
    callbacks = Callbacks(on(on_epoch_end=print), EngineCallback(), None)
    assert {name: len(getattr(callbacks, name)) for name in HOOKS if getattr(callbacks, name)} == {"on_epoch_end": 1}
    with callbacks.having(on(on_progress=print)):
        assert len(callbacks.on_progress) == 1
    assert callbacks.on_progress == ()


def calls_a_batch(*callbacks: EngineCallback) -> float:
    """Calls of Python and C functions for one batch more."""
    counts = []
    for batches in (5, 25):
        engine = engine_of(*callbacks)
        engine.task.dl_train = None
        data = TensorDataset(torch.ones(2 * batches, 2), torch.ones(2 * batches, 1))
        fresh = Task(engine.task.module, engine.task.train_step, DataLoader(data, batch_size=2))
        engine = Engine(fresh, engine.world, epochs=1, callbacks=Callbacks(*callbacks))
        calls = [0]

        def note(_frame: Any, event: str, _arg: Any, calls: list[int] = calls) -> None:
            calls[0] += event in ("call", "c_call")

        sys.setprofile(note)
        try:
            engine.fit()
        finally:
            sys.setprofile(None)
        counts.append(calls[0])
    return (counts[1] - counts[0]) / 20


def test_a_callback_costs_a_step_nothing_but_its_own_calls() -> None:
    none = calls_a_batch()
    assert calls_a_batch(on(on_epoch_end=lambda row: None), on(on_train_start=lambda engine: None)) <= none + 1
    assert calls_a_batch(on(on_batch_end=lambda batch, values: None)) <= none + 3  # on() itself calls the function


# --- how it ends


def test_what_a_callback_raises_ends_the_run_and_closes_all() -> None:
    told: list[Any] = []

    def fail(_: Any) -> None:
        raise ValueError("mine")

    heard = on(on_exception=lambda error: told.append(repr(error)), close=lambda: told.append("closed"))
    with pytest.raises(ValueError, match="mine") as raised:
        engine_of(on(on_step_end=fail), heard).fit()
    assert told == ["ValueError('mine')", "closed"]
    assert "epoch 1, train step 1" in str(raised.value.__notes__)


def test_an_error_in_on_exception_does_not_hide_the_first(caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []

    def fail(what: str) -> Any:
        def hook(_: Any) -> None:
            raise ValueError(what)

        return hook

    later = on(Order.LAST, on_exception=lambda error: told.append(str(error)))
    with pytest.raises(ValueError, match="first"):
        engine_of(on(on_step_end=fail("first"), on_exception=fail("second")), later).fit()
    assert told == ["first"]
    assert "second" in caplog.text


@pytest.mark.parametrize("kind", [SystemExit, GeneratorExit, KeyboardInterrupt, StopRequested])
@pytest.mark.parametrize("first", [RuntimeError, StopRequested])
def test_whatever_on_exception_raises_the_checkpoint_is_saved(
    first: type[Exception], kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callback, "is_ctrl_c", lambda _: False)  # a KeyboardInterrupt of the user's own
    told: list[str] = []

    def fail(_: BaseException) -> None:
        raise kind("second")

    callbacks = Callbacks(on(on_exception=fail), noting(told, order=Order.CHECKPOINT))
    with contextlib.suppress(kind):
        callbacks.fail(first("first"))
    assert "on_exception" in told


def test_a_stop_that_cannot_be_saved_is_a_failure_for_all() -> None:
    told: list[str] = []

    def stop(_: Any) -> None:
        raise StopRequested("on request")

    def save(error: BaseException) -> None:
        if isinstance(error, StopRequested):
            raise OSError("no space left")

    hears = on(Order.TRACKERS, on_exception=lambda error: told.append(type(error).__name__))
    with pytest.raises(OSError, match="no space left"):
        engine_of(on(on_save_point=stop), on(Order.CHECKPOINT, on_exception=save), hears).fit()
    assert told == ["StopRequested", "OSError"]


def test_all_are_closed_where_one_cannot_be() -> None:
    told: list[str] = []

    def fail() -> None:
        told.append("first")
        raise OSError("cannot be closed")

    with pytest.raises(OSError, match="cannot be closed"):
        engine_of(on(close=fail), on(close=lambda: told.append("second"))).fit()
    assert told == ["first", "second"]


def test_verbose_takes_a_callback_and_nothing_else() -> None:
    class Old:
        def begin(self, facts: Any) -> None: ...

    with pytest.raises(UsageError, match=r"verbose = <.*Old.*>: should be True, False, or .*dtrain.engine.callback"):
        progress_of(Old(), is_main=True, log_step_freq=1)  # type: ignore[arg-type]
    mine = EngineCallback()
    assert progress_of(mine, is_main=True, log_step_freq=1) is mine
    assert progress_of(mine, is_main=False, log_step_freq=1) is None
