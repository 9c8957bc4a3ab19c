"""The average of the weights: a recursion in NumPy over the weights of each step; validated with, saved and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.callbacks import on
from helpers.commands import Dtrain
from helpers.ranks import run_ranks
from helpers.sweep import some
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dtrain as library
from dtrain.distributed.world import bring_up

DECAY = 0.8
X = torch.randn(22, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = X.sum(dim=1, keepdim=True) * 2


def averaged(world, kinds: list[str]) -> dict[str, Any]:
    """One rank: by kind of step, the weights after each step, what validation saw, the history, and the end."""
    found = {}
    for kind in kinds:
        torch.manual_seed(4)
        net = nn.Linear(3, 1).double()
        steps: list[list[float]] = []
        seen: list[list[float]] = []
        net.optimizer = torch.optim.SGD(net.parameters(), lr=0.05)  # type: ignore[assignment]
        net.optimizer.register_step_post_hook(lambda *_, net=net, steps=steps: steps.append(net.weight[0].tolist()))

        def step(model, x, y, kind=kind, seen=seen):
            loss = ((model(x) - y) ** 2).mean()
            if not model.training:
                seen.append(model.weight[0].tolist())
            elif kind == "imperative":
                model.optimizer.zero_grad()
                loss.backward()
                model.optimizer.step()
                return loss.item()
            return loss

        loaders = [DataLoader(TensorDataset(X, Y), batch_size=size) for size in (6, 22)]
        frame = library.train_model(
            net,
            3,
            *loaders,
            train_step=step,
            valid_step=step,
            ema_decay=DECAY,
            batch="global",
            verbose=False,
            world=world,
        )
        found[kind] = [steps, seen, frame["val_loss"].tolist(), net.weight[0].tolist(), net.bias.item()]
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_average_is_numpys_recursion_and_what_validation_has(ranks: int) -> None:
    for rank, found in enumerate(run_ranks(averaged, ranks, kinds=["imperative", "declarative"])):
        for steps, seen, losses, weight, bias in found.values():
            average, after = np.array(steps[0]), []
            for number, weights in enumerate(steps):
                average = average if number == 0 else DECAY * average + (1 - DECAY) * np.array(weights)
                after.append(average)
            assert len(steps) == 12
            np.testing.assert_allclose(weight, after[-1], rtol=1e-12)
            if rank == 0:  # the other ranks may have no share of one batch
                np.testing.assert_allclose(seen, after[3::4], rtol=1e-12)
            prediction = X.numpy() @ after[-1] + bias
            assert losses[-1] == pytest.approx(np.mean((prediction - Y.numpy()[:, 0]) ** 2), rel=1e-9)


@pytest.mark.parametrize("ranks", some([2], [1]))
def test_a_run_saves_the_average_and_goes_on_with_both(dtrain: Dtrain, recipes: Path, ranks: int) -> None:
    """Cut off within an epoch and gone on with, it ends as if it had not been; and what is saved is what was validated."""
    words = ["train", recipes / "small.py", "-n", ranks, "--cpu", "train.ema_decay=0.7", "checkpoint.every_steps=1"]
    words += ["epochs=3", "checkpoint.keep_last=99", "n_train=20"]
    runs = dtrain.folder / "runs"
    for name in ("whole", "cut"):
        done = dtrain(*words, f"run.name={name}")
        assert done.code == 0, done.text
    for path in (runs / "cut/checkpoints").iterdir():
        if path.name not in ("epoch-1", "epoch-2-step-1"):
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    done = dtrain(*words, "run.name=cut")
    assert done.code == 0 and "resuming from runs/cut/checkpoints/epoch-2-step-1" in done.out, done.text
    ends = [load_file(runs / name / "checkpoints/epoch-3/model.safetensors") for name in ("whole", "cut")]
    states = [load_file(runs / name / "checkpoints/epoch-3/state.safetensors") for name in ("whole", "cut")]
    for one, two in (ends, states):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    row = library.read_history(runs / "whole").iloc[-1]
    done = dtrain("evaluate", "runs/whole", "--checkpoint", "last")
    assert f"val_loss = {row['val_loss']:.6f}"[:18] in done.out, done.text
    trained = next(tensor for name, tensor in states[0].items() if "trained weights" in name and tensor.shape == (1, 3))
    assert not torch.equal(trained, ends[0]["weight"])


def test_weights_of_two_names_are_saved_as_one(dtrain: Dtrain, recipes: Path) -> None:
    words = ["train", recipes / "tied.py", "--cpu", "train.ema_decay=0.9", "checkpoint.keep_last=99"]
    for name, epochs in (("whole", 4), ("cut", 2), ("cut", 4)):
        done = dtrain(*words, f"epochs={epochs}", f"run.name={name}")
        assert done.code == 0, done.text
    saved = load_file(dtrain.folder / "runs/whole/checkpoints/epoch-4/model.safetensors")
    assert torch.equal(saved["encode.weight"], saved["decode.weight"])
    frames = [library.read_history(dtrain.folder / "runs" / name) for name in ("whole", "cut")]
    assert frames[0]["val_loss"].tolist() == frames[1]["val_loss"].tolist()
    done = dtrain("evaluate", "runs/whole", "--checkpoint", "last", "--cpu")
    assert f"val_loss = {frames[0]['val_loss'].iloc[-1]:.6f}"[:18] in done.out, done.text


def plain_average(steps: list[dict[str, np.ndarray]], decay: float) -> dict[str, np.ndarray]:
    """The recursion in float64, of all parameters, also while they are frozen."""
    average = steps[0]
    for weights in steps[1:]:
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
    return average


def moving(world, dtype: str, decay: float, changes: dict[str, bool], sharded: bool) -> dict[str, Any]:
    """One rank: trains with some layers frozen and unfrozen at some steps; the weights of each step, and the average."""
    from dtrain.distributed.dtensor import whole_tensor
    from dtrain.distributed.fsdp_settings import Sharding
    from dtrain.engine.loop import Engine
    from dtrain.engine.options import RunOptions
    from dtrain.engine.train_step import Task

    torch.manual_seed(5)
    kind = getattr(torch, dtype)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(kind)
    for name in changes:
        first = min(key for key in changes if key.startswith(name.partition("@")[0]))
        net[int(name[0])].requires_grad_(not changes[first])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    steps: list[dict[str, Any]] = []
    seen: list[str] = []

    def note(_: Any) -> None:
        whole = {name: whole_tensor(p) for name, p in net.named_parameters()}
        steps.append({name: tensor.double().tolist() for name, tensor in whole.items()})

    def step(model, x, y):
        if not model.training:
            seen.append(str(model[0].weight.dtype))
            return {"loss": ((model(x.to(kind)).double() - y) ** 2).mean()}
        for change, learns in changes.items():
            layer, at = change.split("@")
            if len(steps) == int(at):
                model[int(layer)].requires_grad_(learns)
        return {"loss": ((model(x.to(kind)).double() - y) ** 2).mean()}

    loader = DataLoader(TensorDataset(X, Y), batch_size=6)
    how = {"sharding": Sharding(modules=())} if sharded else {}
    task = Task(net, step, loader, step, loader, optimizer)
    engine = Engine(task, world, epochs=3, options=RunOptions(batch="global", ema_decay=decay), **how)
    engine.callbacks.add(on(on_step_end=note))
    engine.fit()
    kept = {name: whole_tensor(value) for name, value in engine.average.weights().items()}
    exact = {name: whole_tensor(value) for name, value in engine.average.exact().items()}
    return {
        "steps": steps,
        "seen": sorted(set(seen)),
        "kept": {name: [str(value.dtype), value.double().tolist()] for name, value in kept.items()},
        "exact": {name: [str(value.dtype), value.double().tolist()] for name, value in exact.items()},
    }


@pytest.mark.parametrize(
    ("ranks", "dtype", "decay", "changes", "sharded"),
    [
        (1, "bfloat16", 0.99, {}, False),
        (1, "float64", 0.8, {"0@3": True}, False),
        (1, "float16", 0.9, {"0@2": True, "2@5": False}, False),
        (1, "float64", 0.8, {"0@0": True, "2@1": False, "2@7": True}, False),
        *some([(2, "bfloat16", 0.9, {}, True)], [(2, "bfloat16", 0.99, {}, False)]),
    ],
)
def test_the_average_is_kept_in_float32_at_least_and_joined(
    ranks: int, dtype: str, decay: float, changes: dict[str, bool], sharded: bool
) -> None:
    how: dict[str, Any] = {"dtype": dtype, "decay": decay, "changes": changes, "sharded": sharded}
    for found in [moving(bring_up(cpu=True), **how)] if ranks == 1 else run_ranks(moving, ranks, **how):
        steps = [{name: np.array(value) for name, value in step.items()} for step in found["steps"]]
        right = plain_average(steps, decay)
        narrow = dtype != "float64"
        assert found["seen"] == [f"torch.{dtype}"], "validation has the net's own type"
        assert {kind for kind, _ in found["kept"].values()} == {f"torch.{dtype}"}
        assert set(found["exact"]) == (set(right) if narrow else set())
        for name, value in right.items():
            kind, average = found["exact"][name] if narrow else found["kept"][name]
            assert kind == ("torch.float32" if narrow else "torch.float64")
            np.testing.assert_allclose(average, value, rtol=2e-6 if narrow else 1e-12, atol=1e-6 if narrow else 1e-14)
