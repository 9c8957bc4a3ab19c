"""`num_processes=N` from a notebook, a script or a thread: as one process, and everything comes back."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Dtrain, children_of_tests, clean_environment
from helpers.notebooks import CellOutput, run_notebook

# --- a real kernel ------------------------------------------------------------------------------------

DEFINE = """
import os, sys, time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import dtrain

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    def forward(self, x):
        return self.layers(x)

class Spread(nn.Module):  # a test within a net: it fails, prints or waits on request
    def __init__(self, what=""):
        super().__init__()
        self.what, self.calls = what, 0
    def forward(self, x):
        self.calls += 1
        if self.what == "fail" and dtrain.rank() == 1 and self.calls == 3:
            raise ValueError("a bad sample")  # here
        if self.what == "wait" and self.calls == 3:
            print("now interrupt me")
            time.sleep(600)
        return x

def accuracy(predictions, labels):
    return ((predictions > 0) == (labels > 0.5)).float().mean()

torch.manual_seed(0)
x = torch.randn(60, 3)
y = (x.sum(1, keepdim=True) > 0).float()
dl_train = DataLoader(TensorDataset(x, y), 5, shuffle=True)
dl_valid = DataLoader(TensorDataset(x[:21], y[:21]), 5)

def model_of(net, **more):
    return dtrain.KerasModel(net, nn.BCEWithLogitsLoss(), {"acc": accuracy}, torch.optim.Adam(net.parameters(), lr=0.05))

net = Net()
model = model_of(net)
before = [(id(t), t.clone()) for t in (*net.parameters(), *net.buffers())]
"""
FIT = """
print("threads", torch.get_num_threads() > 0)  # what makes a fork unusable
torch.randn(500, 500) @ torch.randn(500, 500)
dfhistory = model.fit(2, dl_train, dl_valid, log_step_freq=2, num_processes=2, cpu=True)
dfhistory[["epoch", "val_acc"]]
"""
AFTER = """
now = [*net.parameters(), *net.buffers()]
print([i for i, _ in before] == [id(t) for t in now])
print([bool((old != new).any()) for (_, old), new in zip(before, now)])
print(model.optimizer.state_dict()["state"][0]["step"].item(), net.layers[1].num_batches_tracked.item())
print(model.evaluate(dl_valid, world=None)["val_loss"] - dfhistory["val_loss"].iloc[-1])
"""
AGAIN = """
dfhistory = model.fit(1, dl_train, dl_valid, num_processes=2, cpu=True, verbose=False)
print(model.optimizer.state_dict()["state"][0]["step"].item())
"""
FAIL = """
broken = nn.Sequential(Net(), Spread("fail"))
kept = [p.clone() for p in broken.parameters()]
model_of(broken).fit(2, dl_train, num_processes=2, cpu=True)
"""
UNPICKLABLE = """
dl_train.dataset.log = open(os.devnull, "w")
model.fit(2, dl_train, dl_valid, num_processes=2, cpu=True)
"""
INTERRUPT = """
del dl_train.dataset.log
waiting = nn.Sequential(Net(), Spread("wait"))
model_of(waiting).fit(2, dl_train, num_processes=2, cpu=True)
"""
LEFT = """
import glob, tempfile, psutil
print([p.cmdline() for p in psutil.Process().children(recursive=True)])
print(glob.glob(tempfile.gettempdir() + "/dtrain-*"))
print(all(torch.equal(a, b) for a, b in zip(kept, broken.parameters())))
"""
ALONE = """
other = Net()
dfhistory = model_of(other).fit(3, dl_train, dl_valid, cpu=True)
"""
CELLS = {
    "define": DEFINE,
    "fit": FIT,
    "after": AFTER,
    "again": AGAIN,
    "fail": FAIL,
    "unpicklable": UNPICKLABLE,
    "interrupt": INTERRUPT,
    "left": LEFT,
    "alone": ALONE,
}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CellOutput]:
    """What the notebook shows under each cell."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "tmp").mkdir()
    own_folder = f"import tempfile; tempfile.tempdir = {str(folder / 'tmp')!r}"
    return dict(
        zip(CELLS, run_notebook([own_folder + CELLS["define"], *list(CELLS.values())[1:]], folder), strict=True)
    )


def test_a_cell_shows_progress_and_history(shown: dict[str, CellOutput]) -> None:
    cell = shown["fit"]
    assert cell.error == ("", ""), cell.shown
    assert cell.err == ""
    assert cell.out.splitlines() == ["threads True"]
    table, curves = cell.page.split("</table>")
    cells = re.findall(r"<t[hd]>([^<]*)</t[hd]>", table)
    names, first, second = cells[:8], cells[8:16], cells[16:]
    assert names == ["epoch", "loss", "acc", "val_loss", "val_acc", "lr", "seconds", "samples_per_second"]
    assert (first[0], second[0], second[5]) == ("1", "2", "0.05")
    result = [line.split()[-2:] for line in cell.result.splitlines()[1:]]
    assert [[epoch, f"{float(value):.4g}"] for epoch, value in result] == [["1", first[4]], ["2", second[4]]]
    points = re.findall(r'points="([^"]*)"', curves)
    assert [len(curve.split()) for curve in points] == [2] * 4  # loss and acc, train and valid, over two epochs
    assert "<progress" not in cell.page  # all is over


def test_without_ranks_of_its_own_a_cell_shows_the_same(shown: dict[str, CellOutput]) -> None:
    cell = shown["alone"]
    assert cell.error == ("", ""), cell.shown
    assert cell.out == ""
    assert len(re.findall("<tr><td>", cell.page)) == 3
    assert "<svg" in cell.page
    assert shown["again"].page == ""  # verbose=False


def test_net_optimizer_and_buffers_are_the_callers_own_and_trained(shown: dict[str, CellOutput]) -> None:
    same, changed, steps, difference = shown["after"].out.splitlines()
    assert same == "True", shown["after"]
    assert "False" not in changed
    assert steps == "12.0 12"  # 60 samples, 2 ranks of 5, 2 epochs
    assert abs(float(difference)) < 1e-6
    assert shown["again"].out == "18.0\n", shown["again"]


def test_a_failing_rank_is_one_error_with_its_own_words(shown: dict[str, CellOutput]) -> None:
    cell = shown["fail"]
    name, text = cell.error
    assert name == "RankError"
    assert "at rank 1, epoch 1, train step 3" in text
    assert 'raise ValueError("a bad sample")  # here' in text
    assert "ValueError: a bad sample" in text
    assert text.count("Traceback") == 1
    assert text in cell.shown
    assert "call_on_ranks" not in cell.shown
    assert "Traceback" not in cell.out + cell.err


def test_what_cannot_be_sent_is_named_before_anything_starts(shown: dict[str, CellOutput]) -> None:
    name, text = shown["unpicklable"].error
    assert name == "UsageError"
    assert text.startswith("train_data.dataset.log is a _io.TextIOWrapper, which cannot be sent to the ranks (")
    assert "num_processes" in text
    assert shown["unpicklable"].out == ""


def test_an_interrupt_ends_all_ranks(shown: dict[str, CellOutput]) -> None:
    name, text = shown["interrupt"].error
    assert name == "KeyboardInterrupt", shown["interrupt"]
    assert "all 2 ranks are ended" in text


def test_neither_processes_nor_files_are_left_and_a_failure_changes_nothing(shown: dict[str, CellOutput]) -> None:
    assert shown["left"].out.splitlines() == ["[]", "[]", "True"]


# --- a script -----------------------------------------------------------------------------------------

LAYERS = """
from torch import nn

def layers():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
"""
# Without `if __name__ == "__main__":`; its nets, steps and metrics are __main__'s.
SCRIPT = """
import json, sys, threading
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import dtrain
from layers import layers

print("the script runs")
torch.set_default_dtype(torch.float64)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = layers()
    def forward(self, x):
        return self.layers(x)

def data(n, seed):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x.sum(1, keepdim=True) > 0).double())

def numbers(thing):
    if isinstance(thing, torch.Tensor):
        return thing.tolist()
    if isinstance(thing, dict):
        return {str(key): numbers(value) for key, value in thing.items()}
    return [numbers(value) for value in thing] if isinstance(thing, (list, tuple)) else thing

def history(frame):
    return frame.drop(columns=["seconds", "samples_per_second"]).to_dict("list")

def keras(n, fits, folder):
    torch.manual_seed(5)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95 ** step)
    metrics = {"width": lambda p, y: float(torch.zeros(1).element_size())}  # of the default type
    model = dtrain.KerasModel(net, nn.BCEWithLogitsLoss(), metrics, optimizer, scheduler)
    train, valid = DataLoader(data(29, 0), 4, shuffle=True), DataLoader(data(11, 1), 4, shuffle=True)
    model.evaluate(valid)  # leaves a generator in the loader's sampler
    frames = []
    for number in range(fits):
        path = f"{folder}/{n}-{number}.safetensors"
        frames.append(model.fit(train, valid, epochs=3, ckpt_path=path, batch="global", verbose=False, num_processes=n))
    saved = dtrain.KerasModel(Net())
    saved.load_ckpt(path)
    return {
        "histories": [history(frame) for frame in frames],
        "weights": numbers(net.state_dict()),
        "saved": numbers(saved.net.state_dict()),
        "optimizer": numbers(optimizer.state_dict()),
        "scheduler": numbers(scheduler.state_dict()),
        "mode": net.training,
    }

def tutorial(n):
    torch.manual_seed(5)
    net, average = Net(), None
    average = torch.optim.swa_utils.AveragedModel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)  # which only the step knows
    generator = torch.Generator().manual_seed(7)
    train, valid = DataLoader(data(29, 0), 4, shuffle=True, generator=generator), DataLoader(data(11, 1), 4)

    def train_step(model, x, y):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        return loss.item(), loss.item()

    def valid_step(model, x, y):
        loss = nn.functional.mse_loss(model(x), y)
        return loss, loss

    frame = dtrain.train_model(
        net, 2, train, valid, train_step=train_step, valid_step=valid_step, batch="global", verbose=False, num_processes=n
    )
    return {
        "history": history(frame),
        "weights": numbers(net.state_dict()),
        "average": numbers(average.state_dict()),
        "optimizer": numbers(optimizer.state_dict()),
        "generator": generator.get_state().tolist(),
    }

def in_a_thread(function, *arguments):
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments)))
    thread.start()
    thread.join()
    return results[0]

folder = sys.argv[1]
found = {
    "keras": [keras(1, 2, folder), keras(2, 2, folder)],
    "repeated": keras(2, 1, folder)["histories"],
    "tutorial": [tutorial(1), in_a_thread(tutorial, 2)],
}
with open(f"{folder}/found.json", "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script found with one process and with two ranks."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "mine").mkdir()
    (folder / "mine" / "layers.py").write_text(LAYERS)
    (folder / "mine" / "script.py").write_text(SCRIPT)
    done = Dtrain(folder).run(sys.executable, "mine/script.py", folder)
    assert done.code == 0, done.text
    assert done.out == "the script runs\n"  # once: no rank runs it again
    assert done.err == ""
    return json.loads((folder / "found.json").read_text())


def close(one: Any, other: Any, where: str = "") -> None:
    """Equal, numbers to 1e-9."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            close(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            close(*pair, f"{where}[{index}]")
    else:
        assert one == (pytest.approx(other, abs=1e-9) if isinstance(one, float) else other), where


def test_two_ranks_give_what_one_process_gives(found: dict[str, Any]) -> None:
    one, two = found["keras"]
    assert two["histories"][0]["width"] == [8.0] * 3
    assert two["histories"][0]["epoch"] == [1, 2, 3]
    close(two, one)
    assert two["saved"] == two["weights"]
    assert two["histories"][0]["loss"] != two["histories"][1]["loss"]


def test_a_repeated_call_gives_the_same_to_the_last_digit(found: dict[str, Any]) -> None:
    assert found["repeated"][0] == found["keras"][1]["histories"][0]


def test_train_model_brings_back_what_its_step_reaches_also_from_a_thread(found: dict[str, Any]) -> None:
    one, two = found["tutorial"]
    close(two, one)


LAUNCHED = """
import json, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import dtrain

torch.manual_seed(5)
net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
x = torch.randn(29, 3)
dataset = TensorDataset(x, (x.sum(1, keepdim=True) > 0).float())
model = dtrain.KerasModel(net, nn.BCEWithLogitsLoss(), optimizer=torch.optim.SGD(net.parameters(), lr=0.5))
frame = model.fit(2, DataLoader(dataset, 4, shuffle=True), DataLoader(dataset, 4), cpu=True, verbose=False,
                  num_processes=int(sys.argv[1]) if sys.argv[1:] else None)
rows = frame.drop(columns=["seconds", "samples_per_second"]).to_dict("records")
dtrain.print_main(json.dumps([rows, [p.tolist() for p in net.parameters()]]))
"""


def test_two_ranks_give_what_a_launched_run_gives_to_the_last_digit(dtrain: Dtrain) -> None:
    (dtrain.folder / "script.py").write_text(LAUNCHED)
    here = dtrain.run(sys.executable, "script.py", 2)
    launched = dtrain("launch", "-n", 2, "--cpu", "script.py")
    assert here.code == launched.code == 0, here.text + launched.text
    assert json.loads(here.out) == json.loads(launched.out)
    assert list(dtrain.folder.iterdir()) == [dtrain.folder / "script.py"]


WAITING = """
import time
import torch
from torch import nn
import dtrain

def step(model, x):
    print("waiting", flush=True)
    time.sleep(600)

net = nn.Linear(1, 1)
dtrain.train_model(net, 1, [torch.ones(2, 1)] * 2, train_step=step, num_processes=2, cpu=True)
"""


def test_ranks_do_not_outlive_a_killed_caller(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(WAITING)
    caller = subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=clean_environment(TMPDIR=str(tmp_path)),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert caller.stdout is not None
    with caller:
        assert any(line.endswith("waiting\n") for line in caller.stdout)  # reads until it comes
        found = children_of_tests()
        caller.kill()
    assert len(found) == 4  # the caller, two ranks, and what ends their workers should the caller be killed
    deadline = time.monotonic() + 30
    while children_of_tests() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children_of_tests() == []
