"""What ranks write: on the launcher's own output, line by line, and in a log for each rank."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers.commands import BIN, Dtrain, children_of_tests, clean_environment

RANK = "import os, sys, time\nrank = os.environ['RANK']\n"


def script(folder: Path, text: str) -> list[str]:
    (folder / "s.py").write_text(RANK + text)
    return [str(BIN / "dtrain"), "launch", "-n", "2", "--log-dir", "logs", "s.py"]


def log(folder: Path, rank: int) -> bytes:
    return (folder / "logs" / f"rank-{rank}.log").read_bytes()


def test_lines_of_two_ranks_never_run_into_each_other(dtrain: Dtrain) -> None:
    argv = script(dtrain.folder, "for i in range(400): print('of', rank, *['and'] * 20, i)")
    done = dtrain.run(*argv, PYTHONUNBUFFERED="1")  # each word is a write of its own
    assert done.code == 0, done.text
    lines = [f"of {rank} {'and ' * 20}{i}" for rank in (0, 1) for i in range(400)]
    assert sorted(done.out.splitlines()) == sorted(lines)
    for rank in (0, 1):
        assert log(dtrain.folder, rank).decode().splitlines() == lines[400 * rank : 400 * rank + 400]


def test_bytes_pass_as_they_are_and_a_log_keeps_what_was_seen_last(dtrain: Dtrain) -> None:
    text = (
        "if rank == '1':\n"
        "    out = sys.stdout.buffer\n"
        "    out.write(b'\\xff\\x00\\n'); out.flush()\n"
        "    for i in range(3): print(f'\\r{i} of 3', end='', file=sys.stderr, flush=True); time.sleep(0.01)\n"
        "    print('\\nwindows\\r\\n\\x1b[31mred\\x1b[0m', file=sys.stderr)\n"
        "    print('no end', end='', flush=True)\n"
    )
    done = subprocess.run(
        script(dtrain.folder, text), cwd=dtrain.folder, env=clean_environment(), capture_output=True, check=True
    )
    assert done.stdout == b"\xff\x00\nno end"
    assert done.stderr == b"\r0 of 3\r1 of 3\r2 of 3\nwindows\r\n\x1b[31mred\x1b[0m\n"
    assert sorted(log(dtrain.folder, 1).split(b"\n")) == sorted(
        [b"\xff\x00", b"2 of 3", b"windows\r", b"red", b"no end"]
    )
    assert log(dtrain.folder, 0) == b""


def test_much_output_costs_no_more_than_its_bytes(dtrain: Dtrain) -> None:
    argv = script(
        dtrain.folder, "if rank == '0':\n    for i in range(1000): sys.stdout.write(('x' * 99 + '\\n') * 1000)"
    )
    began = time.monotonic()
    with (dtrain.folder / "out.txt").open("w") as out:
        subprocess.run(argv, cwd=dtrain.folder, env=clean_environment(), stdout=out, check=True, timeout=120)
    assert (dtrain.folder / "out.txt").stat().st_size == 100_000_000
    assert (dtrain.folder / "logs/rank-0.log").stat().st_size == 100_000_000
    assert time.monotonic() - began < 100  # about one


def test_a_log_that_cannot_be_written_is_told_once_and_the_ranks_continue(dtrain: Dtrain) -> None:
    (dtrain.folder / "logs").mkdir()
    (dtrain.folder / "logs/rank-0.log").symlink_to("/dev/full")  # as a planted link, it is not followed
    done = dtrain.run(*script(dtrain.folder, "for i in range(50): print(i, flush=True)"))
    assert done.code == 0
    assert len(done.out.splitlines()) == 100
    assert done.err.count("the ranks' logs cannot be written (it is a symbolic link, which is not followed)") == 1
    assert len(done.err.splitlines()) == 1


def test_words_of_a_crash_in_c_are_in_the_ranks_log(dtrain: Dtrain) -> None:
    text = (
        "if rank == '0': time.sleep(60)\nimport ctypes\nprint('before')\nos.write(2, b'C says\\n')\nctypes.string_at(0)"
    )
    done = dtrain.run(*script(dtrain.folder, text))
    assert done.code == 1
    found = log(dtrain.folder, 1).decode()
    assert re.search(r"before\n|C says\n", found)
    assert "C says" in found
    assert "Fatal Python error: Segmentation fault" in found
    assert log(dtrain.folder, 0) == b""


@contextlib.contextmanager
def on_a_terminal(folder: Path, argv: list[str]):
    """The command on a terminal of 93 columns; yields the process and the terminal's other end."""
    import fcntl
    import struct
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 31, 93, 0, 0))
    process = subprocess.Popen(
        argv, cwd=folder, env=clean_environment(), stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_until(file: int, what: bytes, seconds: float = 30) -> bytes:
    text, deadline = b"", time.monotonic() + seconds
    while what not in text:
        assert select.select([file], [], [], max(0.0, deadline - time.monotonic()))[0], text
        text += os.read(file, 65536)
    return text


def test_a_terminal_stays_one_for_every_rank(dtrain: Dtrain) -> None:
    text = (
        "import pathlib\n"
        "if rank == '1':\n"
        "    while not pathlib.Path('go').exists(): time.sleep(0.01)\n"
        "print(rank, sys.stdout.isatty(), sys.stderr.isatty(), os.get_terminal_size().columns)\n"
        "print('a bar', end='\\r', file=sys.stderr)\n"
        "while not pathlib.Path('stop').exists(): time.sleep(0.01)\n"
    )
    with on_a_terminal(dtrain.folder, script(dtrain.folder, text)) as (process, terminal):
        assert read_until(terminal, b"a bar\r") == b"0 True True 93\r\na bar\r"  # at once, though the line has no end
        (dtrain.folder / "go").touch()
        assert read_until(terminal, b"a bar\r") == b"\r\n1 True True 93\r\na bar\r"
        (dtrain.folder / "stop").touch()
        assert process.wait(60) == 0
    assert log(dtrain.folder, 0) == b"0 True True 93\na bar\r"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_output_that_nobody_reads_does_not_keep_a_launcher_alive(dtrain: Dtrain, number: signal.Signals) -> None:
    argv = script(dtrain.folder, "import pathlib\npathlib.Path('here').touch()\nwhile True: print('x' * 1000)")
    process = subprocess.Popen(argv, cwd=dtrain.folder, env=clean_environment(), stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 90
        while not (dtrain.folder / "here").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)  # the pipe is full by now, or will be
        process.send_signal(number)
        assert process.wait(60) != 0
    finally:
        process.kill()
        process.communicate()
    while children_of_tests():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_output_whose_reader_has_gone_ends_no_work(dtrain: Dtrain) -> None:
    argv = script(dtrain.folder, "for i in range(3000): print(rank, i, 'x' * 100)")
    process = subprocess.Popen(
        argv, cwd=dtrain.folder, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert err.count(b"output cannot be written (Broken pipe)") == len(err.splitlines()) == 1
    kept = [log(dtrain.folder, rank).decode().splitlines() for rank in (0, 1)]
    assert [len(lines) for lines in kept] == [3001, 3000], "the logs keep all, and the first says what is not shown"
    assert sum("output cannot be written" in line for line in kept[0]) == 1


def test_a_run_keeps_its_ranks_output_from_the_start(dtrain: Dtrain, recipes: Path) -> None:
    (dtrain.folder / "mine.py").write_text(
        "import os, sys\nprint('imported by', os.environ.get('RANK'), file=sys.stderr)\n"
        + (recipes / "small.py").read_text()
    )
    done = dtrain("train", "mine.py", "-n", 2, "--cpu", "epochs=1", "run.name=it")
    assert done.code == 0, done.text
    first, second = ((dtrain.folder / f"runs/it/logs/rank-{rank}.log").read_text() for rank in (0, 1))
    assert "imported by 0" in first
    assert "EPOCH = 1" in first
    assert second == "imported by 1\n"
