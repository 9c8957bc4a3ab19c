"""The parts of tracking, each by itself: what is kept, what is released when, what leaves."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.callbacks.progress import PassFacts, RunFacts
from dtrain.callbacks.tracking import tracking, wanted
from dtrain.callbacks.tracking.base import RunEnd
from dtrain.callbacks.tracking.files import STEPS, StepLog, Tail, read_json, read_lines
from dtrain.callbacks.tracking.gpu import GpuGauge
from dtrain.callbacks.tracking.tracking import Tracking
from dtrain.callbacks.tracking.values import Values
from dtrain.callbacks.tracking.wandb_run import _table
from dtrain.callbacks.tracking.wandb_tracker import environment
from dtrain.config.schema import MlflowConfig, TrackConfig
from dtrain.engine.metrics import MeanTable
from dtrain.errors import UsageError
from dtrain.layout import TRACKING
from dtrain.rundir.history import History


def written(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "at"} for line in read_lines(run / TRACKING / STEPS)]


def history(run: Path, epochs: int, torn: str = "") -> None:
    rows = "".join(f"{epoch},{epoch / 3},\n" for epoch in range(1, epochs + 1))
    (run / "history.csv").write_text(f"epoch,loss,val_loss\n{rows}{torn}")


# --- what is kept -------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_keeps_what_its_checkpoint_holds(tmp_path: Path) -> None:
    log = StepLog(tmp_path)
    lines: list[dict[str, Any]] = [
        {"updates": 2, "step/loss": 1.0}, {"row": 1, "updates": 3}, {"firm": 1}, {"updates": 5, "step/loss": 0.5},
        {"row": 2, "updates": 6}, {"firm": 2}, {"updates": 8, "step/loss": float("nan")}, {"row": 3, "updates": 9},
    ]  # fmt: skip
    for line in lines:
        log.add(line)
    log.close()
    with (tmp_path / TRACKING / STEPS).open("a") as file:
        file.write('{"updates": 10, "step/lo')  # a kill
    again = StepLog(tmp_path, epochs=2, updates=7)
    again.add({"updates": 8, "step/loss": 0.4})
    again.close()
    assert written(tmp_path) == [*lines[:6], {"updates": 8, "step/loss": 0.4}]
    StepLog(tmp_path, epochs=1, updates=3).close()
    assert written(tmp_path) == lines[:3]


def test_rows_from_before_it_was_tracked_get_their_places(tmp_path: Path) -> None:
    StepLog(tmp_path, epochs=3, updates=10).close()
    assert written(tmp_path) == [
        {"row": 1, "updates": 3}, {"row": 2, "updates": 6}, {"row": 3, "updates": 10}, {"firm": 3},
    ]  # fmt: skip


def test_a_growing_file_gives_whole_lines_once(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "file")
    assert tail.news() == []
    (tmp_path / "file").write_bytes(b"one\ntw")
    assert tail.news() == ["one"]
    with (tmp_path / "file").open("ab") as file:
        file.write(b"o\n\xff\xfe\n")
    assert tail.news()[0] == "two"
    assert tail.news() == []


def test_a_rewritten_file_is_read_from_its_beginning_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    tail, plain = Tail(path, is_rewritten=True), Tail(path)
    path.write_text("head\none\n")
    assert (tail.news(), tail.from_start) == (["head", "one"], True)
    assert plain.news() == ["head", "one"]
    with path.open("a") as file:
        file.write("two\n")
    assert (tail.news(), tail.from_start) == (["two"], False)
    for content in ("heads\none\ntwo\n", "heads\none\n"):  # in place: with another first line, and shorter
        path.write_text(content)
        assert (tail.news(), tail.from_start) == (content.split(), True)
    (tmp_path / "new").write_text("heads\nten\nsix\n")
    (tmp_path / "new").rename(path)
    assert (tail.news(), tail.from_start) == (["heads", "ten", "six"], True)
    assert plain.news()[-1] == "six", "what is after the bytes that it had"


def half(descriptor: int, data: bytes) -> int:
    """A write on a disk that is full after a part of it."""
    return os.pwrite(descriptor, data[: len(data) // 2], os.fstat(descriptor).st_size)


def test_a_line_that_a_full_disk_has_cut_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = StepLog(tmp_path)
    log.add({"row": 1, "updates": 3})
    with monkeypatch.context() as full:
        full.setattr("dtrain.files.os.write", half)
        with pytest.raises(OSError, match="is the disk full"):
            log.add({"updates": 4, "values": {"step/loss": 0.5}})
    log.add({"firm": 1})
    log.close()
    assert written(tmp_path) == [{"row": 1, "updates": 3}, {"firm": 1}]


# --- in which order it is sent ------------------------------------------------------------------------------


def test_values_come_in_their_order_and_a_row_once_it_is_firm(tmp_path: Path) -> None:
    log, values = StepLog(tmp_path), Values(tmp_path)
    log.add({"updates": 2, "at": 5.0, "values": {"step/loss": 1.0}})
    assert [(e.step, e.at, e.values, e.is_row) for e in values.news()] == [(2, 5.0, {"step/loss": 1.0}, False)]
    history(tmp_path, 1)
    log.add({"row": 1, "updates": 3, "at": 6.0})
    log.add({"updates": 4, "at": 7.0, "values": {"step/loss": 0.9}})
    assert values.news() == []  # it might be computed anew
    log.add({"firm": 1})
    assert [(e.step, e.values) for e in values.news()] == [(3, {"epoch": 1, "loss": 1 / 3}), (4, {"step/loss": 0.9})]
    assert (values.rows, values.last) == ([{"epoch": 1, "loss": 1 / 3, "val_loss": None}], 4)
    log.close()


def test_all_that_there_is_holds_also_rows_that_were_not_marked(tmp_path: Path) -> None:
    log = StepLog(tmp_path)
    history(tmp_path, 3, torn="4,0.1")
    for line in ({"row": 1, "updates": 3}, {"row": 2, "updates": 3}, {"firm": 1}):
        log.add(line)
    log.close()
    found = Values(tmp_path).news(everything=True)
    assert [(e.step, e.values["epoch"]) for e in found] == [(3, 1), (4, 2), (5, 3)]  # no two rows in one of W&B's steps
    assert [e.values["epoch"] for e in Values(tmp_path).news()] == [1]


def test_a_column_that_comes_late_gives_each_row_once_and_under_its_own_names(tmp_path: Path) -> None:
    """A hook's column that an epoch is the first to have stands before lr, and has history.csv written anew."""
    rows, log, values = History(tmp_path / "history.csv"), StepLog(tmp_path), Values(tmp_path)
    given: list[dict[str, Any]] = [
        {"epoch": epoch, "loss": 1 / epoch, **({"val_f1": 0.75} if epoch > 2 else {}), "lr": 0.1}
        for epoch in range(1, 5)
    ]
    found: list[dict[str, Any]] = []
    for row in given:
        rows.append(row)
        log.add({"row": row["epoch"], "updates": 10 * row["epoch"], "at": 1.0})
        log.add({"firm": row["epoch"]})
        found += [entry.values for entry in values.news()]
    log.close()
    assert found == given
    assert values.news(everything=True) == []
    assert [list(row) for row in values.rows] == [["epoch", "loss", "val_f1", "lr"]] * 4, "as history.csv has them"
    assert [row["lr"] for row in values.rows] == [0.1] * 4


def test_the_table_at_the_end_has_the_columns_of_all_rows() -> None:
    pytest.importorskip("wandb")
    table = _table([{"epoch": 1, "lr": 0.1}, {"epoch": 2, "lr": 0.1, "val_f1": 0.75}])
    assert table.columns == ["epoch", "lr", "val_f1"]
    assert [list(row) for row in table.data] == [[1, 0.1, None], [2, 0.1, 0.75]]


# --- what the engine tells ----------------------------------------------------------------------------------


class Recorder:
    name = "recorder"

    def __init__(self) -> None:
        self.steps: list[tuple[int, dict[str, float]]] = []
        self.epochs: list[int] = []
        self.ends: list[RunEnd] = []

    def run_id(self) -> str:
        return "r1"

    def log_steps(self, values: Mapping[str, float], step: int) -> None:
        self.steps.append((step, dict(values)))

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        self.epochs.append(row["epoch"])

    def finish(self, end: RunEnd) -> None:
        self.ends.append(end)
        raise RuntimeError("a tracker's own trouble")


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1000.0 + self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(tracking, "time", found)
    return found


def tracked(run: Path, every: float = 1.0) -> tuple[Tracking, Recorder]:
    recorder = Recorder()
    found = Tracking(run, StepLog(run), every=every, device=torch.device("cpu"))
    found.trackers.append(recorder)
    return found, recorder


class Asked(MeanTable):
    """A table that counts how often it was read, which on a GPU waits for the device."""

    times = 0

    def running(self) -> dict[str, float]:
        self.times += 1
        return super().running()


def test_between_two_moments_a_step_is_a_look_at_the_clock(tmp_path: Path, clock: Clock) -> None:
    found, recorder = tracked(tmp_path)
    table = Asked("train")
    updates = iter(range(7, 100))
    run = RunFacts(epochs=1, ranks=2, lr=lambda: 0.5, updates=lambda: next(updates))
    found.on_pass_start(PassFacts("train", 1, samples=lambda: table.samples, run=run))
    for second in (0.0, 0.5, 0.99, 2.0, 2.5, 2.9, 3.0):
        clock.now = 100.0 + second
        table.add({"loss": second}, 4)
        found.on_progress(table)
    assert table.times == 2
    assert [step for step, _ in recorder.steps] == [7, 8]
    first, second = (values for _, values in recorder.steps)
    assert first == {"step/loss": (0.5 + 0.99 + 2.0) / 4, "step/lr": 0.5, "step/samples_per_second": 16 * 2 / 2.0}
    assert second["step/samples_per_second"] == 12 * 2 / 1.0
    assert written(tmp_path) == [{"updates": step, "values": values} for step, values in recorder.steps]
    found.on_pass_start(PassFacts("valid", 1, samples=lambda: table.samples))
    clock.now += 10
    found.on_progress(table)
    assert table.times == 2, "validation's means are told with the epoch's row"
    assert read_json(tmp_path / TRACKING / "ids.json") == {"recorder": "r1"}


def test_a_step_calls_the_clock_and_nothing_else(tmp_path: Path) -> None:
    found, _ = tracked(tmp_path, every=1000.0)
    table = MeanTable("train")
    found.on_pass_start(PassFacts("train", 1))
    calls: list[str] = []

    def note(frame: Any, event: str, arg: Any) -> None:
        if event in ("call", "c_call"):
            calls.append(arg.__name__ if event == "c_call" else frame.f_code.co_name)

    sys.setprofile(note)
    found.on_progress(table)
    sys.setprofile(None)
    assert calls == ["on_progress", "monotonic", "setprofile"]


def test_a_gpu_is_read_as_far_as_it_tells(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert GpuGauge(torch.device("cpu")).read() == {}
    busy: list[int | Exception] = [37, ModuleNotFoundError("pynvml")]

    def utilization(_: torch.device) -> int:
        said = busy.pop(0)
        if isinstance(said, Exception):
            raise said
        return said

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 5 * 2**20)
    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    gauge, memory = GpuGauge(torch.device("cuda", 0)), {"gpu/memory_mib": 3.0, "gpu/memory_peak_mib": 5.0}
    assert gauge.read() == {**memory, "gpu/utilisation_percent": 37.0}
    assert gauge.read() == gauge.read() == memory  # what does not tell once is not asked again


def test_with_epochs_alone_no_step_tells_anything(tmp_path: Path, clock: Clock) -> None:
    found, recorder = tracked(tmp_path, every=0.0)
    found.on_pass_start(PassFacts("train", 1))
    clock.now += 1e6
    found.on_progress(Asked("train"))
    assert recorder.steps == written(tmp_path) == []


def test_a_row_waits_for_the_checkpoint_that_holds_it(tmp_path: Path, clock: Clock) -> None:
    found, recorder = tracked(tmp_path)
    writing = True
    found.settled = lambda: not writing
    found.on_pass_start(PassFacts("train", 1, run=RunFacts(updates=lambda: 3)))
    found.on_epoch_end({"epoch": 1, "loss": 0.5})
    found.on_pass_start(PassFacts("train", 2))
    assert recorder.epochs == []
    assert written(tmp_path) == [{"row": 1, "updates": 3}]
    writing = False
    clock.now += 1
    found.on_progress(Asked("train"))
    assert recorder.epochs == [1]
    writing = True
    found.on_epoch_end({"epoch": 2, "loss": 0.4})
    found.finish(RunEnd())  # and whatever a tracker makes of it, the run ends well
    assert recorder.epochs == [1, 2]
    assert len(recorder.ends) == 1
    assert written(tmp_path)[-1] == {"firm": 2}


def test_a_full_disk_is_told_of_once_and_ends_nothing(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, recorder = tracked(tmp_path)

    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StepLog, "add", lambda _self, line: full(line))
    found.on_pass_start(PassFacts("train", 1))
    found.on_epoch_end({"epoch": 1})
    found.on_epoch_end({"epoch": 2})
    found.finish(RunEnd())
    assert recorder.epochs == [1, 2]
    assert [r.message for r in caplog.records if "cannot be saved" in r.message] == [
        "values for the trackers cannot be saved: [Errno 28] No space left on device"
    ]


def test_ids_that_a_full_disk_does_not_take_end_no_run_and_hide_no_error(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, recorder = tracked(tmp_path)
    closed: list[bool] = []

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def close(_: StepLog) -> None:
        closed.append(True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracking, "write_json", full)
    monkeypatch.setattr(StepLog, "close", close)
    found.on_pass_start(PassFacts("train", 1))
    for _ in range(3):
        clock.now += 10
        found.on_progress(Asked("train"))
    found.finish(RunEnd())
    assert (len(recorder.steps), len(recorder.ends), closed) == (3, 1, [True])
    assert [r.message for r in caplog.records if r.message.endswith("No space left on device")] == [
        f"{tmp_path}/tracking/ids.json cannot be saved: [Errno 28] No space left on device",
        f"{tmp_path}/tracking/end.json cannot be saved: [Errno 28] No space left on device",
        "values for the trackers cannot be saved: [Errno 28] No space left on device",
    ]
    monkeypatch.undo()
    found.note_ids()
    assert read_json(tmp_path / TRACKING / "ids.json") == {"recorder": "r1"}, "it is tried again"


# --- what leaves --------------------------------------------------------------------------------------------


def test_wandbs_client_sees_its_own_part_of_the_environment() -> None:
    given = {
        "HOME": "/home/me", "PATH": "/bin", "WANDB_API_KEY": "k", "WANDB_BASE_URL": "u", "WANDB_RUN_ID": "x",
        "AWS_SECRET": "s", "https_proxy": "p", "DTRAIN_X": "d", "SSL_CERT_FILE": "c", "WANDB_MODE": "offline",
    }  # fmt: skip
    assert environment(given) == {
        "HOME": "/home/me", "PATH": "/bin", "WANDB_API_KEY": "k", "WANDB_BASE_URL": "u", "https_proxy": "p",
        "SSL_CERT_FILE": "c", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true",
    }  # fmt: skip


def test_a_tracker_that_is_not_installed_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wanted, "find_spec", lambda _: None)
    wanted.check_installed(TrackConfig())
    with pytest.raises(UsageError, match=r"track.mlflow is set, and mlflow is not installed: pip install ml"):
        wanted.check_installed(TrackConfig(mlflow=MlflowConfig()))
