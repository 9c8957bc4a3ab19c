"""build_metrics(): torchmetrics objects that a recipe's steps feed; against scikit-learn over all samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from helpers.commands import Dtrain
from helpers.ranks import run_ranks
from helpers.sweep import some
from sklearn.datasets import load_digits
from sklearn.metrics import f1_score, roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

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
        ("{'f1': 0.5}", "'f1' is a float, neither a single torchmetrics metric nor a function of all samples'"),
        ("{'f1': lambda p, y: 0}", "metric 'f1' is never updated"),
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
    assert "build_metrics must not have required parameters, but has classes" in done.err


class Outside(torchmetrics.Metric):
    """Keeps its value where no other rank sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), "sum")
        self.last = 0.0

    def update(self, values: torch.Tensor) -> None:
        self.total += values.sum()
        self.last = float(values.max())

    def compute(self) -> torch.Tensor:
        return torch.tensor(self.last)


class Boxes(torchmetrics.Metric):
    """As detection's: lists with an entry for each sample, of unequal shapes; the value depends on their order."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("boxes", [], dist_reduce_fx=None)
        self.add_state("masks", [], dist_reduce_fx=None)

    def update(self, boxes: list[torch.Tensor], masks: list[bytes]) -> None:
        self.boxes += boxes
        self.masks += [((2, 3), mask) for mask in masks]

    def compute(self) -> torch.Tensor:
        each = [place * box.sum() / len(box) for place, box in enumerate(self.boxes, start=1)]
        return torch.stack(each).sum() + 1000 * sum(place * mask[1][0] for place, mask in enumerate(self.masks))


def boxes_of(x: torch.Tensor, y: torch.Tensor) -> dict[str, list[Any]]:
    """One or two boxes for each sample."""
    many = [1 + int(label) for label in y]
    return {
        "boxes": [value.repeat(count, 4) for value, count in zip(x, many, strict=True)],
        "masks": [bytes([count]) for count in many],
    }


def values_of_metrics(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(n)
    return torch.rand(n, 1, generator=draw), torch.randint(0, 2, (n,), generator=draw)


def rows_of(world, counts: list[int], broken: bool) -> list[Any]:
    """One rank: the rows of short runs, each over so many samples in batches of 2, of which ranks may have none."""
    answers: list[Any] = []
    for n in counts:
        for mode in ("per_rank", "global"):
            metrics = {
                "auroc": torchmetrics.AUROC(task="binary"),
                "f1": torchmetrics.F1Score(task="binary"),
                "mean": torchmetrics.MeanMetric(),
                "cat": torchmetrics.SpearmanCorrCoef(),
                "boxes": Boxes(),
            }
            metrics |= {"outside": Outside()} if broken else {}
            net = nn.Linear(1, 1)
            net.optimizer = torch.optim.SGD(net.parameters(), lr=0.0)  # type: ignore[assignment]

            def step(model, x, y, broken=broken):
                loss = (model(x) * 0).mean()
                if model.training:
                    return {"loss": loss}
                fed = {"auroc": (x[:, 0], y), "f1": (x[:, 0], y), "mean": x, "cat": (x[:, 0], y.float())}
                fed["boxes"] = boxes_of(x, y)
                return {"loss": loss, **fed} | ({"outside": x} if broken else {})

            data = TensorDataset(*values_of_metrics(n))
            loaders = [DataLoader(TensorDataset(*values_of_metrics(6)), 2), DataLoader(data, 2)]
            try:
                frame = library.train_model(
                    net,
                    2,
                    *loaders,
                    train_step=step,
                    valid_step=step,
                    metrics=metrics,
                    batch=mode,
                    verbose=False,
                    world=world,
                )
                answers.append(frame.drop(columns=["seconds", "samples_per_second"]).to_dict("records"))
            except library.StepError as error:
                answers.append(str(error))
    return answers


@pytest.mark.parametrize("ranks", some([3], [1, 2]))
def test_all_ranks_have_the_values_of_all_samples(ranks: int) -> None:
    counts = [3, 7]  # on 3 ranks with batches of 2: one rank has none; the last batch is ragged
    answers = run_ranks(rows_of, ranks, counts=counts, broken=False)
    assert all(answer == answers[0] for answer in answers), "every rank's rows, to the last bit"
    for number, rows in enumerate(answers[0]):
        scores, labels = (part.numpy() for part in values_of_metrics(counts[number // 2]))
        for row in rows:
            assert row["val_auroc"] == pytest.approx(roc_auc_score(labels, scores[:, 0]), rel=1e-6)
            assert row["val_f1"] == pytest.approx(f1_score(labels, scores[:, 0] > 0.5), rel=1e-6)
            assert row["val_mean"] == pytest.approx(scores.mean(), rel=1e-6)
            spearman = np.corrcoef(scores[:, 0].argsort().argsort(), _mean_ranks(labels))[0, 1]
            assert row["val_cat"] == pytest.approx(spearman, rel=1e-5)
            places = np.arange(len(labels))
            boxes = (4 * (places + 1) * scores[:, 0]).sum() + 1000 * (places * (1 + labels)).sum()
            assert row["val_boxes"] == pytest.approx(boxes, rel=1e-6), "in the data's order"


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    return np.array([np.mean([np.sum(values < value) + 1, np.sum(values <= value)]) for value in values])


def test_values_that_differ_between_ranks_are_told_on_each() -> None:
    for answers in run_ranks(rows_of, 2, counts=[7], broken=True):
        assert all("metric 'outside' has different values on the ranks" in answer for answer in answers)
        assert all("on rank 0, " in answer and "on rank 1." in answer for answer in answers)
