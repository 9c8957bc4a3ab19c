"""`dtrain.load`: a run's net in one call, compared with the file of its weights and with the run's history."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import run_ranks
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dtrain
from dtrain.config import load_settings
from dtrain.config.saved import load_run_settings
from dtrain.distributed.world import World, bring_up
from dtrain.trainer.evaluate import evaluate_run, restore_run
from dtrain.trainer.train import train_run

RECIPE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.register_buffer("scale", torch.ones(()), persistent=False)
        self.body = nn.Sequential(nn.Linear(3, hidden), nn.Dropout(0.5), nn.Linear(hidden, 1))

    def forward(self, x):
        return self.body(x) * self.scale

def build_model(hidden: int = 4):
    return Net(hidden)

def build_dataloaders(n: int = 16):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, x.sum(1, keepdim=True))
    return DataLoader(data, batch_size=4), DataLoader(data, batch_size=8)

def build_optimizer(model, lr: float = 0.2):
    return torch.optim.SGD(model.parameters(), lr=lr)

def train_step(model, x, y):
    model.scale.mul_(1.01)
    return {"loss": (model(x) - y).square().mean()}

def valid_step(model, x, y):
    return {"loss": (model(x) - y).square().mean()}
"""


def train(folder: Path, *words: str) -> Path:
    file = folder / "mine.py"
    file.write_text(RECIPE)
    named = [f"run.dir={folder}", "run.name=it", "epochs=3", "checkpoint.keep_last=9", *words]
    return train_run(load_settings(str(file), named, environ={}), bring_up(cpu=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The highest loss is "best", which is not the last one.
    more = ["train.ema_decay=0.9", "checkpoint.mode=max", "checkpoint.monitor=val_loss", "model.hidden=5"]
    return train(tmp_path_factory.mktemp("load"), *more, "parameters.freeze=[body.0.bias]")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copy(trained.parent / "mine.py", tmp_path)
    return Path(shutil.copytree(trained, tmp_path / "it"))


def valid_loss(net: nn.Module) -> float:
    """By hand: the mean over all 16 samples."""
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((net(x) - x.sum(1, keepdim=True)).double().square().mean())


def test_it_is_the_net_that_validation_had(trained: Path) -> None:
    history = dtrain.read_history(trained)
    for which, epoch in (("best", int(history["val_loss"].idxmax()) + 1), ("last", 3), ("epoch-2", 2)):
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        net = dtrain.load(trained, which)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
        assert not any(part.training for part in net.modules())
        saved = load_file(trained / f"checkpoints/epoch-{epoch}/model.safetensors")
        state = net.state_dict()
        assert state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in saved)
        assert state["body.0.weight"].shape == (5, 3), "the run's config"
        assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["body.0.bias"]
        assert float(net.scale) == pytest.approx(1.01 ** (4 * epoch), rel=1e-5), "a buffer that is not persistent"
        assert valid_loss(net) == pytest.approx(history["val_loss"][epoch - 1], rel=1e-6)
    assert dtrain.load(trained) is not dtrain.load(trained)
    restored = restore_run(trained, load_run_settings(trained, []), "last", bring_up(cpu=True))
    assert evaluate_run(restored, bring_up(cpu=True)).means["loss"] == pytest.approx(history["val_loss"][2], rel=1e-9)


def test_a_net_that_is_given_is_filled_and_returned(trained: Path, run: Path) -> None:
    (run.parent / "mine.py").unlink()
    space: dict[str, Any] = {}
    exec(RECIPE, space)  # noqa: S102 - the text above
    net = space["Net"](5).double().train()
    assert dtrain.load(run, "last", model=net) is net
    assert not net.training and net.body[0].weight.dtype is torch.float64
    assert torch.equal(net.body[2].weight.float(), dtrain.load(trained, "last").body[2].weight)
    with pytest.raises(
        dtrain.UsageError, match=r"body\.0\.weight has shape \(5, 3\) in the file, and has shape \(6, 3"
    ):
        dtrain.load(run, model=space["Net"](6))
    with pytest.raises(dtrain.UsageError, match=r"should be a torch[.]nn[.]Module"):
        dtrain.load(run, model="net")  # type: ignore[arg-type]


def test_a_checkpoint_and_a_folder_of_weights_alone_are_meant_too(run: Path, tmp_path: Path) -> None:
    one = dtrain.load(run / "checkpoints/epoch-2")
    assert torch.equal(one.body[0].weight, dtrain.load(run, "epoch-2").body[0].weight)
    folder = tmp_path / "mine"
    net = nn.Linear(2, 1)
    for epoch, loss in ((1, 0.5), (2, 0.7)):
        with torch.no_grad():
            net.weight.fill_(epoch)
        dtrain.save_weights(net, folder, {"epoch": epoch, "loss": loss})
    for which, value in (("best", 1.0), ("last", 2.0)):
        assert float(dtrain.load(folder, which, model=nn.Linear(2, 1)).weight[0, 0].detach()) == value
    with pytest.raises(
        dtrain.UsageError, match=re.escape("no config.yaml that says how the model is built. Pass it: ")
    ):
        dtrain.load(folder)


def test_what_is_wrong_is_named_with_a_remedy_that_works(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path, which, words in (
        (run / "nothing", "best", "no such run"),
        (run, "epoch-9", "has no checkpoint 'epoch-9'. Did you mean"),
        (run, "newest", "Use best, last, epoch-1, epoch-2, epoch-3."),
        (run / "checkpoints/epoch-2", "last", "is one checkpoint, and weights = 'last' another"),
    ):
        with pytest.raises(dtrain.UsageError, match=re.escape(words)):
            dtrain.load(path, which)
    with pytest.raises(dtrain.UsageError, match="device = 'nonsense': "):
        dtrain.load(run, device="nonsense")
    moved = (run.parent / "mine.py").rename(run.parent / "moved.py")
    config = run / "config.yaml"
    text = config.read_text()
    config.write_text(re.sub(r"recipe: .*", f"recipe: {run.parent}/gone.py", text))
    with pytest.raises(
        dtrain.RecipeError, match=r"config\.yaml: .*gone\.py.* recipe=PATH\); or pass a model: model=net"
    ):
        dtrain.load(run)
    net = dtrain.load(run, recipe=moved)
    config.write_text(text)
    file = run / "checkpoints/epoch-3/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(dtrain.UsageError, match=r"epoch-3/model\.safetensors.* is damaged"):
        dtrain.load(run, "last", recipe=moved)
    manifest = run / "checkpoints/epoch-1/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"epoch": 7}))
    assert not torch.equal(dtrain.load(run, recipe=moved).body[0].weight, net.body[0].weight)
    assert "epoch-1/manifest.json is damaged" in caplog.text, "another epoch is best then, which is said"


def test_a_net_in_a_modules_file_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = RECIPE.replace("def build_model(hidden: int = 4):\n    return Net(hidden)", "model = Net(4)")
    (tmp_path / "net_in_a_module.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    settings = load_settings("net_in_a_module", ["run.dir=runs", "run.name=it", "epochs=2"], environ={})
    run = train_run(settings, bring_up(cpu=True))
    first, second = dtrain.load(run, "epoch-1"), dtrain.load(run, "epoch-2")
    assert not torch.equal(first.body[0].weight, second.body[0].weight)
    assert valid_loss(first) == pytest.approx(dtrain.read_history(run)["val_loss"][0], rel=1e-6)


# --- on several ranks ---------------------------------------------------------------------------------


def loaded_at_once(world: World, folder: str, *, script: bool) -> bool:
    """Whether a rank loads what was trained, where rank 0 takes its time to put a checkpoint in place."""
    rename = os.rename

    def late(*paths: Any, **how: Any) -> None:
        time.sleep(0.3)
        rename(*paths, **how)

    os.rename = late  # type: ignore[assignment]
    torch.manual_seed(0)
    x = torch.randn(32, 3)
    net, loader = nn.Linear(3, 1), DataLoader(TensorDataset(x, x[:, :1]), 8)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    if script:
        trained, batches, optimizer = dtrain.prepare(net, loader, optimizer, cpu=True)
        run = dtrain.run(f"{folder}/script", trained, optimizer)
        for epoch in run.epochs(2):
            for features, labels in batches:
                optimizer.zero_grad()
                (trained(features) - labels).square().mean().backward()
                optimizer.step()
            run.history.append({"epoch": epoch})
    else:
        step = lambda model, x, y: {"loss": (model(x) - y).square().mean()}  # noqa: E731
        how: dict[str, Any] = {"optimizer": optimizer, "run": f"{folder}/call", "cpu": True, "verbose": False}
        dtrain.train_model(net, 2, loader, None, train_step=step, **how)
    found = dtrain.load(f"{folder}/{'script' if script else 'call'}", "last", model=nn.Linear(3, 1))
    return bool((found.weight == net.weight).all())


@pytest.mark.parametrize("script", [False, True])
def test_each_rank_loads_the_last_epoch_right_after_it(tmp_path: Path, *, script: bool) -> None:
    assert run_ranks(loaded_at_once, 2, folder=str(tmp_path), script=script) == [True, True]
