"""Requests to stop, in one process: the handler only sets a flag, however it is called."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.running import wait_for
from torch.utils.data import DataLoader

from dtrain.launch.monitor.processes import catches
from dtrain.launch.signals.shield import shielded
from dtrain.launch.signals.stop_request import (
    STOP_SIGNALS,
    CtrlC,
    StopRequest,
    hear_no_more,
    hear_signals,
    is_ctrl_c,
    prepare_stop_request,
    write_stop_request,
)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def test_the_first_request_counts_and_others_change_nothing() -> None:
    told: list[str] = []
    request = StopRequest(tell=told.append)
    hear_signals(request)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
        signal.raise_signal(number)
    assert (request.by, told) == ("SIGUSR1", ["SIGUSR1"])
    assert request.numbers == [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGINT]
    hear_no_more()
    signal.raise_signal(signal.SIGTERM)
    assert len(request.numbers) == 4


def test_a_second_ctrl_c_ends_at_once_where_it_is_this_process_that_hears_it() -> None:
    request = StopRequest(impatient=True)
    hear_signals(request)
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)  # a launcher passed the terminal's on
    request._when -= 1
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_handler_that_interrupts_itself_and_its_waiter_blocks_nothing() -> None:
    request = StopRequest()
    hear_signals(request)
    woken = threading.Event()

    def wait() -> None:
        request.wait(60)
        woken.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    for _ in range(1000):
        os.kill(os.getpid(), signal.SIGTERM)
    assert woken.wait(60)
    waiter.join()
    assert len(request.numbers) > 0


def test_what_was_ignored_stays_ignored_and_other_threads_hear_nothing() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    thread = threading.Thread(target=hear_signals, args=[StopRequest()])
    thread.start()
    thread.join()
    before = signal.getsignal(signal.SIGTERM)
    request = StopRequest()
    hear_signals(request)
    assert signal.getsignal(signal.SIGTERM) != before
    signal.raise_signal(signal.SIGUSR1)
    assert request.by is None


def test_a_process_that_was_forked_off_does_not_speak() -> None:
    told: list[str] = []
    request = StopRequest(tell=told.append)
    hear_signals(request)
    child = os.fork()
    if child == 0:
        for number in (signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)
        os._exit(0 if not told and request.by is None else 1)
    assert os.waitpid(child, 0)[1] == 0


class Pids:
    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> int:
        return os.getpid()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_outlive_the_signals_of_others_and_obey_their_own_process(context: str) -> None:
    def init(_worker: int) -> None:
        raise AssertionError

    assert shielded(init) is init, "a process that hears no requests leaves its workers as they are"
    hear_signals(StopRequest())
    loader = DataLoader(
        Pids(), batch_size=1, num_workers=1, worker_init_fn=shielded(None), multiprocessing_context=context
    )
    batches = iter(loader)
    worker = int(next(batches))
    stranger = os.fork()
    if stranger == 0:  # a sender that is not the worker's parent
        for number in STOP_SIGNALS:
            if context == "fork" or number != signal.SIGTERM:
                os.kill(worker, number)
        os._exit(0)
    os.waitpid(stranger, 0)
    assert {int(pid) for pid in batches} == {worker}
    del batches
    batches = iter(loader)
    next(batches)
    process = batches._workers[0]
    process.terminate()
    process.join(60)
    assert process.exitcode == 0
    batches._shutdown_workers()


_TAKEN = {
    "default": (lambda number: signal.signal(number, signal.SIG_DFL), "the default action (SIG_DFL)"),
    "ignored": (lambda number: signal.signal(number, signal.SIG_IGN), "ignoring them (SIG_IGN)"),
    "function": (lambda number: signal.signal(number, _own_handler), f"_own_handler ({__file__}:"),
    "builtin": (lambda number: signal.signal(number, signal.default_int_handler), "_signal.default_int_handler"),
    "object": (lambda number: signal.signal(number, _Odd()), "a _Odd"),
    "blocked": (lambda number: signal.pthread_sigmask(signal.SIG_BLOCK, [number]), "by pthread_sigmask"),
    "below Python": (lambda number: _native(number, ctypes.cast(_LIBC.abs, ctypes.c_void_p)), "libc"),
    "ignored below Python": (lambda number: _native(number, 1), "below Python"),
    "default below Python": (lambda number: _native(number, 0), "below Python"),
}
_LIBC = ctypes.CDLL(None)


def _native(number: int, handler: object) -> None:
    _LIBC.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    _LIBC.signal.restype = ctypes.c_void_p
    _LIBC.signal(number, handler)


def _own_handler(_number: int, _frame: object) -> None:
    raise AssertionError("dtrain's is set again before the signal comes")


class _Odd:
    """A handler with nothing that describes it."""

    def __call__(self, *_: object) -> None:
        raise AssertionError("dtrain's is set again before the signal comes")

    def __getattr__(self, name: str) -> object:
        raise RuntimeError(name)


@pytest.mark.parametrize("how", _TAKEN)
@pytest.mark.parametrize("where", ["here", "another thread"])
def test_a_handler_that_was_replaced_is_told_once_and_set_again(
    how: str, where: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtrain.launch.signals.handlers._READ_SECONDS", 0.0)
    take, words = _TAKEN[how]
    request = StopRequest()
    hear_signals(request)
    assert request._handlers is not None
    assert request._handlers.replaced() == {}
    for _ in range(2):
        take(signal.SIGTERM)
        if where == "here":
            request.look()
        else:
            for _ in range(2):  # what is blocked for a moment does not count
                thread = threading.Thread(target=request.look)
                thread.start()
                thread.join()
        wait_for(lambda: not request._handlers.replaced(), "the handler is dtrain's again")  # type: ignore[union-attr]
    os.kill(os.getpid(), signal.SIGTERM)
    wait_for(lambda: request.by == "SIGTERM", "the request")
    (record,) = caplog.records
    assert words in record.message
    assert "dtrain: warning: SIGTERM: " in record.message
    assert "SIGINT" not in record.message


def test_a_signal_that_the_main_thread_blocks_comes_by_another_one() -> None:
    request = StopRequest()
    hear_signals(request)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    listening, done = threading.Event(), threading.Event()

    def listen() -> None:
        request.unblock_signals()
        listening.set()
        done.wait(60)

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        assert listening.wait(60)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: request.by == "SIGTERM", "the request")
    finally:
        done.set()
        thread.join()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def test_a_child_ends_by_a_signal_of_its_own_and_not_by_one_for_all() -> None:
    request = StopRequest()
    hear_signals(request)
    for to_both in (False, True):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
        child.start()
        try:
            wait_for(lambda pid=child.pid: catches(pid, signal.SIGTERM), "the child")  # type: ignore[misc]
            if to_both:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(child.pid or 0, signal.SIGTERM)
                child.join(1)
                assert child.exitcode is None
            else:
                child.terminate()
                child.join(60)
                assert child.exitcode == -signal.SIGTERM
        finally:
            child.kill()
            child.join()


def test_a_supervisor_passes_a_request_on_by_a_file(tmp_path: Path) -> None:
    request = StopRequest(reports=tmp_path)
    request.look()
    prepare_stop_request(tmp_path)
    request.look()
    assert request.by is None
    write_stop_request(tmp_path, "SIGUSR1")
    request.look()
    assert request.by == "SIGUSR1"
    write_stop_request(tmp_path, "SIGTERM")
    request.look()
    assert request.by == "SIGUSR1"


def test_a_persons_ctrl_c_is_told_from_a_keyboard_interrupt_of_the_users_code() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert is_ctrl_c(KeyboardInterrupt())
    hear_signals(StopRequest(impatient=True))
    assert not is_ctrl_c(KeyboardInterrupt())
    assert is_ctrl_c(CtrlC())
    assert not is_ctrl_c(ValueError())
