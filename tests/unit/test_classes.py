"""Labels and probabilities of a classifier's predictions, against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.errors import RecipeError, StepError
from dtrain.trainer.classes import classes_of, with_labels

NAMES = ["cat", "dog", "owl"]
LOGITS = torch.tensor([[0.0, math.log(2), 0.0], [math.log(6), math.log(3), 0.0]])
P = [[0.25, 0.5, 0.25], [0.6, 0.3, 0.1]]


def rows(**more: list[Any]) -> list[dict[str, Any]]:
    columns = {"label": ["dog", "cat"], "probability": [0.5, 0.6]}
    columns |= {f"probability_{name}": [row[k] for row in P] for k, name in enumerate(NAMES)} | more
    return [{k: pytest.approx(v[i]) if isinstance(v[i], float) else v[i] for k, v in columns.items()} for i in range(2)]


@pytest.mark.parametrize("given", [LOGITS, {"logits": LOGITS}, {"probabilities": torch.tensor(P)}])
def test_labels_and_probabilities(given: Any) -> None:
    assert with_labels(given, NAMES, ending=".csv") == rows()
    assert with_labels(given, NAMES, ending=".npy").tolist() == [pytest.approx(row) for row in P]


def test_other_parts_of_a_mapping_come_after_them() -> None:
    found = with_labels({"id": torch.tensor([7, 8]), "logits": LOGITS}, NAMES, ending=".jsonl")
    assert found == rows(id=[7, 8])


def test_log_probabilities_are_logits_too() -> None:
    assert with_labels(torch.log_softmax(LOGITS, 1), NAMES, ending=".csv") == rows()


def test_nothing_is_the_label_of_nan() -> None:
    (one,) = with_labels(torch.tensor([[0.0, float("nan"), 1.0]]), NAMES, ending=".csv")
    assert one["label"] is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.tensor(P), 'adds up to 1.*"probabilities"'),
        (torch.zeros(4, 2), r"names 3 classes, but the predictions are a tensor \(4, 2\)"),
        (torch.zeros(4), r"a tensor \(4,\)"),
        (["a", "b"], "the predictions are a list"),
        ({"scores": LOGITS}, "predict_step returned scores"),
        ({"probabilities": LOGITS * 9}, "below 0 or above 1"),
    ],
)
def test_what_is_no_classifier_s_is_refused(given: Any, words: str) -> None:
    with pytest.raises(StepError, match=words):
        with_labels(given, NAMES, ending=".csv")
    with pytest.raises(StepError, match=r"torch\.stack"):
        with_labels(torch.zeros(4, 1), ["no", "yes"], ending=".csv")


def test_who_names_the_classes() -> None:
    assert classes_of(None, Path("a.py"), None) is None
    assert classes_of(lambda: range(3), Path("a.py"), None) == ["0", "1", "2"]
    assert classes_of(lambda dl_train: dl_train, Path("a.py"), NAMES) == NAMES
    wrong: list[tuple[Any, str]] = [
        (NAMES, "not a function"),
        (lambda: "cat", "returned 'cat'"),
        (lambda: ["a", "a"], "each once"),
        (lambda: [], "two or more"),
        (lambda a, b: a, "takes nothing, or the training loader"),
    ]
    for build, words in wrong:
        with pytest.raises(RecipeError, match=f"a.py: build_classes .*{words}|{words}"):
            classes_of(build, Path("a.py"), None)
