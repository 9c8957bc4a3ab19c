"""`dtrain train` as a user starts it: alone, on ranks, and under other launchers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from helpers.commands import BIN, MARK, Dtrain, clean_environment

import dtrain as package
from dtrain import read_history

CHECKOUT = Path(__file__).resolve().parents[2]


def test_the_first_command_trains_real_data_and_leaves_a_true_history(dtrain: Dtrain) -> None:
    done = dtrain("train")
    assert done.code == 0, done.text
    run = dtrain.run_folder()
    frame = read_history(run)
    assert list(frame.columns) == [
        "epoch", "loss", "accuracy", "val_loss", "val_accuracy", "lr", "seconds", "samples_per_second",
    ]  # fmt: skip
    assert len(frame) == 3
    assert frame["val_accuracy"].iloc[-1] >= 0.95
    for epoch, row in enumerate(frame.to_dict("records"), start=1):
        line = f"EPOCH = {epoch}, loss = {row['loss']:.4g}, accuracy = {row['accuracy']:.4g}, val_loss = {row['val_loss']:.4g}"
        assert line in done.out
    assert "[step = 10] loss: " in done.out
    best = frame.loc[frame["val_loss"].idxmin()]
    assert f"best epoch: {best['epoch']:.0f} (val_loss = {best['val_loss']:.4g})" in done.out
    assert f"run: runs/{run.name}" in done.out
    assert f"next: dtrain evaluate runs/{run.name}" in done.out
    assert (run / "config.yaml").is_file()
    assert done.err == ""


def test_the_bundled_net_with_its_dropout_writes_one_history_on_any_number_of_ranks(dtrain: Dtrain) -> None:
    frames = []
    for ranks in (1, 2, 3):
        words = ["batch=global", "epochs=2", "limit_batches=12", f"run.name=on-{ranks}"]
        done = dtrain("train", "-n", ranks, "--cpu", *words)
        assert done.code == 0, done.text
        frames.append(
            read_history(dtrain.folder / f"runs/on-{ranks}")[["loss", "accuracy", "val_loss", "val_accuracy"]]
        )
    for frame in frames[1:]:
        assert (frame - frames[0]).abs().to_numpy().max() < 1e-6


def test_a_recipe_that_trains_when_it_is_imported_is_refused_with_a_remedy(dtrain: Dtrain, recipes: Path) -> None:
    file = dtrain.folder / "cells.py"
    cells = (recipes / "tutorial_cells.py").read_text()
    loop = "for x, y in dl_train:\n    train_step(model, x, y)\n"
    warm_up = "other = nn.Linear(1, 1)\nother(torch.ones(1)).backward()\ntorch.optim.SGD(other.parameters()).step()\n"
    file.write_text(f"{cells}\n{warm_up}{loop}")
    line = file.read_text().splitlines().index("    train_step(model, x, y)") + 1
    done = dtrain("train", "cells.py", "epochs=1")
    assert done.code == 2
    assert f"{file}:{line}: trains the model while the recipe is imported" in done.err
    assert 'under `if __name__ == "__main__":`' in done.err
    guarded = "if __name__ == '__main__':\n    for x, y in dl_train:\n        train_step(model, x, y)\n"
    file.write_text(f"{cells}\n{warm_up}{guarded}")
    done = dtrain("train", "cells.py", "epochs=1")
    assert done.code == 0, done.text  # the step of another net, above it, is nobody's loss


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_tutorials_cells_run_unchanged(dtrain: Dtrain, recipes: Path, ranks: int) -> None:
    done = dtrain("train", recipes / "tutorial_cells.py", "epochs=2", "-n", ranks, "--cpu")
    assert done.code == 0, done.text
    frame = read_history(dtrain.run_folder())
    assert list(frame.columns[:5]) == ["epoch", "loss", "accuracy", "val_loss", "val_accuracy"]
    assert frame["loss"].iloc[1] < frame["loss"].iloc[0]
    assert frame["lr"].tolist() == [0.01, 0.01]
    assert done.out.count("EPOCH = 1,") == 1, "rank 0 alone speaks"


WORLD = """
import os, torch, torch.distributed as dist
from pathlib import Path
from torch import nn
size = dist.get_world_size() if dist.is_initialized() else 1
Path("world-" + os.environ.get("RANK", "0")).write_text(f"{size} {torch.get_num_threads()}")
model = nn.Linear(1, 1)
model.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
dl_train = [(torch.ones(2, 1), torch.ones(2, 1))] * 5
dl_valid = None
def train_step(model, x, y):
    loss = ((model(x) - y) ** 2).mean()
    return loss, loss.detach()
"""
FREE_PORT = ("--main_process_port", "0")
LAUNCHERS = {
    "dtrain": ([BIN / "dtrain"], 1),
    "python -m": ([sys.executable, "-m", "dtrain"], 1),
    "dtrain -n 2": ([BIN / "dtrain"], 2),
    "dtrain -n 3": ([BIN / "dtrain"], 3),
    "accelerate -m": ([BIN / "accelerate", "launch", "-m", "dtrain"], 1),
    "accelerate -m 2": ([BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", *FREE_PORT, "-m", "dtrain"], 2),
    "torchrun": ([BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "-m", "dtrain"], 2),
    "profile multi_cpu": (
        [BIN / "accelerate", "launch", "--config_file", CHECKOUT / "launch/multi_cpu.yaml", *FREE_PORT, "-m", "dtrain"], 2),
    "profile cpu": ([BIN / "accelerate", "launch", "--config_file", CHECKOUT / "launch/cpu.yaml", "-m", "dtrain"], 1),
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_each_launcher_brings_up_one_world(dtrain: Dtrain, launcher: str) -> None:
    argv, size = LAUNCHERS[launcher]
    (dtrain.folder / "mine.py").write_text(WORLD)
    more = ["-n", launcher[-1]] if "-n" in launcher else []
    done = dtrain.run(*argv, "train", "mine.py", "epochs=1", *more)
    assert done.code == 0, done.text
    worlds = {path.name: path.read_text().split()[0] for path in dtrain.folder.glob("world-*")}
    assert worlds == {f"world-{rank}": str(size) for rank in range(size)}
    assert done.out.count("EPOCH = 1,") == 1


def test_accelerate_launch_runs_the_folder_of_a_checkout(dtrain: Dtrain) -> None:
    copy = dtrain.folder / "dtrain"
    copy.symlink_to(CHECKOUT / "dtrain")
    # A module of the user's own that is named like one of dtrain's is not shadowed by it.
    (dtrain.folder / "history.py").write_text("OWN = True")
    (dtrain.folder / "mine.py").write_text("import history\nassert history.OWN\n" + WORLD)
    done = dtrain.run(BIN / "accelerate", "launch", "dtrain", "train", "mine.py", "epochs=1")
    assert done.code == 0, done.text
    assert (dtrain.folder / "world-0").read_text().startswith("1 ")


def test_accelerates_silent_single_process_is_refused(dtrain: Dtrain) -> None:
    (dtrain.folder / "mine.py").write_text(WORLD)
    done = dtrain.run(BIN / "accelerate", "launch", "--cpu", "--num_processes", 2, "-m", "dtrain", "train", "mine.py")
    assert "accelerate was asked for 2 processes but started 1" in done.err
    assert "dtrain train -n 2 --cpu" in done.err
    assert "exit status 2" in done.err
    assert not list(dtrain.folder.glob("world-*"))


def test_asked_and_launched_numbers_must_agree(dtrain: Dtrain) -> None:
    (dtrain.folder / "mine.py").write_text(WORLD)
    done = dtrain.run(
        BIN / "torchrun", "--standalone", "--nproc-per-node", 2, "-m", "dtrain", "train", "mine.py", "-n", 4
    )
    assert done.code != 0
    assert "-n 4 asks for 4 ranks, but the launcher started 2" in done.err


def test_threads_are_shared_among_ranks(dtrain: Dtrain) -> None:
    (dtrain.folder / "mine.py").write_text(WORLD)
    assert dtrain("train", "mine.py", "epochs=1", "-n", 2, "--cpu").code == 0
    assert dtrain("train", "mine.py", "epochs=1", OMP_NUM_THREADS="1").code == 0
    from dtrain.launch.env.threads import usable_cores

    assert (dtrain.folder / "world-1").read_text() == f"2 {max(1, usable_cores() // 2)}"
    assert (dtrain.folder / "world-0").read_text() == "1 1"


def test_dry_run_shows_values_places_and_sizes_and_starts_nothing(dtrain: Dtrain) -> None:
    done = dtrain("train", "configs/digits.yaml", "--dry-run", "-n", 4, "lr=1e-3", DTRAIN_RUN__DIR="elsewhere")
    assert done.code == 0, done.text
    table = {
        line.split()[0]: line.split(maxsplit=2)[1:] for line in done.out.splitlines() if line and "." in line.split()[0]
    }
    assert table["optimizer.lr"] == ["0.001", "command line"]
    assert table["run.dir"] == ["elsewhere", "environment DTRAIN_RUN__DIR"]
    assert table["data.valid_samples"] == ["359", "default of build_dataloaders"]
    assert table["train.epochs"][1].endswith("digits.yaml:19")
    for line in (
        "ranks 4",
        "batch per rank 16",
        "global batch size 64",
        "steps per epoch 23",
        "total optimizer steps 69",
    ):
        assert line in " ".join(done.out.split())
    assert list(dtrain.folder.iterdir()) == []


def started(dtrain: Dtrain, recipe: Path, *words: str) -> subprocess.Popen[str]:
    """A supervisor whose two ranks are both in a step that never ends."""
    process = subprocess.Popen(
        [BIN / "dtrain", "train", recipe, "model.fault=hang", "-n", "2", "--cpu", *words],
        cwd=dtrain.folder,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            return process
    raise AssertionError("the run did not start")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_no_rank_outlives_its_supervisor(dtrain: Dtrain, recipes: Path, number: signal.Signals) -> None:
    process = started(dtrain, recipes / "small.py")
    ranks = psutil.Process(process.pid).children(recursive=True)
    assert len(ranks) == 3  # two ranks, and what ends their workers
    assert process.stdout is not None
    process.send_signal(number)
    if number != signal.SIGKILL:  # a request, which a step that never ends does not heed
        assert any("Ctrl-C again to stop at once" in line for line in process.stdout)  # reads until it comes
        process.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    for rank in alive:
        rank.kill()
    process.wait(60)
    process.stdout.close()
    assert alive == []
    expected = -9 if number == signal.SIGKILL else 130
    assert process.returncode == expected


def test_without_wandb_it_is_not_loaded(dtrain: Dtrain, recipes: Path) -> None:
    (dtrain.folder / "mine.py").write_text(
        f"import sys\nsys.path.insert(0, {str(recipes)!r})\nfrom small import *\n"
        "def valid_step(model, x, y):\n    assert 'wandb' not in sys.modules\n    return ((model(x) - y) ** 2).mean()\n"
    )
    done = dtrain("train", "mine.py", "epochs=1")
    assert done.code == 0, done.text


def test_the_mark_finds_left_over_processes() -> None:
    from helpers.commands import children_of_tests

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=clean_environment()) as process:
        while not any(line.startswith(f"{process.pid} ") for line in children_of_tests()):
            assert process.poll() is None
    assert MARK not in os.environ
    assert package.__version__
