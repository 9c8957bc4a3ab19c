"""`KerasModel` gives what `train_model` gives, stops early, keeps the best weights, and its metrics are exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import run_ranks
from helpers.sweep import some
from sklearn.metrics import f1_score, roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

COLUMNS = ["epoch", "loss", "acc", "val_loss", "val_acc", "lr"]


def data(n: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return TensorDataset(x, (x.sum(dim=1, keepdim=True) + noise > 0).double())


def fresh_net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def accuracy(predictions, labels):
    return ((predictions > 0) == (labels > 0.5)).double().mean()


def loaders() -> tuple[Any, Any]:
    return DataLoader(data(29), batch_size=4, shuffle=True), DataLoader(data(11, seed=1), batch_size=4)


def both_ways(world) -> dict[str, Any]:
    """One rank: the histories of train_model and of both calling forms of fit."""
    import dtrain

    loss_func = nn.BCEWithLogitsLoss()

    def step(model, x, y):
        predictions = model(x)
        return {"loss": loss_func(predictions, y), "acc": accuracy(predictions, y)}

    net = fresh_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    frame = dtrain.train_model(
        net, 3, *loaders(), train_step=step, valid_step=step, optimizer=optimizer, verbose=False, world=world
    )
    results = {"function": frame[COLUMNS].to_dict("list")}
    for form in ("classic", "current"):
        model = dtrain.KerasModel(fresh_net())
        optimizer = torch.optim.SGD(model.net.parameters(), lr=0.5)
        model.compile(loss_func=loss_func, optimizer=optimizer, metrics_dict={"acc": accuracy})
        if form == "classic":
            frame = model.fit(3, *loaders(), 50, verbose=False, world=world)
        else:
            train, valid = loaders()
            frame = model.fit(train_data=train, val_data=valid, epochs=3, ckpt_path=None, verbose=False, world=world)
        results[form] = frame[COLUMNS].to_dict("list")
        results[f"{form} evaluated"] = model.evaluate(loaders()[1], world=world)
        results[f"{form} columns"] = list(frame.columns)
    predictions = model.predict(loaders()[1], world=world)
    with torch.no_grad():
        results["predicted"] = torch.equal(predictions, model.net(data(11, seed=1).tensors[0]))
        results["close"] = torch.allclose(predictions, model(data(11, seed=1).tensors[0]), rtol=1e-12)
    return results


@pytest.mark.parametrize("ranks", some([1, 3], [2]))
def test_fit_equals_train_model_to_the_last_digit(ranks: int) -> None:
    for found in run_ranks(both_ways, ranks):
        assert found["classic"] == found["function"]
        assert found["current"] == found["function"]
        assert found["classic columns"] == [*COLUMNS, "seconds", "samples_per_second"]
        last = {name: found["function"][name][-1] for name in ("val_loss", "val_acc")}
        assert found["classic evaluated"] == pytest.approx(last, abs=1e-12)
        assert found["close"]


def scripted(world, folder: str, scripts: list[Any]) -> list[dict[str, Any]]:
    """One rank: plays each script."""
    return [play(world, Path(folder) / str(number), *script[:2]) for number, script in enumerate(scripts)]


def play(world, folder: Path, values: list[float], form: dict[str, Any]) -> dict[str, Any]:
    """A net that counts its epochs, and a validation loss that follows a script by that count."""
    import dtrain

    net = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(net.weight)
    calls: list[int] = []

    def loss(predictions, labels):
        if net.training:  # the gradient is -1 at every sample: each epoch of one step adds 1 to the weight
            return -predictions.mean()
        calls.append(1)
        return predictions.mean() * 0 + values[round(net.weight.item()) - 1]

    model = dtrain.KerasModel(net, loss, optimizer=torch.optim.SGD(net.parameters(), lr=1.0))
    one = TensorDataset(torch.ones(4, 1).double(), torch.ones(4, 1).double())
    train, valid = DataLoader(one, batch_size=4), DataLoader(one, batch_size=4)
    form = {**form, "ckpt_path": str(folder / form.get("ckpt_path", "best.pt"))}
    frame = model.fit(train, valid, epochs=len(values), verbose=False, batch="global", world=world, **form)
    again = dtrain.KerasModel(nn.Linear(1, 1, bias=False).double())
    if world.is_main:
        again.load_ckpt(form["ckpt_path"])
    return {"epochs": len(frame), "weight": net.weight.item(), "saved": again.net.weight.item()}


NAN = float("nan")
SCRIPTS = [
    ([3.0, 2.0, 2.0, 2.5, 1.0], {"patience": 2}, 4, 2),  # an equal value is no new best
    ([3.0, 2.0, 2.0, 2.5, 1.0], {"patience": 3}, 5, 5),
    ([3.0, NAN, 2.0, NAN, NAN, 1.0], {"patience": 2}, 5, 3),
    ([1.0, 3.0, 2.0, 2.5, 9.0], {"patience": 2, "mode": "max"}, 4, 2),
    ([1.0, 3.0, 2.0], {"patience": None, "ckpt_path": "best.safetensors"}, 3, 1),
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_patience_ends_training_and_the_best_weights_are_restored_and_saved(tmp_path: Path, ranks: int) -> None:
    answers = run_ranks(scripted, ranks, folder=str(tmp_path), scripts=SCRIPTS)
    for number, (_, form, epochs, best) in enumerate(SCRIPTS):
        assert answers[0][number]["saved"] == best
        for answer in answers:
            assert (answer[number]["epochs"], answer[number]["weight"]) == (epochs, best)
        assert [path.name for path in (tmp_path / str(number)).iterdir()] == [form.get("ckpt_path", "best.pt")]


def with_torchmetrics(world, sizes: list[int]) -> list[dict[str, Any]]:
    """One rank: for each size of the validation set."""
    return [fit_with_torchmetrics(world, n_valid) for n_valid in sizes]


def fit_with_torchmetrics(world, n_valid: int) -> dict[str, Any]:
    """Metrics that are no means, over a ragged train set and a small validation set."""
    import torchmetrics

    import dtrain

    metrics = {
        "auc": torchmetrics.AUROC(task="binary"),
        "acc": accuracy,
        "f1": torchmetrics.F1Score(task="binary"),
    }
    # Probabilities: torchmetrics guesses from each batch's range whether it got logits.
    model = dtrain.KerasModel(nn.Sequential(fresh_net(), nn.Sigmoid()), nn.BCELoss(), metrics)
    model.compile(optimizer=torch.optim.SGD(model.net.parameters(), lr=0.0))  # the train metrics, too, are of this net
    train = DataLoader(data(29), batch_size=4, shuffle=True)
    valid = DataLoader(data(n_valid, seed=1), batch_size=2)
    frame = model.fit(2, train, valid, verbose=False, world=world)
    return {"history": frame.to_dict("list"), "columns": list(frame), "evaluated": model.evaluate(valid, world=world)}


@pytest.mark.parametrize("ranks", some([3], [1, 2]))
def test_metrics_that_are_no_means_are_exact(ranks: int) -> None:
    sizes = [11, 4, 2]  # in batches of 2: with 2 samples some ranks have none
    for answers in run_ranks(with_torchmetrics, ranks, sizes=sizes):
        for n_valid, found in zip(sizes, answers, strict=True):
            names = ["loss", "auc", "acc", "f1"]
            assert found["columns"][:9] == ["epoch", *names, *(f"val_{name}" for name in names)]
            for prefix, samples in (("", data(29)), ("val_", data(n_valid, seed=1))):
                for name, value in known_metrics(samples).items():
                    column = found["history"][prefix + name]
                    np.testing.assert_allclose(column, [value, value], atol=1e-6, err_msg=f"{name} {n_valid}")
            for name, value in found["evaluated"].items():
                assert value == pytest.approx(found["history"][name][-1], abs=1e-12)


def known_metrics(samples: TensorDataset) -> dict[str, float]:
    """scikit-learn's over all samples, for the net that never learns."""
    x, labels = samples.tensors
    with torch.no_grad():
        scores = fresh_net()(x).numpy()[:, 0]
    truth = labels.numpy()[:, 0]
    found = {"f1": f1_score(truth, scores > 0, zero_division=0)}
    return found | ({"auc": roc_auc_score(truth, scores)} if len(set(truth)) == 2 else {})


def refused(world, hows: list[str]) -> list[str]:
    return [refuse(world, how) for how in hows]


def refuse(world, how: str) -> str:
    import dtrain

    class Counter(nn.Module):
        def compute(self): ...
        def reset(self): ...

    train, valid = loaders()
    try:
        model = dtrain.KerasModel(fresh_net(), None if how == "loss" else nn.BCEWithLogitsLoss())
        if how == "metric":
            model.compile(metrics_dict={"acc": Counter()})
        form = {"monitor": {"monitor": "val_los"}, "mode": {"mode": "best"}, "epochs": {"epochs": 0}}.get(how, {})
        model.fit(train, valid, ckpt_path=None, verbose=False, world=world, **form)
    except dtrain.DtrainError as error:
        return str(error)
    return "trained"


REFUSALS = {
    "loss": "no loss: pass",
    "metric": "metrics_dict['acc'] is a Counter",
    "monitor": "no such column in the history. Did you mean 'val_loss'?",
    "mode": "mode = 'best'",
    "epochs": "epochs = 0",
}


def test_what_cannot_be_is_told() -> None:
    for told, message in zip(REFUSALS.values(), run_ranks(refused, 1, hows=list(REFUSALS))[0], strict=True):
        assert told in message


def test_summary_prints_the_net(capsys: pytest.CaptureFixture[str]) -> None:
    import dtrain

    dtrain.KerasModel(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))).summary(input_shape=(3,))
    assert "Total params: 21" in capsys.readouterr().out
