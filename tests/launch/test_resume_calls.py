"""Runs that `train_model`, `KerasModel.fit` and scripts keep, killed at any time and called again: real processes.

DTRAIN_TEST_SWEEP=full pytest tests/launch/test_resume_calls.py    # fifty kills of each style, of a rank and of two
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.commands import Dtrain, clean_environment
from helpers.sweep import FULL, some

from dtrain.trainer.load import load

KILLS = 50 if FULL else 2
STEPS = 3 * (6 + 2)  # of the program: three epochs of six batches and two of validation


def told(text: str) -> str:
    """All numbers of the history and the weights to the last bit, as the program prints them at its end."""
    return text.partition("<<<")[2].partition(">>>")[0]


def killed_after(folder: Path, seconds: float, *argv: str) -> int:
    """Starts a program and kills all its processes after so long; returns its exit code where it ended before."""
    with (folder / "said").open("w") as said:
        how = {"cwd": folder, "env": clean_environment(), "stdout": said, "stderr": said}
        process = subprocess.Popen([sys.executable, *argv], start_new_session=True, **how)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait(60)


@pytest.mark.timeout(7200 if FULL else 300)
@pytest.mark.parametrize("style", ["train_model", "keras", "script"])
def test_killed_again_and_again_it_ends_as_if_it_had_not_been(dtrain: Dtrain, recipes: Path, style: str) -> None:
    program, draw, kills, starts = str(recipes / "calls.py"), random.Random(5), 0, 0
    began = time.monotonic()
    whole = dtrain.run("python", program, style, "runs/whole")
    seconds = time.monotonic() - began
    assert whole.code == 0 and told(whole.text), whole.text
    while kills < KILLS:
        if FULL and draw.random() < 0.5:
            code = killed_after(dtrain.folder, seconds * draw.uniform(0.3, 1), program, style, "runs/cut")
        else:
            code = dtrain.run("python", program, style, "runs/cut", DIE=str(draw.randint(1, STEPS // 2))).code
        starts += 1
        assert code in (0, -signal.SIGKILL), (dtrain.folder / "said").read_text() if FULL else code
        kills += code != 0
        if code == 0:
            shutil.rmtree(dtrain.folder / "runs/cut")  # once more, from the beginning
    done = dtrain.run("python", program, style, "runs/cut")
    assert done.code == 0, done.text
    assert told(done.text) == told(whole.text), f"after {kills} kills in {starts} starts"
    again = dtrain.run("python", program, style, "runs/cut")
    assert told(again.text) == told(whole.text), "a complete run gives back its history and weights"
    assert [p.name for p in (dtrain.folder / "runs/cut/checkpoints").iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("style", some(["train_model"], ["keras"]))
def test_on_ranks_that_the_call_starts(dtrain: Dtrain, recipes: Path, style: str) -> None:
    """One of two ranks is killed in the second epoch; then it goes on with two, and with one (batch="global")."""
    program, two = str(recipes / "calls.py"), {"RANKS": "2", "NORM": "LayerNorm"}  # BatchNorm's statistics are a rank's
    whole = dtrain.run("python", program, style, "runs/whole", **two)
    assert whole.code == 0, whole.text
    cut = dtrain.run("python", program, style, "runs/cut", DIE="10", **two)
    assert cut.code == 1 and "was killed by SIGKILL" in cut.text, cut.text
    assert (dtrain.folder / "runs/cut/failure.json").is_file()
    shutil.copytree(dtrain.folder / "runs/cut", dtrain.folder / "runs/one")
    done = dtrain.run("python", program, style, "runs/cut", **two)
    assert told(done.text) == told(whole.text), done.text
    one = dtrain.run("python", program, style, "runs/one", NORM="LayerNorm")
    assert one.code == 0, one.text
    pairs = [(run.text.partition("<<<")[2].splitlines()[1:4]) for run in (whole, one)]
    rows = [[[float(cell) for cell in line.split(",")] for line in lines] for lines in pairs]
    assert rows[0] == [pytest.approx(row, rel=1e-5) for row in rows[1]]


def test_a_script_on_two_ranks_is_tried_again_and_stopped_on_request(dtrain: Dtrain, recipes: Path) -> None:
    program = str(recipes / "calls.py")
    launch = ("launch", "-n", "2", "--cpu")
    whole = dtrain(*launch, "--", program, "script", "runs/whole")
    assert whole.code == 0, whole.text
    # Each attempt dies in its tenth step, and comes further than the one before.
    tried = dtrain(*launch, "--retries", "2", "--", program, "script", "runs/tried", DIE="10")
    assert tried.code == 0 and "retrying" in tried.text, tried.text
    assert told(tried.text) == told(whole.text)
    assert (dtrain.folder / "runs/tried/failure-1.json").is_file()
    stopped = dtrain(*launch, "--", program, "script", "runs/stopped", TERM_IN="5")
    assert stopped.code == 75 and "the same program again" in stopped.text, stopped.text
    done = dtrain(*launch, "--", program, "script", "runs/stopped")
    assert told(done.text) == told(whole.text), done.text


ACCUMULATING = """
import os, signal, torch, dtrain
from torch.utils.data import DataLoader, TensorDataset

class Count:
    n = 0
    def state_dict(self):
        return {"n": self.n}
    def load_state_dict(self, state):
        self.n = state["n"]

torch.manual_seed(0)
net, other, count = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1), Count()
both = [torch.optim.SGD(net.parameters(), 0.1), torch.optim.SGD(other.parameters(), 0.1)]
data = TensorDataset(torch.randn(24, 3), torch.randn(24, 1))
net, batches = dtrain.prepare(net, DataLoader(data, 4, shuffle=True), cpu=True)
run = dtrain.run("runs/" + os.environ["NAME"], net, other, *both, count, config={"checkpoint.every_steps": 1})
for epoch in run.epochs(2):
    for x, y in batches:
        (other(net(x)) - y).square().mean().backward()
        count.n += 1
        if count.n % 3 == 0:
            for one in both:
                one.step()
                one.zero_grad()
        if os.environ.get("DIE") == str(count.n):
            os.kill(os.getpid(), signal.SIGKILL)
    run.history.append({"epoch": epoch})
print("<<<", *(value.tolist() for part in (net, other) for value in part.parameters()), ">>>")
"""


def test_gradients_that_wait_for_their_step_are_kept(dtrain: Dtrain) -> None:
    """Killed within a group of three batches, in a script that accumulates gradients of two nets by hand."""
    (dtrain.folder / "mine.py").write_text(ACCUMULATING)
    whole = dtrain("launch", "-n", "1", "--cpu", "--", "mine.py", NAME="whole")
    for number in ("2", "6", "9"):
        assert dtrain("launch", "-n", "1", "--cpu", "--", "mine.py", NAME="cut", DIE=number).code == 1
    cut = dtrain("launch", "-n", "1", "--cpu", "--", "mine.py", NAME="cut")
    assert cut.code == 0 and told(cut.text) == told(whole.text) != "", cut.text
    net = torch.nn.Linear(3, 2)
    assert load(dtrain.folder / "runs/cut", "last", model=net) is net and str(net.bias.tolist()) in cut.text


FULL_DISK = """
import os, resource, signal, torch, dtrain
from torch.utils.data import DataLoader, TensorDataset

def room(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

torch.manual_seed(0)
data = TensorDataset(torch.randn(8, 64), torch.randn(8, 64))
net, batches = dtrain.prepare(torch.nn.Linear(64, 64), DataLoader(data, 4), cpu=True)
run = dtrain.run("runs/full", net, config={"checkpoint.keep_last": 9, "checkpoint.on_error": os.environ["POLICY"]})
for epoch in run.epochs(4):
    for x, y in batches:
        pass
    run.history.append({"epoch": epoch})
    room(4096 if epoch in (2, 4) else resource.RLIM_INFINITY)  # the history fits, and the weights do not
    if epoch == 4:
        os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_script_s_full_disk_ends_it_or_is_a_warning_but_never_where_it_stops(dtrain: Dtrain) -> None:
    (dtrain.folder / "mine.py").write_text(FULL_DISK)
    checkpoints = dtrain.folder / "runs/full/checkpoints"
    for policy, saved in (("stop", ["epoch-1"]), ("warn", ["epoch-1", "epoch-3"])):
        done = dtrain("launch", "-n", "2", "--cpu", "--", "mine.py", POLICY=policy)
        assert done.code == 1 and "File too large" in done.text, done.text
        assert done.text.count("a checkpoint could not be written; training continues") == 2 * (policy == "warn")
        assert sorted(path.name for path in checkpoints.glob("[!.]*")) == saved, done.text
