"""dtrain jobs, logs, cancel and requeue, with programs of ours in the place of SLURM's."""

from __future__ import annotations

import json
import re
import shlex
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.running import wait_for
from helpers.slurm_fakes import Slurm, queue_line
from typer.testing import CliRunner

from dtrain.cli import jobs_table
from dtrain.cli.app import app
from dtrain.errors import SlurmError, UsageError
from dtrain.rundir.job_record import JobAttempt, JobRecord, read_record, write_record
from dtrain.slurm import following, orders, runs
from dtrain.slurm.runs import RunJob, find, look

HISTORY = "epoch,loss,acc,val_loss,val_acc,lr,seconds\n1,0.5,0.8,0.4,0.85,0.1,2.0\n2,0.3,0.9,0.25,0.9125,0.1,2.0\n3,0."


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(orders, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(orders, "_SETTLE_SECONDS", 0.5)
    return Slurm(tmp_path / "slurm", monkeypatch)


def make_run(name: str, job: str, *starts: JobAttempt, **more: Any) -> Path:
    run = Path("runs", name)
    write_record(run, JobRecord(job, time.time(), None, None, name, starts, **more))
    (run / "slurm/train.sbatch").write_text("#!/bin/bash\n")
    (run / "history.csv").write_text(HISTORY)
    (run / "config.yaml").write_text("train:\n  epochs: 5\n")
    return run


def start(number: int, job: str, rows: int, **more: Any) -> JobAttempt:
    return JobAttempt(number, job, "n1", time.time() - 60, progress=(0.0, 0.0, rows), **more)


def dtrain(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == code, done.output
    return done.output


class TestJobs:
    def test_what_a_line_tells(self, slurm: Slurm) -> None:
        make_run("b", "7", start(0, "7", 0), start(1, "7", 0), start(2, "7", 2))
        make_run("a", "8_1")
        slurm.answers("squeue", queue_line("7", "RUNNING") + queue_line("8_1", "PENDING", reason="JobArrayTaskLimit"))
        header, *lines = dtrain("jobs").splitlines()
        assert header.split() == list(jobs_table.COLUMNS)
        assert lines[0].split(maxsplit=6) == [
            "7",
            "RUNNING",
            "b",
            "2/5",
            "00:29:59",
            "2",
            "(1 without progress)  val_loss 0.25 val_acc 0.9125",
        ]
        assert (
            lines[1].split(maxsplit=6)[-1]
            == "waits: JobArrayTaskLimit (limit of array tasks running at once); val_loss 0.25 val_acc 0.9125"
        )

    def test_programs_get_all_of_it(self, slurm: Slurm) -> None:
        make_run("b", "7", start(0, "7", 0, ended=time.time(), code=75, why="stopped before the time limit"))
        slurm.answers("squeue", "")
        (row,) = json.loads(dtrain("jobs", "--json"))
        assert (row["job"], row["state"], row["told_by"], row["reason"]) == (
            "7",
            "ended",
            "folder",
            "stopped before the time limit",
        )
        assert (row["epoch"], row["epochs"], row["row"]["val_acc"], row["in_vain"]) == (2, 5, 0.9125, 0)

    def test_without_slurm_the_folders_tell(self, slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
        make_run("b", "7", start(0, "7", 0))
        monkeypatch.setenv("PATH", "/nowhere")
        told = dtrain("jobs")
        assert "last seen on n1" in told
        assert "SLURM is not on this machine" in told

    def test_those_that_ended_long_ago_are_shown_on_request(self, slurm: Slurm) -> None:
        long_ago = time.time() - 90_000
        make_run("old", "6", JobAttempt(0, "6", "n1", long_ago, long_ago, 0, "complete"))
        assert "1 that ended more than a day ago: show with --all" in dtrain("jobs")
        assert "complete" in dtrain("jobs", "--all")
        assert "complete" in dtrain("jobs", "old")

    def test_a_terminals_table_is_no_wider_than_it(self, slurm: Slurm) -> None:
        make_run("a-rather-long-name-of-a-run-with-a-grid-of-values-0", "123456_17", start(0, "9", 0))
        slurm.answers("squeue", queue_line("123456_17", "PENDING", reason="ReqNodeNotAvail, May be reserved"))
        rows = [jobs_table.row_of(one) for one in look(Path("runs"), needed_for="").all]
        lines = re.sub(r"\x1b\[[0-9;]*m", "", jobs_table.as_table(rows, 80)).splitlines()
        assert max(len(line) for line in lines) <= 80
        assert "123456_17" in lines[1]

    def test_a_damaged_record_hides_no_other_run(self, slurm: Slurm) -> None:
        make_run("b", "7")
        make_run("c", "8")
        Path("runs/b/slurm/job.json").write_text("{")
        told = dtrain("jobs")
        assert "runs/b/slurm/job.json: is not a job record" in told
        assert "\n8 " in told

    def test_a_script_submitted_by_hand_is_its_runs_job(self, slurm: Slurm) -> None:
        run = make_run("b", "7", start(0, "7", 0, ended=1.0, code=1))
        script = str((run / "slurm/train.sbatch").resolve())
        slurm.answers("squeue", queue_line("9", "RUNNING", script=script) + queue_line("10", "RUNNING"))
        assert [(one.id, one.name) for one in look(Path("runs"), needed_for="").all] == [("9", "b")]

    def test_a_job_of_another_folder_of_runs_is_found_in_the_queue(self, slurm: Slurm) -> None:
        for task in range(2):
            write_record(Path("far away", f"g-{task}"), JobRecord(f"8_{task}"))
        write_record(Path("far away", "over"), JobRecord("3"))
        states = ("COMPLETED", "PENDING", "PENDING")
        script = str(Path("far away/g-0/slurm/train.sbatch").resolve())
        slurm.answers("squeue", "".join(queue_line(f"8_{i}", state, script=script) for i, state in enumerate(states)))
        found = look(Path("runs"), needed_for="").all
        assert [(one.id, one.name) for one in found] == [("8_0", "g-0"), ("8_1", "g-1")]  # 8_2 is not known to be a run
        assert found[0].handle == shlex.quote(str(Path("far away/g-0").resolve()))


class TestNames:
    def test_numbers_names_and_folders(self, slurm: Slurm) -> None:
        for task in range(3):
            make_run(f"grid-{task}", f"8_{task}")
        (make_run("one", "12") / "slurm/job-7.out").write_text("as job 7\n")
        lines = [
            queue_line("8_0", "RUNNING", number="9"),
            queue_line("8_2", "RUNNING", number="8"),
            queue_line("30", "RUNNING"),
        ]
        slurm.answers("squeue", "".join(lines))
        known = look(Path("runs"), needed_for="")

        def ids(name: str) -> list[str]:
            return [one.id for one in find(name, known)]

        assert ids("8") == ["8_0", "8_1", "8_2"]  # though one of them has this number by itself
        assert ids("9") == ids("grid-0") == ids("runs/grid-0") == ids(str(Path("runs/grid-0").resolve())) == ["8_0"]
        assert ids("8_1") == ["8_1"]
        assert ids("7") == ids("12") == ids("one") == ["12"]  # what it was before
        assert ids("30") == ["30"]  # no run of ours
        assert "as job 7" in dtrain("logs", "7")
        with pytest.raises(UsageError, match=r"gird-1: no such job or run\. Did you mean 'grid-1'\?"):
            find("gird-1", known)
        Path("runs/plain").mkdir()
        with pytest.raises(UsageError, match=r"has no slurm/job\.json"):
            find("plain", known)


class TestCancel:
    def test_one_that_waits_leaves_the_queue(self, slurm: Slurm) -> None:
        make_run("b", "7")
        slurm.answers("squeue", queue_line("7", "PENDING"))
        slurm.changes("scancel", "")  # so it is with a task of an array
        assert "dtrain requeue b" in dtrain("cancel", "b")
        assert "7    cancelled  b" in dtrain("jobs")
        assert slurm.calls("scancel") == ["scancel 7"]

    def test_one_that_runs_saves_first(self, slurm: Slurm) -> None:
        run = make_run("b", "7", start(0, "7", 0))
        slurm.answers("squeue", queue_line("7", "RUNNING"))
        assert "asked to save" in dtrain("cancel", "7")
        assert (run / "slurm/cancel").exists()
        assert slurm.calls("scancel") == ["scancel --batch --signal=USR1 7"]

    @pytest.mark.parametrize("starts", [[], [start(0, "7", 0, ended=1.0)], [start(1, "7", 0)], [start(0, "6", 0)]])
    def test_one_that_has_only_just_started_would_die_of_the_request(
        self, slurm: Slurm, starts: list[JobAttempt]
    ) -> None:
        run = make_run("b", "7", *starts)
        slurm.answers("squeue", queue_line("7", "RUNNING"))
        dtrain("cancel", "7")
        dtrain("requeue", "7")
        assert slurm.calls("scancel", "scontrol") == ["scancel 7", "scontrol requeue 7"]
        assert not (run / "slurm/cancel").exists()

    def test_one_that_starts_meanwhile_saves_first(self, slurm: Slurm) -> None:
        run = make_run("b", "7", start(0, "7", 0))
        slurm.answers("squeue", queue_line("7", "PENDING"))
        slurm.changes("scancel", queue_line("7", "RUNNING"))
        dtrain("cancel", "7")
        assert slurm.calls("scancel") == ["scancel 7", "scancel --batch --signal=USR1 7"]
        assert (run / "slurm/cancel").exists()

    def test_an_arrays_waiting_tasks_go_first(self, slurm: Slurm) -> None:
        states = ("RUNNING", "PENDING", "PENDING", "COMPLETED")
        for task in range(4):
            make_run(f"g-{task}", f"8_{task}", start(0, "8", 0))
        slurm.answers("squeue", "".join(queue_line(f"8_{i}", state) for i, state in enumerate(states)))
        slurm.changes(
            "scancel", "".join(queue_line(f"8_{i}", "CANCELLED") for i in (1, 2)) + queue_line("8_0", "RUNNING")
        )
        told = dtrain("cancel", "8")
        assert slurm.calls("scancel") == ["scancel 8_1 8_2", "scancel --batch --signal=USR1 8_0"]
        assert "8_3 (run g-3): has already ended (COMPLETED)" in told

    def test_slurm_may_pass_a_tasks_signal_on_and_deny_it(self, slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(orders, "_SIGNAL_SECONDS", 0.2)
        make_run("g", "8_1", start(0, "8", 0))
        make_run("b", "7", start(0, "7", 0))
        slurm.answers("squeue", queue_line("8_1", "RUNNING") + queue_line("7", "RUNNING"))
        slurm.hangs("scancel")
        assert "asked to save" in dtrain("cancel", "8_1")
        assert "scancel did not answer" in dtrain("cancel", "7", code=1)

    def test_at_once(self, slurm: Slurm) -> None:
        make_run("b", "7")
        slurm.answers("squeue", queue_line("7", "RUNNING") + queue_line("9", "RUNNING"))
        dtrain("cancel", "7", "9", "--now")
        assert slurm.calls("scancel") == ["scancel 7 9"]
        assert "Use --now" in dtrain("cancel", "9", code=2)  # no run of ours: nothing would save

    def test_nothing_is_done_where_slurm_does_not_answer(self, slurm: Slurm) -> None:
        make_run("b", "7")
        slurm.fails("squeue", "Unable to contact slurm controller")
        assert "Nothing was changed" in dtrain("cancel", "7", code=1)
        slurm.answers("squeue", queue_line("7", "PENDING"))
        slurm.fails("scancel", "Access denied")
        assert "Access denied" in dtrain("cancel", "7", code=1)


class TestRequeue:
    def test_one_that_runs_saves_and_starts_again(self, slurm: Slurm) -> None:
        run = make_run("b", "7", start(0, "7", 0))
        (run / "slurm/cancel").touch()
        slurm.answers("squeue", queue_line("7", "RUNNING"))
        dtrain("requeue", "7")
        assert slurm.calls("scancel", "scontrol") == ["scancel --batch --signal=USR1 7"]
        assert not (run / "slurm/cancel").exists()

    def test_one_that_slurm_still_has_goes_back_into_the_queue(self, slurm: Slurm) -> None:
        run = make_run("b", "8_1", start(0, "9", 0), start(1, "9", 0))
        (run / "slurm/cancel").touch()
        slurm.answers("squeue", queue_line("8_1", "CANCELLED", number="8"))
        dtrain("requeue", "b")
        assert slurm.calls("scontrol", "sbatch") == ["scontrol requeue 8_1"]  # 8 would be the whole array
        assert not (run / "slurm/cancel").exists()
        record = read_record(run)
        assert record is not None
        assert (record.job, record.forgiven) == ("8_1", 2)

    @pytest.mark.parametrize(
        ("old", "new", "options"), [("8_1", "44_1", " --array=1"), ("8", "44", "")], ids=["array", "single"]
    )
    def test_one_that_slurm_has_forgotten_is_submitted_again(
        self, slurm: Slurm, old: str, new: str, options: str
    ) -> None:
        run = make_run("b", old, start(0, "8", 0))
        record = read_record(run)
        assert record is not None
        write_record(run, replace(record, output=f"/x/job-{old}.out", folder=str(slurm.folder)))
        slurm.answers("sbatch", "Welcome to this cluster!\n44;main\n")
        assert "submitted again as job 44" in dtrain("requeue", "b")
        script = (run / "slurm/train.sbatch").resolve()
        assert slurm.calls("sbatch") == [f"sbatch --parsable{options} {script}"]
        assert slurm.called_in("sbatch") == slurm.folder
        record = read_record(run)
        assert record is not None
        assert (record.job, record.output, record.forgiven) == (new, f"/x/job-{new}.out", 1)

    def test_refusals(self, slurm: Slurm) -> None:
        run = make_run("b", "7")
        slurm.answers("squeue", queue_line("7", "PENDING", reason="Resources"))
        assert "is already pending: Resources (no free nodes)" in dtrain("requeue", "b")
        slurm.answers("squeue", queue_line("7", "CANCELLED"))
        (run / "config.yaml").write_text("train:\n  epochs: 2\n")
        assert "is complete" in dtrain("requeue", "b", code=2)
        (run / "STOP").touch()
        assert "runs/b/STOP" in dtrain("requeue", "b", code=2)
        assert slurm.calls("scontrol", "sbatch") == []


class TestLogs:
    def failed(self) -> Path:
        run = make_run("b", "7")
        (run / "logs").mkdir()
        (run / "logs/rank-1.log").write_bytes(b"of rank 1 \xff\n")
        (run / "slurm/job-7.out").write_text("of the job\n")
        failure = {
            "rank": 1,
            "host": "n2",
            "epoch": 2,
            "step": 7,
            "phase": "train",
            "cause": "exception",
            "device": "cpu",
        }
        failure |= {
            "exception": {"type": "ValueError", "message": "boom"},
            "traceback": "Traceback:\n  mine.py, line 3",
        }
        (run / "failure.json").write_text(
            json.dumps(failure | {"others": {"0": "terminated by dtrain", "2": "terminated by dtrain"}})
        )
        return run

    def test_a_failed_jobs_report_comes_with_its_output(self, slurm: Slurm) -> None:
        self.failed()
        slurm.answers("squeue", queue_line("7", "FAILED"))
        told = dtrain("logs", "7")
        for words in (
            "of the job\n",
            "mine.py, line 3\n",
            "rank 1: ValueError: boom\n",
            "epoch 2, train step 7, on n2",
            "ranks 0, 2: terminated",
        ):
            assert words in told
        slurm.answers("squeue", queue_line("7", "COMPLETED"))
        assert "boom" not in dtrain("logs", "7")

    def test_a_ranks_own(self, slurm: Slurm) -> None:
        self.failed()
        slurm.answers("squeue", queue_line("7", "RUNNING"))
        assert "of rank 1" in dtrain("logs", "b", "--rank", "1")
        assert "logs of ranks 1." in dtrain("logs", "b", "--rank", "4", code=2)

    def test_one_that_waits_says_why(self, slurm: Slurm) -> None:
        make_run("b", "7")
        slurm.answers("squeue", queue_line("7", "PENDING", reason="Resources"))
        assert "job 7 (run b) waits: Resources (no free nodes)" in dtrain("logs", "7")

    def test_of_an_array_one_task_is_wanted(self, slurm: Slurm) -> None:
        for task in range(2):
            make_run(f"g-{task}", f"8_{task}")
        assert "8_0 (g-0), 8_1 (g-1)" in dtrain("logs", "8", code=2)

    def test_following_passes_all_on_and_ends_with_the_job(self, slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("_LOOK_SECONDS", "_ASK_SECONDS", "_LATE_SECONDS"):
            monkeypatch.setattr(following, name, 0.01)
        run = make_run("b", "7")
        path = run / "slurm/job-7.out"
        slurm.answers("squeue", queue_line("7", "PENDING", reason="Resources"))
        (one,) = look(Path("runs"), needed_for="").all

        def refreshed(jobs: list[RunJob], **more: Any) -> list[RunJob]:
            (now,) = runs.refreshed(jobs, **more)
            if now.is_over:  # what a node wrote last comes late over a shared file system
                path.write_bytes(path.read_bytes() + b"two")
            return [now]

        monkeypatch.setattr(following, "refreshed", refreshed)
        written, told, came = bytearray(), [], threading.Event()

        def write(data: bytes) -> None:
            written.extend(data)
            came.set()

        ended: list[RunJob] = []
        thread = threading.Thread(
            target=lambda: ended.append(following.follow(following.Tail(path), one, write, told.append))
        )
        thread.start()
        wait_for(lambda: told == ["job 7 (run b) waits: Resources (no free nodes)"], "why it waits")
        path.write_bytes(b"one\n")
        assert came.wait(60)
        slurm.fails("squeue", "Socket timed out")
        wait_for(lambda: any("Socket timed out" in words for words in told), "a word on it")
        slurm.answers("squeue", queue_line("7", "COMPLETED"))
        thread.join(60)
        assert (bytes(written), ended[0].state) == (b"one\ntwo", "COMPLETED")


def test_a_queue_that_does_not_answer_ends_a_cancel(slurm: Slurm) -> None:
    make_run("b", "7")
    slurm.answers("squeue", queue_line("7", "COMPLETING"))
    with pytest.raises(SlurmError, match=r"7 \(COMPLETING\): not cancelled within"):
        orders.cancel(look(Path("runs"), needed_for="").all, print, now=False)
