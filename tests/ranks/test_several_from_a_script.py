"""`num_processes=N` from a script or a thread: as one process, and everything comes back."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Dtrain, children_of_tests, clean_environment

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
        assert n == 1 or "torch._dynamo.eval_frame" not in sys.modules, "the rank loaded what only torch.compile needs"
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
    deadline = time.monotonic() + 90
    while children_of_tests() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children_of_tests() == []
