"""A rank that torchrun or Accelerate started has a supervisor of its own: its end is named, and it outlives no launcher."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from helpers.apart import STUCK, failure, trainer, write_recipe
from helpers.running import Running, running

TORCHRUN = ("--standalone", "--nproc-per-node", "2")
ACCELERATE = ("launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no")


@contextmanager
def training(folder: Path, program: str, launch: tuple[str, ...], then: str, *words: str) -> Iterator[Running]:
    """Trains under another launcher; from the fifth step on each rank does something besides."""
    write_recipe(folder, then)
    command = (*launch, "-m", "dtrain", "train", "recipe.py", "--cpu", "run.name=one", *words)
    with running(folder, *command, program=program, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1") as one:
        try:
            yield one
        finally:
            for process in (
                psutil.Process(one.process.pid).children(recursive=True) if one.process.poll() is None else ()
            ):
                process.kill()


@pytest.mark.parametrize(
    ("program", "launch", "ranks"),
    [("torchrun", TORCHRUN, 2), ("accelerate", ACCELERATE, 1)],
    ids=["torchrun", "accelerate"],
)
def test_ranks_whose_launcher_is_killed_save_and_end(
    tmp_path: Path, program: str, launch: tuple[str, ...], ranks: int
) -> None:
    with training(tmp_path, program, launch, "time.sleep(0.05)", "epochs=100", "data.workers=1") as one:
        one.until(*(f"trainer-{rank}" for rank in range(ranks)))
        all_of_them = psutil.Process(one.process.pid).children(recursive=True)
        assert len(all_of_them) >= 4 * ranks, "each rank has a supervisor, which has a reaper, and a worker"
        one.send(signal.SIGKILL)
        _, alive = psutil.wait_procs(all_of_them, timeout=60)
        assert not alive, "nothing that the launcher has started outlives it"
    assert f"dtrain: {program} (pid {one.process.pid}), which started this rank, was killed: stopping" in one.text
    if ranks > 1:  # torchrun had the store in which they would agree on where to stop
        return
    assert f"dtrain: stopped on request (end of {program}), in epoch" in one.text
    assert list((tmp_path / "runs/one/checkpoints").glob("epoch-*")), one.text
    assert (tmp_path / "runs/one/logs/rank-0.log").is_file()
    assert not (tmp_path / "runs/one/failure.json").exists()


def test_ranks_that_cannot_stop_do_not_outlive_torchrun_either(tmp_path: Path) -> None:
    with training(tmp_path, "torchrun", TORCHRUN, STUCK, "data.workers=1", "train.stop_seconds=1") as one:
        one.until("trainer-0", "trainer-1")
        all_of_them = psutil.Process(one.process.pid).children(recursive=True)
        one.send(signal.SIGKILL)
        _, alive = psutil.wait_procs(all_of_them, timeout=60)
        assert not alive
    ended = (
        rf"dtrain: stopped by the end of torchrun \(pid {one.process.pid}\); rank [01] was terminated; it did not stop"
    )
    assert len(re.findall(ended, one.text)) == 2, one.text


def test_a_hang_under_torchrun_is_ended_and_its_line_named(tmp_path: Path) -> None:
    then = f"RANK == 1 and {STUCK}"
    with training(tmp_path, "torchrun", TORCHRUN, then, "train.hang_seconds=2") as one:
        assert one.end() == 1, one.text  # torchrun's own code
    assert re.search(r"a hang was stopped: rank 1 has been in epoch 1, train step 5 .* in .*recipe.py:\d+", one.text), (
        one.text
    )
    assert re.search(r"exitcode +: 76", one.text), one.text
    assert failure(tmp_path) == [1, 1, "hang"]


def test_a_rank_that_is_killed_under_torchrun_is_named(tmp_path: Path) -> None:
    with training(tmp_path, "torchrun", TORCHRUN, "time.sleep(0.05)", "epochs=100", "data.workers=1") as one:
        one.until("trainer-0", "trainer-1")
        killed = trainer(tmp_path, 1)
        supervisor = killed.parent()
        assert supervisor is not None and supervisor.ppid() == one.process.pid
        workers = [process for process in killed.children(recursive=True) if process.pid != killed.pid]
        assert workers
        os.kill(killed.pid, signal.SIGKILL)
        assert one.end() == 1, one.text
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive
    assert "dtrain: error: rank 1 was killed by SIGKILL without reporting a cause." in one.text, one.text
    assert "the other ranks were terminated" not in one.text, "which is torchrun's affair"
    assert failure(tmp_path) == [1, 1, "killed"]


def test_a_stop_under_torchrun_has_a_deadline(tmp_path: Path) -> None:
    with training(tmp_path, "torchrun", TORCHRUN, STUCK, "train.stop_seconds=1") as one:
        one.until("trainer-0", "trainer-1")
        one.send(signal.SIGTERM)
        assert one.end() != 0
    for rank in (0, 1):
        words = f"dtrain: stopped by SIGTERM; rank {rank} was terminated; it did not stop within train.stop_seconds."
        assert one.text.count(words) == 1, one.text
    assert one.text.count("dtrain: stopping on request (SIGTERM), saving a checkpoint.") == 1, one.text


def test_without_a_supervisor_the_rank_is_the_launchers_own_process(tmp_path: Path) -> None:
    with training(tmp_path, "torchrun", TORCHRUN, "time.sleep(0.05)", "epochs=100", "--no-supervisor") as one:
        one.until("trainer-0", "trainer-1")
        assert {trainer(tmp_path, rank).ppid() for rank in (0, 1)} == {one.process.pid}
        one.send(signal.SIGTERM)
        one.end()
