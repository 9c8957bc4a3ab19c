"""`num_processes=N` from a notebook: as one process, and everything comes back."""

from __future__ import annotations

import re

import pytest
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
    said = cell.out.splitlines()
    said.remove("threads True")
    device, data, batch = said  # once, by rank 0
    assert device == "device: cpu (1 thread), 2 ranks, fp32; 57 parameters"
    assert data.startswith("data: 60 train, 21 valid samples; ")
    assert batch == '2 ranks x batch 5 = 10 samples per step; batch="global" keeps 5'
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
    device, data = cell.out.splitlines()  # before the first step
    assert re.fullmatch(r"device: cpu \(\d+ threads?\), 1 rank, fp32; 57 parameters", device)
    assert data == "data: 60 train, 21 valid samples; batch 5; 36 optimizer steps in 3 epochs"
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
    assert "all 2 ranks were terminated" in text


def test_neither_processes_nor_files_are_left_and_a_failure_changes_nothing(shown: dict[str, CellOutput]) -> None:
    assert shown["left"].out.splitlines() == ["[]", "[]", "True"]
