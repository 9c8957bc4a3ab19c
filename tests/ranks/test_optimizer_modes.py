"""Optimizers with `train()` and `eval()` (schedule-free): they are switched, and a plain loop gives the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dtrain
from dtrain.config import load_settings
from dtrain.distributed.world import World, bring_up
from dtrain.engine.averaged import weight_average
from dtrain.engine.options import RunOptions
from dtrain.trainer.train import train_run

RECIPE = '''
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Free(torch.optim.Optimizer):
    """Schedule-free SGD: in training mode the parameters are y = (1 - b) z + b x, in eval mode x."""

    def __init__(self, params, lr, beta=0.5):
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    @torch.no_grad()
    def _switch(self, train):
        for g in self.param_groups:
            if g["train_mode"] != train:
                for p in g["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], 1 - g["beta"] if train else 1 - 1 / g["beta"])
                g["train_mode"] = train

    def train(self):
        self._switch(True)

    def eval(self):
        self._switch(False)

    @torch.no_grad()
    def step(self, closure=None):
        for g in self.param_groups:
            if not g["train_mode"]:
                raise RuntimeError("Free: call optimizer.train() before training")
            g["k"] += 1
            for p in g["params"]:
                z = self.state[p].setdefault("z", p.clone())
                x = (p - (1 - g["beta"]) * z) / g["beta"]
                z.sub_(p.grad, alpha=g["lr"])
                x = x + (z - x) / g["k"]
                p.copy_((1 - g["beta"]) * z + g["beta"] * x)


def data():
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, x[:, :1] * x[:, 1:2] + 0.5


def build_model(by: str = "nobody"):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model.by = by
    return model


def build_dataloaders():
    data_set = TensorDataset(*data())
    return DataLoader(data_set, 4), DataLoader(data_set, 4)


def build_optimizer(model, lr: float = 0.1):
    return Free(model.parameters(), lr)


def train_step(model, x, y):
    loss = (model(x) - y).square().mean()
    if model.by == "imperative":
        model.optimizer.zero_grad()
        loss.backward()
        model.optimizer.step()
        return {"loss": loss.detach()}
    return {"loss": loss}


def valid_step(model, x, y):
    return {"loss": (model(x) - y).square().mean()}
'''
SPACE: dict[str, Any] = {}
exec(RECIPE, SPACE)  # noqa: S102 - the text above
EPOCHS = 3


def by_hand() -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Validation losses, and the weights for use and for training at the end."""
    net, (x, y), losses = SPACE["build_model"](), SPACE["data"](), []
    optimizer, used = SPACE["Free"](net.parameters(), 0.1), {}
    for _ in range(EPOCHS):
        optimizer.train()
        for rows in torch.arange(32).split(4):
            optimizer.zero_grad()
            (net(x[rows]) - y[rows]).square().mean().backward()
            optimizer.step()
        trained = {name: value.clone() for name, value in net.state_dict().items()}
        optimizer.eval()
        used = net.state_dict()
        with torch.no_grad():
            losses.append(float((net(x) - y).square().mean()))
    return losses, used, trained


def start(folder: Path, *words: str, name: str = "it", world: World | None = None) -> Path:
    file = folder / "mine.py"
    if not file.exists():
        file.write_text(RECIPE)
    named = [f"run.dir={folder}", f"run.name={name}", f"epochs={EPOCHS}", "train.batch=global"]
    return train_run(load_settings(str(file), [*named, *words], environ={}), world or bring_up(cpu=True))


def on_ranks(world: World, folder: str) -> dict[str, Any]:
    start(Path(folder), name="ranks", world=world)
    net, (x, y) = SPACE["build_model"](), SPACE["data"]()
    loaders = [DataLoader(TensorDataset(x, y), 4) for _ in "tv"]
    steps = {name: SPACE[name] for name in ("train_step", "valid_step")}
    optimizer = SPACE["Free"](net.parameters(), 0.1)
    how = {"optimizer": optimizer, "batch": "global", "verbose": False, "world": world}
    frame = dtrain.train_model(net, EPOCHS, *loaders, **steps, **how)
    used = [value.tolist() for value in net.state_dict().values()]
    return {"losses": frame["val_loss"].tolist(), "used": used, "mode": optimizer.param_groups[0]["train_mode"]}


def test_what_is_validated_and_saved_is_the_average_on_1_and_2_ranks(tmp_path: Path) -> None:
    losses, used, trained = by_hand()
    for name, words in (("plain", ()), ("step", ("model.by=imperative",))):
        run = start(tmp_path, *words, name=name)
        assert dtrain.read_history(run)["val_loss"].tolist() == pytest.approx(losses, rel=1e-10)
        saved = load_file(run / f"checkpoints/epoch-{EPOCHS}/model.safetensors")
        assert all(torch.allclose(saved[key], used[key], rtol=1e-10, atol=1e-12) for key in used)
        assert not torch.allclose(saved["0.weight"], trained["0.weight"], rtol=1e-3)
    for found in run_ranks(on_ranks, 2, folder=str(tmp_path)):
        assert found["losses"] == pytest.approx(losses, rel=1e-9)
        assert found["mode"] is False, "the net has the average in the end, and the optimizer knows"
        for value, expected in zip(found["used"], used.values(), strict=True):
            assert torch.allclose(torch.tensor(value, dtype=torch.float64), expected, rtol=1e-9, atol=1e-12)
    assert dtrain.read_history(tmp_path / "ranks")["val_loss"].tolist() == pytest.approx(losses, rel=1e-9)


def test_how_often_is_validated_saved_and_resumed_changes_no_bit(tmp_path: Path) -> None:
    columns = ["epoch", "loss", "val_loss"]
    frame = dtrain.read_history(start(tmp_path, name="plain"))[columns]
    often = ("checkpoint.every_steps=1", "checkpoint.keep_last=99", "train.val_every_steps=3")
    for cut in ("epoch-1", "epoch-2-step-5"):
        run = start(tmp_path, *often, name=cut)
        assert dtrain.read_history(run)[columns].equals(frame)
        last = f"checkpoints/epoch-{EPOCHS}"
        before = {file: load_file(run / last / file) for file in ("model.safetensors", "state.safetensors")}
        for path in sorted((run / "checkpoints").iterdir()):
            if path.name not in ("epoch-1", cut):
                path.rename(run / path.name)
        start(tmp_path, name=cut)
        assert dtrain.read_history(run)[columns].equals(frame)
        for file, values in before.items():
            again = load_file(run / last / file)
            assert again.keys() == values.keys() and all(torch.equal(again[key], values[key]) for key in values)


def test_an_average_of_it_is_refused_and_others_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(
        dtrain.UsageError, match=r"ema_decay = 0\.9: Free averages the weights itself.*Remove ema_decay"
    ):
        start(tmp_path, "train.ema_decay=0.9")
    assert not (tmp_path / "it").exists()
    net = nn.Linear(2, 1)
    plain = torch.optim.SGD(net.parameters(), 0.1)
    assert weight_average(net, plain, RunOptions(), lambda: 4) is None
    from accelerate.optimizer import AcceleratedOptimizer

    wrapped = AcceleratedOptimizer(plain, device_placement=False)  # it has train() and eval() in any case
    assert weight_average(net, wrapped, RunOptions(), lambda: 4) is None
