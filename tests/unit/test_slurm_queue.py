"""What squeue, sacct and scontrol say, as they said it: SLURM 22.05, with accounting and without."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.slurm_fakes import Slurm, queue_line

from dtrain.errors import SlurmError
from dtrain.slurm.queue import (
    code_of,
    moment_of,
    output_file,
    parse_sacct,
    parse_squeue,
    queued,
    read_queue,
    seconds_of,
    tasks_of,
)

# Captured from `squeue --noheader --array --states=all --user=0 --Format=...`.
CAPTURED = (
    "5\x1fN/A\x1f5\x1fCANCELLED\x1fJobHeldUser\x1f30:00\x1f0\x1f\x1f2026-11-25T03:12:45\x1f0\x1fheld\x1f/w/a.sbatch\x1f/w\x1f\x1e\n"
    "2\x1fN/A\x1f2\x1fFAILED\x1fNonZeroExitCode\x1f30:00\x1f0\x1fn1\x1f2026-11-25T03:12:44\x1f768\x1ffails\x1f/w/a.sbatch 0 3\x1f/w\x1f\x1e\n"
    "4_3\x1f3\x1f4\x1fPENDING\x1fJobArrayTaskLimit\x1f30:00\x1f0\x1f\x1fN/A\x1f0\x1farr\x1f/w/a.sbatch 30\x1f/w\x1f\x1e\n"
    "8\x1fN/A\x1f8\x1fPENDING\x1fNone\x1f30:00\x1f0\x1f\x1fN/A\x1f0\x1fnl\nx\x1f/w/a.sbatch\x1f/w\x1f\x1e\n"
    "9\x1fN/A\x1f9\x1fPENDING\x1fPriority\x1f30:00\x1f0\x1f\x1fN/A\x1f0\x1fus\x1fx\x1f/w/a.sbatch 5\x1f/w\x1f\x1e\n"
    "10\x1fN/A\x1f10\x1fPENDING\x1fBeginTime\x1f30:00\x1f1\x1f\x1f2026-11-25T03:45:08\x1f768\x1fp\x1f/w/new\nline/a.sbatch\x1f/w/new\nline\x1f\x1e\n"
    '1\x1fN/A\x1f1\x1fRUNNING\x1fNone\x1f29:59\x1f0\x1fn1\x1f2026-11-25T03:42:44\x1f0\x1fa b "q" é\x1f/w/a.sbatch 60 0\x1f/w\x1f\x1e\n'
    "4_1\x1f1\x1f6\x1fRUNNING\x1fNone\x1f1-29:59:00\x1f0\x1fn[1-2]\x1f2026-11-25T03:42:44\x1f0\x1farr\x1f/w/a.sbatch 30\x1f/w\x1f\x1e\n"
)

# Captured from `sacct --allocations --noheader --format=JobID,JobIDRaw,State,ExitCode,End,NodeList,WorkDir ...`.
SACCT = (
    "2\x1f2\x1fFAILED\x1f3:0\x1f2026-11-25T03:12:44\x1fn1\x1f/w\n"
    "7_[2-4,6%1]\x1f7\x1fCANCELLED by 0\x1f0:0\x1f2026-11-25T03:49:42\x1fNone assigned\x1f/w\n"
    "13_2\x1f15\x1fCANCELLED by 0\x1f0:0\x1f2026-11-25T03:14:56\x1fNone assigned\x1f/w\n"
)
SHOWN = """JobId=6 ArrayJobId=4 ArrayTaskId=1 ArrayTaskThrottle=2 JobName=arr
   WorkDir=/w
   StdErr=/w/arr-4_1.out
   StdIn=/dev/null
   StdOut=/w/a b-4_1.out
   Power=
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    return Slurm(tmp_path, monkeypatch)


def test_squeue_is_read() -> None:
    jobs = {job.id: job for job in parse_squeue(CAPTURED)}
    assert list(jobs) == ["5", "2", "4_3", "8", "10", "1", "4_1"]  # "9" has our delimiter in its name
    assert (jobs["2"].code, jobs["2"].has_ended, jobs["2"].nodes) == (3, True, "n1")
    assert jobs["2"].ended == moment_of("2026-11-25T03:12:44")
    assert (jobs["4_3"].waits, jobs["4_3"].array, jobs["4_3"].reason) == (True, "4", "JobArrayTaskLimit")
    assert (jobs["4_1"].number, jobs["4_1"].runs, jobs["4_1"].reason) == ("6", True, "")
    assert jobs["4_1"].time_left == 86400 + 29 * 3600 + 59 * 60
    assert (jobs["8"].name, jobs["1"].name) == ("nl\nx", 'a b "q" é')
    again = jobs["10"]  # it is queued to restart: what SLURM tells of its end is not to be believed
    assert (again.restarts, again.folder, again.ended, again.code) == (1, "/w/new\nline", None, None)


def test_sacct_is_read() -> None:
    failed, *waited, cancelled = parse_sacct(SACCT)
    assert (failed.id, failed.code, failed.nodes, failed.source, failed.folder) == ("2", 3, "n1", "sacct", "/w")
    assert (cancelled.id, cancelled.number, cancelled.state, cancelled.nodes) == ("13_2", "15", "CANCELLED", "")
    assert [job.id for job in waited] == ["7_2", "7_3", "7_4", "7_6"]
    assert tasks_of("7_[0-4:2,9]") == ["7_0", "7_2", "7_4", "7_9"]
    assert parse_sacct("") == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1-02:03:04", 93784), ("3:04", 184), ("0:00", 0), ("UNLIMITED", None), ("NOT_SET", None), ("INVALID", None)],
)
def test_durations_are_read(text: str, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(("text", "code"), [("3:0", 3), ("0:9", 137), ("768", 3), ("9", 137), ("0", 0), ("N/A", None)])
def test_exit_codes_are_read(text: str, code: int | None) -> None:
    assert code_of(text) == code


def test_accounting_is_asked_for_what_has_left_the_queue_and_may_be_off(slurm: Slurm) -> None:
    slurm.answers("squeue", queue_line("7", "RUNNING"))
    queue = read_queue(["7", "2", "13_2", "7_3"], needed_for="a test")
    assert ([job.id for job in queue.jobs], queue.trouble) == (["7"], "")
    slurm.answers("sacct", SACCT)
    queue = read_queue(["7", "2", "13_2", "7_3"], needed_for="a test")
    assert [job.id for job in queue.jobs] == ["7", "2", "7_3", "13_2"]
    assert slurm.calls("sacct")[-1].endswith("--jobs=2,13,7")


def test_where_slurm_does_not_answer_that_is_told(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.fails("squeue", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    assert "Unable to contact" in read_queue(needed_for="a test").trouble
    with pytest.raises(SlurmError, match="squeue failed"):
        queued(needed_for="a test")
    slurm.fails("squeue", "slurm_load_jobs error: Invalid job id specified")
    assert queued("5", needed_for="a test") == []
    monkeypatch.setenv("PATH", "/nowhere")
    assert "not on this machine" in read_queue(needed_for="a test").trouble


def test_where_a_jobs_output_goes(slurm: Slurm) -> None:
    slurm.answers("scontrol", SHOWN)
    assert output_file("4_1", needed_for="a test") == "/w/a b-4_1.out"
    slurm.fails("scontrol", "slurm_load_jobs error: Invalid job id specified")
    assert output_file("4_1", needed_for="a test") == ""
