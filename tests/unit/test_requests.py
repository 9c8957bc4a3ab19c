"""Requests to stop, in one process: the handler only sets a flag, however it is called."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
from torch.utils.data import DataLoader

from dtrain.launch.requests import STOP_SIGNALS, StopRequest, hear_no_more, hear_signals
from dtrain.launch.shield import shielded


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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
    assert woken.wait(30)
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
        os.kill(os.getpid(), signal.SIGTERM)
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
    process.join(10)
    assert process.exitcode == 0
    batches._shutdown_workers()
