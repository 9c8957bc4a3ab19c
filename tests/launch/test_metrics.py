"""build_metrics(): torchmetrics objects that a recipe's steps feed; against scikit-learn over all samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.commands import Dtrain
from helpers.sweep import some
from sklearn.datasets import load_digits
from sklearn.metrics import f1_score, roc_auc_score

import dtrain as library


@pytest.mark.parametrize("ranks", some([2], [1, 3]))
def test_metrics_of_a_recipe_are_those_of_all_samples(dtrain: Dtrain, recipes: Path, ranks: int) -> None:
    done = dtrain("train", recipes / "scores.py", "epochs=2", "run.name=scores", "-n", ranks, "--cpu")
    assert done.code == 0, done.text
    assert "val_auroc" in done.out
    row = library.read_history(dtrain.folder / "runs/scores").iloc[-1]
    assert list(row.index[:6]) == ["epoch", "loss", "val_loss", "val_auroc", "val_f1", "val_mean_label"]
    dtrain("predict", "runs/scores", "--checkpoint", "last", "-o", "scores.npy")
    scores, labels = np.load(dtrain.folder / "scores.npy"), load_digits().target[300:401]
    assert row.val_auroc == pytest.approx(roc_auc_score(labels, scores, multi_class="ovr"), rel=1e-6)
    assert row.val_f1 == pytest.approx(f1_score(labels, scores.argmax(axis=1), average="macro"), rel=1e-6)
    assert row.val_mean_label == pytest.approx(labels.mean(), rel=1e-6)
    evaluated = dtrain("evaluate", "runs/scores", "--checkpoint", "last", "-n", ranks, "--cpu")
    assert f"val_auroc = {row.val_auroc:.6f}"[:18] in evaluated.out


@pytest.mark.parametrize(
    ("built", "told"),
    [
        ("[torchmetrics.AUROC(task='binary')]", "list is not a dict of names to single torchmetrics metrics"),
        ("{'f1': lambda p, y: 0}", "'f1' is a function, not a single torchmetrics metric"),
        ("torchmetrics.MetricCollection([torchmetrics.AUROC(task='binary')])", "give dict(collection.items())"),
        ("{'other': torchmetrics.AUROC(task='binary')}", "metric 'other' is never updated"),
    ],
)
def test_wrong_metrics_are_named(dtrain: Dtrain, recipes: Path, built: str, told: str) -> None:
    text = (recipes / "scores.py").read_text()
    start, stop = text.index('    return {\n        "auroc"'), text.index("def train_step")
    text = text[:start] + f"    return {built}\n\n\n" + text[stop:]
    for line in ('        "auroc": (probabilities, labels),\n', '        "mean_label": labels,\n'):
        text = text.replace(line, "")
    text = text.replace('        "f1": {"preds": probabilities, "target": labels},\n', "")
    (dtrain.folder / "scores.py").write_text(text)
    done = dtrain("train", "scores.py", "epochs=1")
    assert done.code == (0 if "never" in told else 2), done.text
    assert told in done.err


def test_a_builder_with_parameters_is_told_that_it_gets_none(dtrain: Dtrain, recipes: Path) -> None:
    text = (recipes / "scores.py").read_text()
    (dtrain.folder / "scores.py").write_text(text.replace("def build_metrics():", "def build_metrics(classes):"))
    done = dtrain("train", "scores.py")
    assert done.code == 2
    assert "build_metrics takes no parameters, but asks for classes" in done.err
