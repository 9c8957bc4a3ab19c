"""A tracker in its thread: each row once, from the history where it is missing, and an end in a bounded time."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import pytest
from helpers.running import wait_for

from dtrain.callbacks.tracking import threaded
from dtrain.callbacks.tracking.base import RunEnd
from dtrain.callbacks.tracking.threaded import Threaded


class Slow:
    name = "slow"
    has_rows = False

    def __init__(self, at: str = "", error: Exception | None = None) -> None:
        self.at, self.error = at, error
        self.go = threading.Event()
        self.seen: list[Any] = []

    def _do(self, what: str) -> None:
        if what == self.at:
            if self.error is not None:
                raise self.error
            self.go.wait(30)
        self.seen.append(what)

    def load(self) -> bool:
        return False

    def start(self) -> str:
        self._do("start")
        return "id-1"

    def last_epoch(self) -> int:
        return 2 if self.has_rows else 0

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._do(f"log {step}")

    def finish(self, end: RunEnd) -> None:
        self._do("finish")


def started(backend: threaded.Backend, rows: int = 0) -> Threaded:
    tracker = Threaded(backend, rows=[{"epoch": epoch} for epoch in range(1, rows + 1)], remedy="dtrain sync runs/it")
    tracker.begin()
    return tracker


def test_a_thread_gets_all_in_order_and_not_what_it_has() -> None:
    backend = Slow()
    backend.has_rows = True
    tracker = started(backend)
    for epoch in (2, 3):
        tracker.log_epoch({"epoch": epoch})
    tracker.log_steps({"step/loss": 1.0}, 40)
    tracker.finish(RunEnd())
    assert (backend.seen, tracker.run_id()) == (["start", "log 3", "log 40", "finish"], "id-1")


@pytest.mark.parametrize("at", ["start", "log 1", "finish"])
def test_a_tracker_that_fails_is_told_of_once(at: str, caplog: pytest.LogCaptureFixture) -> None:
    tracker = started(Slow(at, OSError("no route to host\nand more")))
    for epoch in (1, 2):
        tracker.log_epoch({"epoch": epoch})
    tracker.finish(RunEnd())
    (record,) = caplog.records
    assert record.message == (
        "slow: tracking stopped: OSError: no route to host. Training continues; history.csv has everything."
    )


def test_a_tracker_that_hangs_keeps_the_end_for_a_bounded_time(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threaded, "_FINISH_SECONDS", 0.1)
    monkeypatch.setattr(threaded, "_MOST", 4)
    backend = Slow("log 1")
    tracker = started(backend)
    tracker.log_epoch({"epoch": 1})
    for step in range(2, 20):
        tracker.log_steps({"step/loss": 1.0}, step)  # never waits, and fills no memory
    tracker.log_epoch({"epoch": 20})
    tracker.finish(RunEnd())
    assert [r.message for r in caplog.records] == [
        "slow: it is slower than values come: 4 of them wait, and further ones within epochs are not sent until there "
        "is room. Training continues, and every epoch's row is sent.",
        "slow: not everything was sent: no answer within 0.1 s",
    ]
    backend.go.set()
    tracker._thread.join(30)
    assert backend.seen == ["start", "log 1", "log 2", "log 3", "log 4", "log 20", "finish"], "rows are never left out"


class Server:
    """Keeps rows; and is away at some calls: before it takes what it gets, or after, when only the answer is lost."""

    name = "server"

    def __init__(self, away: dict[int, str] | None = None, has: int = 0) -> None:
        self.away, self.calls = away or {}, 0
        self.rows: list[int] = list(range(1, has + 1))
        self.moments: list[int] = []
        self.ended: RunEnd | None = None
        self.hangs = threading.Event()

    def _call(self, take: Any = lambda: None) -> None:
        self.calls += 1
        away = self.away.get(self.calls, "")
        if away == "hangs":
            self.hangs.wait(30)
        if away == "refuses":
            raise ConnectionError("Connection refused")
        take()
        if away == "times out":
            raise TimeoutError("no answer")

    def load(self) -> bool:
        return True

    def start(self) -> str:
        self._call()
        return "id-1"

    def last_epoch(self) -> int:
        self._call()
        return max(self.rows, default=0)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        kept = self.rows if "epoch" in values else self.moments
        self._call(lambda: kept.append(step))

    def finish(self, end: RunEnd) -> None:
        self._call(lambda: setattr(self, "ended", end))


def test_rows_that_a_killed_run_did_not_send_come_from_the_history() -> None:
    backend = Server(has=2)
    tracker = started(backend, rows=4)
    tracker.log_epoch({"epoch": 5})
    tracker.finish(RunEnd())
    assert backend.rows == [1, 2, 3, 4, 5]
    assert backend.ended == RunEnd()


@pytest.mark.parametrize("how", ["refuses", "times out"])
@pytest.mark.parametrize("call", range(1, 7))
def test_a_server_that_was_away_gets_each_row_once(
    call: int, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(threaded, "_AGAIN_SECONDS", 0.001)
    monkeypatch.setattr(threaded, "_LAST_PAUSE_SECONDS", 0.001)
    backend = Server({call: how, call + 1: "refuses"})
    tracker = started(backend, rows=2)
    tracker.log_steps({"step/loss": 1.0}, 40)
    tracker.log_epoch({"epoch": 3})
    wait_for(lambda: backend.rows[-1:] == [3] and backend.calls > call + 2, "the server has what it shall have", 10)
    tracker.finish(RunEnd())
    assert backend.rows == [1, 2, 3]
    assert backend.moments[-1] == 40
    offline = [r.message for r in caplog.records if "offline" in r.message]
    assert len(offline) == 1, "it is said once"
    assert "Training continues, and all values are kept" in offline[0]
    assert backend.ended == RunEnd()


def test_an_end_that_fails_once_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(threaded, "_LAST_PAUSE_SECONDS", 0.001)
    backend = Server({4: "refuses"})
    tracker = started(backend, rows=1)
    wait_for(lambda: backend.rows == [1], "the row is there", 10)
    tracker.finish(RunEnd())
    assert backend.ended == RunEnd()
    assert not [record for record in caplog.records if "not everything" in record.message]


def test_a_server_that_is_absent_costs_a_bounded_time_and_the_remedy_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also while it hangs at the very start: what the library takes to load is over by then."""
    waited: list[float | None] = []
    join = threading.Thread.join
    monkeypatch.setattr(threading.Thread, "join", lambda self, timeout=None: waited.append(timeout) or join(self, 0.1))
    for away in ("hangs", "refuses"):
        backend = Server(dict.fromkeys(range(1, 9), away))
        tracker = started(backend, rows=1)
        assert tracker._ready.wait(10), "before the server has answered"
        tracker.finish(RunEnd())
        assert waited == [10.0]
        waited.clear()
        assert "All values are kept; send them later with: dtrain sync runs/it" in caplog.records[-1].message
        backend.hangs.set()
