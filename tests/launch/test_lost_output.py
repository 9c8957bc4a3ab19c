"""Output that cannot be written: nothing that a run has done is lost with it, and the run's log says so once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import BIN, Dtrain, clean_environment
from helpers.running import wait_for

from dtrain.checkpoint.locate import find_good

GUARDED = """
import os, subprocess, sys
from pathlib import Path
from dtrain.launch.terminal.guarded import guard_output, note_losses_in
guard_output()
note_losses_in(Path(sys.argv[1]), 3)
for number in range(1000):
    print(number, "x" * 200)
sys.stdout.flush()
print("more", file=sys.stderr)
assert subprocess.run(["echo", "of another program"]).returncode == int(sys.argv[2])
"""


def run_guarded(folder: Path, redirection: str, code_of_child: int = 0) -> subprocess.CompletedProcess[str]:
    words = [
        "bash",
        "-c",
        f'"$@" {redirection}',
        "bash",
        sys.executable,
        "-c",
        GUARDED,
        str(folder),
        str(code_of_child),
    ]
    return subprocess.run(words, env=clean_environment(), capture_output=True, text=True, check=False, timeout=60)


def notes(run: Path, rank: int = 0) -> list[str]:
    lines = (run / f"logs/rank-{rank}.log").read_text().splitlines()
    return [line for line in lines if line.startswith("[dtrain: ")]


@pytest.mark.parametrize(
    ("redirection", "code_of_child", "said"),
    [
        ("| head -c 5; exit ${PIPESTATUS[0]}", 0, ["standard output cannot be written (Broken pipe)"]),
        ("> /dev/full", 1, ["standard output cannot be written (No space left on device)"]),
        (">&-", 0, ["standard output cannot be written (closed from the start)"]),
        (
            ">&- 2>&- <&-",
            0,
            [f"standard {one} cannot be written (closed from the start)" for one in ("output", "error")],
        ),
    ],
)
def test_what_cannot_be_written_is_noted_once_and_the_program_runs_on(
    tmp_path: Path, redirection: str, code_of_child: int, said: list[str]
) -> None:
    done = run_guarded(tmp_path, redirection, code_of_child)
    assert done.returncode == 0, done.stderr
    found = notes(tmp_path, 3)
    assert [line[len("[dtrain: ") :].partition(", since ")[0] for line in found] == said
    assert all(line.endswith("; the run continues]") for line in found)
    if len(said) == 1:
        assert [line for line in done.stderr.splitlines() if "echo" not in line] == ["more"]


def test_a_run_whose_output_is_read_leaves_no_note(tmp_path: Path) -> None:
    done = run_guarded(tmp_path, "")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1001
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("locale", "expected"),
    [
        ({"PYTHONIOENCODING": "latin-1"}, b"\xe9 ?? \xff"),
        ({"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, b"? ?? \xff"),
    ],
)
def test_what_an_encoding_has_not_is_replaced_and_a_files_bytes_stay(locale: dict[str, str], expected: bytes) -> None:
    program = (
        "from dtrain.launch.terminal.guarded import guard_output\nguard_output()\nprint('\\xe9 \\u51c6\\u786e \\udcff')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean_environment(LC_ALL="C", **locale), capture_output=True, check=True
    )
    assert done.stdout == expected + b"\n"


@pytest.mark.parametrize("verb", ["history", "report"])
def test_names_of_metrics_are_shown_in_any_locale(dtrain: Dtrain, verb: str) -> None:
    run = dtrain.folder / "runs/it"
    run.mkdir(parents=True)
    (run / "history.csv").write_text("epoch,loss,准确率\n1,0.5,0.25\n", encoding="utf-8")
    words = ["history", "it"] if verb == "history" else ["report", "it", "-o", "-"]
    done = subprocess.run(
        [str(BIN / "dtrain"), *words],
        cwd=dtrain.folder,
        env=clean_environment(LC_ALL="C", PYTHONIOENCODING="latin-1"),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert (b"0.25" in done.stdout) or verb == "report"


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_that_ends_the_reader_first_loses_nothing(tmp_path: Path, recipes: Path, ranks: int) -> None:
    """As `dtrain train ... 2>&1 | tee log` on a terminal: tee is gone before dtrain says that it stops."""
    words = ["train", recipes / "long.py", "--cpu", "-n", ranks, "epochs=1000", "run.name=it"]
    process = subprocess.Popen(
        [str(BIN / "dtrain"), *map(str, words)],
        cwd=tmp_path,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith(b"EPOCH = "):
            assert line, "the run did not start"
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 75
    finally:
        process.kill()
        process.wait()
    found = find_good(tmp_path / "runs/it/checkpoints")
    assert found is not None
    assert not (tmp_path / "runs/it/failure.json").exists()
    assert sum("(Broken pipe)" in line for line in notes(tmp_path / "runs/it")) >= 1


def test_a_terminal_that_is_closed_is_a_request_to_stop_one_process(tmp_path: Path, recipes: Path) -> None:
    ours, theirs = os.openpty()
    words = ["train", recipes / "long.py", "--cpu", "epochs=1000", "run.name=it"]
    process = subprocess.Popen(
        [str(BIN / "dtrain"), *map(str, words)],
        cwd=tmp_path,
        env=clean_environment(),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        text = b""
        while b"EPOCH" not in text and not (tmp_path / "runs/it/history.csv").exists():
            text += os.read(ours, 65536)
        os.close(ours)  # each write fails from here on
        process.send_signal(signal.SIGHUP)  # as the kernel does, to the group of a real terminal
        wait_for(lambda: process.poll() is not None, "the end of the run")
        assert process.returncode == 75
    finally:
        process.kill()
        process.wait()
    assert find_good(tmp_path / "runs/it/checkpoints") is not None
