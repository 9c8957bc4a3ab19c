"""What a job's batch script does: asks the ranks to stop, starts the job again or not, and keeps a record of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.commands import BIN, clean_environment

from dtrain.distributed.port_file import agreed_port
from dtrain.errors import WorldError
from dtrain.rundir.job_record import JobAttempt, JobRecord, read_record, write_record
from dtrain.slurm.attempt import environment_of, named
from dtrain.slurm.exports import exported
from dtrain.slurm.verdict import AWAIT, CANCEL, END, REQUEUE, AttemptEnd, verdict

JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]"}


@pytest.mark.parametrize(
    ("ended", "action"),
    [
        (AttemptEnd(0), END),
        (AttemptEnd(0, asked=True), END),
        (AttemptEnd(75, asked=True), REQUEUE),
        (AttemptEnd(75, asked=True, without_progress=3), REQUEUE),
        (AttemptEnd(75, asked=True, without_progress=4), END),
        (AttemptEnd(138, asked=True), REQUEUE),  # the request came before it could be heard
        (AttemptEnd(75), END),  # somebody asked the ranks, not the job
        (AttemptEnd(75, asked=True, stop_file=True), CANCEL),
        (AttemptEnd(75, asked=True, cancel_file=True), CANCEL),
        (AttemptEnd(75, asked=True, terminated=True), END),  # SLURM decides
        (AttemptEnd(75, terminated=True, preempted=True), REQUEUE),
        (AttemptEnd(75, preempted=True), REQUEUE),
        (AttemptEnd(1, asked=True), END),
        (AttemptEnd(1, failure={"cause": "exception"}), END),
        (AttemptEnd(137, failure={"cause": "killed"}), END),
        (AttemptEnd(76, failure={"cause": "hang"}), END),
        (AttemptEnd(1, failure={"cause": "lost"}), AWAIT),
        (AttemptEnd(1, failure={"cause": "peer"}), AWAIT),
        (AttemptEnd(1, failure={"cause": "lost"}, without_progress=4), END),
        (AttemptEnd(137, failure={"cause": "peer"}, nodes_answer=True), END),  # a rank without a launcher was killed
    ],
)
def test_what_becomes_of_a_job(ended: AttemptEnd, action: str) -> None:
    assert verdict(ended).action == action


def test_starts_that_achieved_nothing_are_counted_from_the_last_one_back() -> None:
    starts = [(0, 0, 0), (1, 4, 1), (2, 4, 2), (2, 4, 2)]
    record = JobRecord("7", incarnations=tuple(JobAttempt(i, "7", "", 0.0, progress=p) for i, p in enumerate(starts)))
    assert record.without_progress((2, 4, 2)) == 2
    assert record.without_progress((3, 4, 3)) == 0
    assert JobRecord("7", incarnations=record.incarnations, forgiven=3).without_progress((2, 4, 2)) == 1


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = JobRecord("7_3", 1.5, "a b.sbatch", None, "ü", (JobAttempt(0, "9", "n1", 2.0, 3.0, 75, "why", (1, 2, 3)),))
    assert read_record(tmp_path) is None
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (["srun", "--export=NONE", "p", "-m", "x"], ["srun", "--export=S,N", "p", "-m", "x"]),
        (["srun", "--export", "A,B=1", "p"], ["srun", "--export", "A,B=1,S,N", "p"]),
        (["srun", "--export=ALL,A=1", "p"], ["srun", "--export=ALL,A=1", "p"]),
        (["srun", "p", "-m", "dtrain", "--export=NONE"], ["srun", "p", "-m", "dtrain", "--export=NONE"]),
        (["srun", "p"], ["srun", "p"]),
    ],
)
def test_names_are_added_to_what_srun_exports(given: list[str], made: list[str]) -> None:
    for variable, then in (
        (None, None),
        ("NONE", "S,N"),
        ("", "S,N"),
        ("ALL", "ALL"),
        ("A", "A,S,N"),
        ("A='x,,x',S", "A='x,,x',S,N"),
    ):
        environment = {"S": "hush"} | ({} if variable is None else {"SLURM_EXPORT_ENV": variable})
        words, found = exported(given, environment, ["S", "N"])
        assert (words, found.get("SLURM_EXPORT_ENV")) == (made, then)
        assert "hush" not in str(words) + str(found.get("SLURM_EXPORT_ENV"))


class TestWhatSrunGets:
    @pytest.mark.parametrize(
        ("command", "words"),
        [
            (["srun", "python", "launch", "--", "train", "mine.py", "lr=1"], ["mine.py", "lr=1"]),
            (["srun", "dtrain", "train", "--cpu", "mine.py"], ["mine.py"]),
            (["srun", "dtrain", "train"], []),
        ],
    )
    def test_the_runs_name_is_a_word_of_train(self, command: list[str], words: list[str]) -> None:
        assert named(command, words, Path("runs/a-job7")) == ([*command, "run.name=a-job7"], {})

    @pytest.mark.parametrize("command", [["srun", "own.sh", "mine.py"], ["srun", "train", "mine.py", "--cpu"]])
    def test_where_a_script_ends_otherwise_a_variable_has_it(self, command: list[str]) -> None:
        assert named(command, ["mine.py"], Path("runs/a-job7")) == (command, {"DTRAIN_RUN__NAME": "a-job7"})

    def test_srun_hands_all_on_with_a_secret_and_a_free_port(self) -> None:
        made = environment_of({"A": "b", "SLURM_EXPORT_ENV": "NONE"})
        assert (made["A"], made["SLURM_EXPORT_ENV"]) == ("b", "ALL")
        assert 20_000 <= int(made["MASTER_PORT"]) < 32_000
        assert len(made["DTRAIN_RDZV_SECRET"]) == 64
        assert environment_of({"MASTER_PORT": "29500"})["MASTER_PORT"] == "29500"


class TestPortFile:
    """Ranks of one node that srun has started."""

    def test_rank_0_publishes_the_port_that_it_takes(self, tmp_path: Path) -> None:
        program = (
            "import os, sys; from datetime import timedelta; from dtrain.distributed.port_file import agreed_port\n"
            "with agreed_port(int(sys.argv[1]), timedelta(seconds=60)):\n"
            "    print(os.environ['MASTER_PORT'], flush=True)\n"
            "    sys.stdin.read()"
        )
        env = clean_environment(DTRAIN_PORT_FILE=str(tmp_path / "ports/slurm-7.0.0"), MASTER_PORT="20001")
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", program, rank],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in ("0", "1", "2")
        ]
        found = [one.communicate(timeout=90)[0].strip() for one in reversed(ranks)]
        assert len(set(found)) == 1
        assert found[0].isdecimal()
        assert not list((tmp_path / "ports").iterdir()), "rank 0 takes it along"

    def test_a_folder_that_others_can_write_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "ports").mkdir()
        (tmp_path / "ports").chmod(0o777)
        monkeypatch.setenv("DTRAIN_PORT_FILE", str(tmp_path / "ports/slurm-7.0.0"))
        monkeypatch.setenv("MASTER_PORT", "20001")
        for rank in (0, 1):
            with (
                pytest.raises(WorldError, match=r"can be written by others\. Remove it, or set TMPDIR"),
                agreed_port(rank, timedelta(seconds=1)),
            ):
                pass

    def test_without_rank_0_the_file_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DTRAIN_PORT_FILE", str(tmp_path / "ports/slurm-7.0.0"))
        with (
            pytest.raises(WorldError, match=r"rank 0 did not come within 0.1 s: it would have left its port in /"),
            agreed_port(1, timedelta(seconds=0.1)),
        ):
            pass


class TestJob:
    """With programs of ours in the place of srun and of SLURM's commands."""

    @pytest.fixture(autouse=True)
    def slurm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "bin").mkdir()
        for name in ("scontrol", "scancel"):
            show = "if sys.argv[1] == 'show': sys.exit(print(open('show.txt').read()))"
            # It ends the job, as SLURM does: whoever asks is the process above.
            ask = "open('asked.txt', 'a').write(' '.join(sys.argv[1:]) + NL); os.kill(os.getppid(), 15)"
            self.program(f"bin/{name}", f"{show}\n{ask}")
        (tmp_path / "show.txt").write_text("JobId=77 JobState=RUNNING Reason=None PreemptTime=None ")
        (tmp_path / "mine.py").write_text("def train_step(): ...\ndef valid_step(): ...\n")

    def program(self, name: str, body: str) -> Path:
        path = Path(name)
        path.write_text(f"#!{sys.executable}\nimport os, signal, sys, time\nNL = chr(10)\n{body}\n")
        path.chmod(0o755)
        return path.resolve()

    def start(self, srun: str, *options: str, words: tuple[str, ...] = (), **env: str) -> subprocess.Popen[str]:
        command = [str(BIN / "dtrain"), "slurm-job", *options, "mine.py", *words, "--", str(self.program("srun", srun))]
        environment = clean_environment() | JOB | env
        environment["PATH"] = f"{Path('bin').resolve()}{os.pathsep}{environment['PATH']}"
        command += ["a b", "--cpu"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def asked(self) -> list[str]:
        path = Path("asked.txt")
        return path.read_text().splitlines() if path.exists() else []

    def record(self, name: str = "mine-job77") -> dict[str, Any]:
        found: dict[str, Any] = json.loads(Path("runs", name, "slurm/job.json").read_text())
        return found

    def test_it_passes_everything_on_and_names_the_run(self) -> None:
        process = self.start("open('got.txt', 'w').write(NL.join([*sys.argv[1:], os.environ['DTRAIN_RUN__NAME']]))")
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
        assert Path("got.txt").read_text().splitlines() == ["a b", "--cpu", "mine-job77"]
        (one,) = self.record()["incarnations"]
        assert (one["code"], one["why"], one["nodes"], self.record()["job"]) == (0, "complete", "n[1-2]", "77")
        assert self.asked() == []

    def test_each_start_has_a_secret_of_its_own_and_one_that_was_given_holds(self) -> None:
        said = "open('got.txt', 'a').write(os.environ['DTRAIN_RDZV_SECRET'] + NL)"
        printed = ""
        for env in ({}, {}, {"DTRAIN_RDZV_SECRET": "a user's own"}):
            out, _ = self.start(said, **env).communicate(timeout=120)
            printed += out
        first, second, own = Path("got.txt").read_text().splitlines()
        assert len(first) == len(second) == 64
        assert first != second
        assert own == "a user's own"
        assert not {first, second, own} & set(printed.split())
        kept = "".join(path.read_text() for path in Path("runs").rglob("*") if path.is_file())
        assert first not in kept

    def test_what_exports_nothing_hands_secret_and_name_on_all_the_same(self) -> None:
        names = "('SLURM_EXPORT_ENV', 'DTRAIN_RUN__NAME', 'DTRAIN_RDZV_SECRET')"
        self.start(
            f"open('got.txt', 'w').write(' '.join(os.environ[name] for name in {names}))", SLURM_EXPORT_ENV="NONE"
        ).communicate(timeout=60)
        exports, run, secret = Path("got.txt").read_text().split()
        assert (exports, run, len(secret)) == ("ALL", "mine-job77", 64)

    def test_asked_to_stop_it_asks_srun_and_has_the_job_started_again(self) -> None:
        srun = "signal.signal(signal.SIGUSR1, lambda *_: os._exit(75)); print('up', flush=True); time.sleep(60)"
        process = self.start(srun, words=("run.name=it",))
        assert process.stdout is not None
        next(line for line in process.stdout if line == "up\n")
        process.send_signal(signal.SIGUSR1)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 75, out
        assert self.asked() == ["requeue 77"]
        (one,) = self.record("it")["incarnations"]
        assert (one["code"], one["why"]) == (75, "stopped before the time limit")

    @pytest.mark.parametrize(("file", "asked"), [("STOP", ["77"]), ("slurm/cancel", ["77"])])
    def test_it_ends_for_good_where_somebody_wants_that(self, file: str, asked: list[str]) -> None:
        srun = f"open('runs/it/{file}', 'w'); os.kill(os.getppid(), signal.SIGUSR1); time.sleep(1); os._exit(75)"
        process = self.start("signal.signal(signal.SIGUSR1, lambda *_: None); " + srun, words=("run.name=it",))
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 75, out
        assert self.asked() == asked, out

    def test_a_failure_is_no_reason_to_start_again(self) -> None:
        process = self.start("sys.exit(1)")
        out, _ = process.communicate(timeout=120)
        assert (process.returncode, self.asked()) == (1, []), out
        assert "failed (exit code 1)" in out

    def test_terminated_it_waits_for_the_ranks_to_save_and_leaves_the_rest_to_slurm(self) -> None:
        srun = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), os._exit(75))); print('up', flush=True); "
        srun += "time.sleep(60)"
        process = self.start(srun)
        assert process.stdout is not None
        next(line for line in process.stdout if line == "up\n")
        for one in (process, *psutil.Process(process.pid).children()):
            one.send_signal(signal.SIGTERM)  # as SLURM sends it to all
        out, _ = process.communicate(timeout=120)
        assert (process.returncode, self.asked()) == (75, []), out

    def test_preempted_it_has_the_job_started_again_before_the_time_of_grace_is_over(self) -> None:
        Path("show.txt").write_text("JobId=77 JobState=RUNNING Reason=None PreemptTime=2026-11-25T03:04:05 ")
        process = self.start("sys.exit(75)")
        out, _ = process.communicate(timeout=120)
        assert (process.returncode, self.asked()) == (75, ["requeue 77"]), out

    def test_starts_that_bring_nothing_come_to_an_end(self) -> None:
        for restart in range(3):
            srun = "signal.signal(signal.SIGUSR1, lambda *_: None); os.kill(os.getppid(), signal.SIGUSR1); "
            srun += "time.sleep(1); os._exit(75)"
            process = self.start(srun, "--requeues", "1", SLURM_RESTART_COUNT=str(restart))
            out, _ = process.communicate(timeout=120)
            assert process.returncode == (75 if restart < 2 else 1), out
        assert self.asked() == ["requeue 77"], "the second one has given up, the third one has not begun"
        assert [one["code"] for one in self.record()["incarnations"]] == [75, 75, 1]

    def test_outside_of_a_job_it_says_so(self) -> None:
        done = subprocess.run(
            [str(BIN / "dtrain"), "slurm-job", "mine.py", "--", "srun"],
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 2
        assert "not inside a SLURM job" in done.stderr
