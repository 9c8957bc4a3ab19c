"""Stopping on request, in real processes: by signals to the launcher or to one rank, at any time, and by a file."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.commands import BIN, Dtrain
from helpers.running import Running, running, wait_for
from helpers.sweep import FULL
from safetensors.torch import load_file

from dtrain.checkpoint.locate import find_good

AT_ONCE = 30  # seconds, on a busy machine; a rank that ends well still leaves its process group and the interpreter


@pytest.fixture
def train(recipes: Path) -> list[object]:
    return ["train", recipes / "long.py", "--cpu", "epochs=1000", "run.name=it"]


def marks(where: str, ranks: int) -> list[str]:
    return [f"{where}-{rank}" for rank in range(ranks)]


def assert_stopped(run: Running, by: str, code: int = 75) -> None:
    assert run.end() == code, run.text
    assert run.text.count(f"dtrain: stopping on request ({by}), saving a checkpoint") <= 1
    assert run.text.count(f"dtrain: stopped on request ({by})") == 1, run.text
    assert "Traceback" not in run.text
    assert "error" not in run.text
    folder = run.folder / "runs/it"
    assert not (folder / "failure.json").exists()
    assert not (folder / "owner.lock").exists()


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGTERM), (2, signal.SIGINT), (3, signal.SIGUSR1)])
def test_a_signal_to_the_launcher(tmp_path: Path, train: list[object], ranks: int, number: signal.Signals) -> None:
    words = [*train, "-n", ranks, "model.imperative=true"] if ranks > 1 else train
    with running(tmp_path, *words) as run:
        run.until(*marks("train", ranks))
        run.send(number)
        assert_stopped(run, number.name)
        assert (
            f"dtrain: stopping on request ({number.name}), saving a checkpoint; press Ctrl-C again to stop at once."
            in run.text
        )
        assert "resume with: dtrain train" in run.text


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_storm_of_signals(tmp_path: Path, train: list[object], ranks: int) -> None:
    with running(tmp_path, *train, "-n", ranks) as run:
        run.until(*marks("train", ranks))
        draw = random.Random(ranks)
        while run.process.poll() is None:
            run.send(draw.choice([signal.SIGTERM, signal.SIGUSR1]))
            if ranks > 1:
                with contextlib.suppress(AssertionError, ProcessLookupError):  # it has ended
                    run.send(draw.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]), draw.randrange(ranks))
            time.sleep(0.001)
        assert run.end() == 75, run.text
        assert "Traceback" not in run.text


@pytest.mark.parametrize("after", [0.15, 1.5] if not FULL else [number * 0.1 for number in range(40)])
def test_in_start_up(tmp_path: Path, train: list[object], after: float) -> None:
    with running(tmp_path, *train, "-n", 2, "model.setup=1", cold=True) as run:
        wait_for(lambda: listens(run.process.pid), "the launcher listens")
        time.sleep(after)
        run.send(signal.SIGTERM)
        assert run.end() == 75, run.text
        assert "stopped on request (SIGTERM), before the first step; nothing to save" in run.text
        assert not (tmp_path / "runs").exists()


def test_in_start_up_of_every_process(tmp_path: Path, train: list[object]) -> None:
    """As SLURM sends it: a rank that does not hear it yet does not die of it."""
    with running(tmp_path, *train, "-n", 2, cold=True) as run:
        launcher = psutil.Process(run.process.pid)
        wait_for(lambda: len(launcher.children()) >= 3, "there are ranks, and their reaper")
        for process in [*launcher.children(), launcher]:
            process.send_signal(signal.SIGUSR1)
        assert run.end() == 75, run.text
        assert "stopped on request (SIGUSR1), before the first step; nothing to save" in run.text


def listens(pid: int) -> bool:
    from dtrain.launch.monitor.processes import catches

    return catches(pid, signal.SIGTERM)


@pytest.mark.parametrize("program", ["torchrun", "accelerate"])
def test_one_rank_alone_under_another_launcher(tmp_path: Path, train: list[object], program: str) -> None:
    how = (
        ["--nproc-per-node", "2"] if program == "torchrun" else ["launch", "--multi_gpu", "--num_processes", "2"]
    )  # which on a machine without GPUs starts two processes all the same
    with running(tmp_path, *how, "-m", "dtrain", *train, program=program, ACCELERATE_USE_CPU="true") as run:
        run.until(*marks("train", 2))
        run.send(signal.SIGTERM, rank=1)
        assert run.end() == 1, run.text  # that launcher's own code
        assert run.text.count("dtrain: stopped on request (SIGTERM), in epoch") == 1, run.text
        assert "exitcode  : 75" in run.text
        assert "Ctrl-C again" not in run.text
        assert run.text.count("dtrain: stopping on request (SIGTERM), saving a checkpoint.") == 1


def test_one_rank_alone_here_and_srun_like(tmp_path: Path, train: list[object]) -> None:
    with running(tmp_path, *train, "-n", 3) as run:
        run.until(*marks("train", 3))
        run.send(signal.SIGUSR1, rank=2)
        assert_stopped(run, "SIGUSR1")


def test_the_file(tmp_path: Path, train: list[object]) -> None:
    with running(tmp_path, *train, "-n", 2) as run:
        run.until(*marks("train", 2))
        (tmp_path / "runs/it/STOP").touch()
        assert_stopped(run, str(tmp_path / "runs/it/STOP"))
    assert (tmp_path / "runs/it/STOP").exists()


def test_ctrl_c_twice_ends_at_once(tmp_path: Path, train: list[object]) -> None:
    for ranks in (1, 2):
        for mark in marks("train", ranks):
            (tmp_path / mark).unlink(missing_ok=True)
        with running(tmp_path, *train[:-1], "-n", ranks, "model.pause=600") as run:
            run.until(*marks("train", ranks))
            run.send(signal.SIGINT)
            wait_for(lambda run=run: "Ctrl-C again to stop at once" in run.text, "it says so")
            assert run.process.poll() is None
            time.sleep(0.5)  # as a person's second one would come; within 0.3 s it counts as the first
            run.send(signal.SIGINT)
            began = time.monotonic()
            assert run.end() == 130, run.text
            assert time.monotonic() - began < AT_ONCE


@pytest.mark.parametrize("asynchronous", ["true", "false"] if FULL else ["true"])
def test_in_the_middle_of_a_save(tmp_path: Path, recipes: Path, asynchronous: str) -> None:
    recipe = tmp_path / "slow.py"
    slow = "\n\nclass Slow:\n    def state_dict(self):\n        mark('saving')\n        time.sleep(1)\n        return {'n': 1}\n"
    recipe.write_text(
        (recipes / "long.py").read_text() + slow + "    def load_state_dict(self, _): ...\n\nslow = Slow()\n"
    )
    words = ["train", recipe, "--cpu", "-n", 2, "epochs=1000", "run.name=it", f"asynchronous={asynchronous}"]
    with running(tmp_path, *words, "checkpoint.every_steps=20") as run:
        run.until("saving-0")
        for _ in range(3):
            run.send(signal.SIGTERM)
            run.send(signal.SIGTERM, rank=1)
        assert_stopped(run, "SIGTERM")
        named = run.text.split("checkpoint: ")[1].split()[0]
    found = find_good(tmp_path / "runs/it/checkpoints")
    assert found is not None and not found.words, "what it names is whole"
    assert found.saved.path.name == Path(named).name
    assert not [path for path in (tmp_path / "runs/it/checkpoints").iterdir() if path.name.startswith(".")]


def test_ranks_that_do_not_stop_in_time_are_ended(tmp_path: Path, train: list[object]) -> None:
    with running(tmp_path, *train, "-n", 2, "model.pause=600", "stop_seconds=1") as run:
        run.until(*marks("train", 2))
        run.send(signal.SIGTERM)
        assert run.end(AT_ONCE) == 143, run.text
        assert "they did not stop within train.stop_seconds" in run.text


def test_validation_is_left(tmp_path: Path, train: list[object]) -> None:
    # In all it would take a minute.
    with running(tmp_path, *train, "-n", 2, "valid_pause=1", "n_valid=240") as run:
        run.until(*marks("valid", 2))
        began = time.monotonic()
        run.send(signal.SIGTERM, rank=1)
        assert_stopped(run, "SIGTERM")
        assert time.monotonic() - began < AT_ONCE
        assert "in epoch 1, after 12 optimizer steps" in run.text
    assert not (tmp_path / "runs/it/history.csv").exists()


def test_a_terminal_that_closes_is_a_request_and_nohup_keeps_it(tmp_path: Path, train: list[object]) -> None:
    with running(tmp_path, *train, "-n", 2) as run:
        run.until(*marks("train", 2))
        run.send(signal.SIGHUP)
        run.send(signal.SIGHUP)  # the shell's, after the kernel's
        assert_stopped(run, "SIGHUP")
    for mark in marks("train", 2):
        (tmp_path / mark).unlink()
    script = tmp_path / "nohup"
    script.write_text(f"#!/bin/sh\ntrap '' HUP\nexec {BIN / 'dtrain'} \"$@\"\n")
    script.chmod(0o755)
    with running(tmp_path, *train[:-1], "-n", 2, program=str(script)) as run:
        run.until(*marks("train", 2))
        run.send(signal.SIGHUP)
        run.send(signal.SIGTERM)
        assert run.end() == 75, run.text
        assert "SIGHUP" not in run.text


@pytest.mark.parametrize(("ranks", "number"), [(2, signal.SIGTERM), (1, signal.SIGUSR1)])
def test_a_signal_to_every_process(tmp_path: Path, train: list[object], ranks: int, number: signal.Signals) -> None:
    """As SLURM sends it: to the launcher, each rank, and their DataLoader workers."""
    with running(tmp_path, *train, "-n", ranks, "workers=2") as run:
        run.until(*marks("train", ranks))
        family = psutil.Process(run.process.pid).children(recursive=True)
        assert len(family) >= 2 * ranks
        for process in [*family, psutil.Process(run.process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        assert_stopped(run, number.name)
        assert run.text.count("stopping on request") == 1, "workers do not speak"


def weights_and_rows(folder: Path) -> tuple[dict[str, Any], list[list[str]]]:
    last = max((folder / "checkpoints").glob("epoch-?"))
    rows = [line.split(",")[:3] for line in (folder / "history.csv").read_text().splitlines()]
    return {name: value.tolist() for name, value in load_file(last / "model.safetensors").items()}, rows


@pytest.mark.parametrize("ranks", [1, 2])
def test_stopped_again_and_again_it_ends_as_if_it_had_not_been(dtrain: Dtrain, recipes: Path, ranks: int) -> None:
    """In training, in validation, at whatever moment: bitwise, dropout and AdamW included."""
    words = ["train", recipes / "long.py", "--cpu", "-n", ranks, "epochs=2", "n_valid=24", "batch_size=4", "pause=0"]
    words, stops = [*words, "data.workers=1"], 8 if FULL else 2
    whole = dtrain(*words, "run.name=whole")
    assert whole.code == 0, whole.text
    draw = random.Random(ranks)
    codes: list[int] = []
    while not codes or codes[-1] != 0:
        assert len(codes) < 15, codes
        for mark in [*marks("train", ranks), *marks("valid", ranks)]:
            (dtrain.folder / mark).unlink(missing_ok=True)
        slow = {"SLOW": "0.1"} if len(codes) < stops else {}
        with running(dtrain.folder, *words, "run.name=it", **slow) as run:
            if slow:
                run.until(*marks("valid" if len(codes) % 2 else "train", ranks))
                time.sleep(draw.uniform(0, 0.3))
                run.send(signal.SIGTERM, rank=draw.randrange(ranks) if ranks > 1 else None)
            codes.append(run.end())
            assert codes[-1] in (0, 75), run.text
    assert codes == [75] * stops + [0]
    assert weights_and_rows(dtrain.folder / "runs/it") == weights_and_rows(dtrain.folder / "runs/whole")


def test_a_wait_for_another_owner_is_ended_by_a_signal_to_the_supervisor(dtrain: Dtrain, recipes: Path) -> None:
    """It alone hears of the signal, and the trainer does not train yet."""
    words = ["train", recipes / "small.py", "--cpu", "run.name=it"]
    assert dtrain(*words, "epochs=1").code == 0
    lock = dtrain.folder / "runs/it/owner.lock"
    lock.write_text(
        '{"host": "node7", "pid": 1, "started": 0, "machine": "other", "job": null, "since": 1.0, "token": "t"}'
    )
    before = lock.read_text()
    with running(dtrain.folder, *words, "epochs=2") as run:
        wait_for(lambda: "s for a heartbeat of process 1 on node7" in run.text, "the wait")
        run.send(signal.SIGTERM)
        assert run.end() == 75, run.text
        assert (
            "stopped on request (SIGTERM), while waiting for the owner of runs/it; nothing was changed there"
            in run.text
        )
    assert lock.read_text() == before
