"""Metrics as plain functions of all samples: on any number of ranks what one process computes, in the data's order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import run_ranks
from sklearn.metrics import f1_score

import dtrain
from dtrain.checkpoint.tensors import read_file
from dtrain.checkpoint.tree import flatten, unflatten
from dtrain.config import load_settings
from dtrain.distributed.world import World, bring_up
from dtrain.engine.synced_metrics import check_metrics
from dtrain.engine.whole_set import WholeSet
from dtrain.errors import StepError, UsageError, notes_of
from dtrain.rundir.history import read_history
from dtrain.trainer.train import train_run

RECIPE = """
import numpy as np
import torch
from sklearn.metrics import f1_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dtrain


def build_model(fault: str = ""):
    model = nn.Linear(3, 4)
    model.fault = fault
    return model


def build_dataloaders(n: int = 26, m: int = 11):
    draw = torch.Generator().manual_seed(7)
    x, y = torch.randn(n, 3, generator=draw), torch.randint(4, (n,), generator=draw)
    data, other = TensorDataset(x, y), TensorDataset(x[:m], y[:m], torch.arange(m))
    return DataLoader(data, batch_size=4, shuffle=True), DataLoader(other, batch_size=2)


def build_optimizer(model, lr: float = 0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def macro(predictions, labels):
    return f1_score(labels, predictions, average="macro")


def order(numbers, tags, arrays, *, boxes):
    assert numbers.tolist() == list(range(len(numbers)))
    assert tags == ["tag" * (number % 3) for number in numbers.tolist()]
    assert isinstance(arrays, np.ndarray) and arrays[:, 1].tolist() == numbers.tolist()
    assert [len(box["boxes"]) for box in boxes] == [number % 4 for number in numbers.tolist()]
    assert all(float(box["score"]) == number for number, box in enumerate(boxes))
    return {"first": int(numbers[0]), "last": torch.tensor([numbers[-1]]), "boxes": sum(len(box["boxes"]) for box in boxes)}


def raises(predictions, labels):
    raise ZeroDivisionError("in the metric")


def build_metrics():
    return {"f1": macro, "order": order}


def train_step(model, x, y):
    logits = model(x)
    return {"loss": nn.functional.cross_entropy(logits, y), "f1": (logits.argmax(1), y)}


def valid_step(model, x, y, number):
    logits = model(x)
    numbers = number.tolist()
    seen = {
        "numbers": number,
        "tags": ["tag" * (one % 3) for one in numbers],
        "arrays": np.array([[0.5, one] for one in numbers]),
        "boxes": [{"boxes": torch.zeros(one % 4, 4), "score": float(one)} for one in numbers],
    }
    return {"loss": nn.functional.cross_entropy(logits, y), "f1": (logits.argmax(1), y), "order": seen}
"""


STOPS = """
def after_step(step, run):
    if step == 4 and (run.folder.parent / "stop").exists():
        raise KeyError("stop")
"""


def start(folder: Path, *words: str, world: World | None = None) -> Path:
    recipe = folder / "whole.py"
    if not recipe.exists():
        recipe.write_text(RECIPE)
    how = [f"run.dir={folder}", "run.name=it", "epochs=2", *words]
    return train_run(load_settings(str(recipe), how, {}), world or bring_up(cpu=True))


def of_ranks(world: World, folder: str, words: list[str]) -> None:
    start(Path(folder), *words, world=world)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch", ["global", "per_rank"])
def test_they_are_what_one_process_computes_of_all_samples(tmp_path: Path, ranks: int, batch: str) -> None:
    (tmp_path / "whole.py").write_text(RECIPE)
    run_ranks(of_ranks, ranks, folder=str(tmp_path), words=[f"train.batch={batch}", "val_every_steps=2"])
    row = read_history(tmp_path / "it").iloc[1]
    weights, _ = read_file(tmp_path / "it/checkpoints/epoch-2/model.safetensors")
    draw = torch.Generator().manual_seed(7)
    x, y = torch.randn(26, 3, generator=draw), torch.randint(4, (26,), generator=draw)
    logits = x[:11].double().numpy() @ weights["weight"].double().numpy().T + weights["bias"].double().numpy()
    assert row["val_f1"] == pytest.approx(f1_score(y[:11], logits.argmax(1), average="macro"), abs=1e-12)
    assert (row["val_order_first"], row["val_order_last"]) == (0, 10)
    assert row["val_order_boxes"] == sum(number % 4 for number in range(11))
    assert 0 < row["f1"] <= 1


def test_of_training_too_it_is_that_of_all_samples_also_where_it_was_resumed(tmp_path: Path) -> None:
    whole = read_history(start(tmp_path, "run.name=whole", "optimizer.lr=0.0", "epochs=1"))
    draw = torch.Generator().manual_seed(7)
    x, y = torch.randn(26, 3, generator=draw), torch.randint(4, (26,), generator=draw)
    weights, _ = read_file(tmp_path / "whole/checkpoints/epoch-1/model.safetensors")
    predicted = (x @ weights["weight"].T + weights["bias"]).argmax(1)
    assert whole["f1"][0] == pytest.approx(f1_score(y, predicted, average="macro"), abs=1e-12)
    text = f"{RECIPE}\n{STOPS}"
    (tmp_path / "whole.py").write_text(text)
    (tmp_path / "stop").touch()
    with pytest.raises(KeyError):
        start(tmp_path, "optimizer.lr=0.0", "epochs=1", "checkpoint.every_steps=2", "checkpoint.keep_last=9")
    (tmp_path / "stop").unlink()
    assert [path.name for path in (tmp_path / "it/checkpoints").iterdir()], "there is one within the epoch"
    again = read_history(start(tmp_path, "optimizer.lr=0.0", "epochs=1", "checkpoint.every_steps=2"))
    assert again["f1"].tolist() == whole["f1"].tolist()


def test_a_column_of_theirs_can_be_monitored(tmp_path: Path) -> None:
    run = start(tmp_path, "checkpoint.monitor=val_order_last", "checkpoint.mode=max")
    assert read_history(run)["val_order_last"].tolist() == [10, 10]
    with pytest.raises(dtrain.UsageError, match=r"checkpoint\.monitor = 'val_order_lost'.*'val_order_last'"):
        start(tmp_path, "run.name=other", "checkpoint.monitor=val_order_lost")


def test_another_column_that_is_mistyped_is_named_before_the_epoch_ends(tmp_path: Path) -> None:
    with pytest.raises(dtrain.UsageError, match=r"checkpoint\.monitor = 'val_los'.*'val_loss'"):
        start(tmp_path, "checkpoint.monitor=val_los")
    assert not (tmp_path / "it/history.csv").exists()


def one() -> World:
    return bring_up(cpu=True)


def test_one_that_raises_is_named_with_its_place() -> None:
    def wrong(values: Any) -> float:
        raise ZeroDivisionError("in the metric")

    metric = WholeSet("f1", wrong)
    metric.add(0, 3, [torch.zeros(3)], {})
    with pytest.raises(ZeroDivisionError) as raised:
        metric.compute(one())
    assert notes_of(raised.value)[0].startswith("in metric 'f1' (test_whole_set.py:")
    assert "called with all 3 samples" in notes_of(raised.value)[0]


@pytest.mark.parametrize("value", [torch.zeros(2), torch.zeros(()), 3.0, "abc", {"a": 1}, [1, 2], np.zeros(4), None])
def test_what_has_no_row_for_each_sample_is_refused(value: Any) -> None:
    with pytest.raises(StepError, match=r"metric 'f1': the step returned argument 1 with .* for a batch of 3 samples"):
        WholeSet("f1", lambda x: 0.0).add(0, 3, [value], {})


@pytest.mark.parametrize("returned", ["0.5", None, torch.zeros(2), {"a": "b"}])
def test_what_is_no_number_is_refused(returned: Any) -> None:
    metric = WholeSet("f1", lambda x: returned)
    metric.add(0, 1, [torch.zeros(1)], {})
    with pytest.raises(
        StepError, match=r"metric 'f1' \(test_whole_set.py:\d+\) returned \w+. It should return a number"
    ):
        metric.compute(one())


def test_rows_of_unequal_shapes_come_as_a_list() -> None:
    seen: list[Any] = []
    metric = WholeSet("f1", lambda x, y: seen.extend([x, y]) or 1.0)
    metric.add(2, 1, [torch.ones(1, 5), [["c"]]], {})
    metric.add(0, 2, [torch.zeros(2, 3), [["a"], []]], {})
    assert metric.compute(one()) == {"f1": 1.0}
    assert [tuple(row.shape) for row in seen[0]] == [(3,), (3,), (5,)]
    assert seen[1] == [["a"], [], ["c"]]


NUMBERS = np.arange(5, dtype=np.float32)
VALUES: list[Any] = [
    torch.arange(5), NUMBERS, np.array(["a", "bc", "", "d", "e"]), np.array([[1 + 2j]] * 5), NUMBERS > 2,
    ["text", None, 3, (1, 2.5), {"box": torch.ones(2), 3: np.array(["x"])}], np.arange(5).astype(">i4"),
]  # fmt: skip


def kinds_of(value: Any) -> Any:
    """What a value is, all the way down, to be compared."""
    if isinstance(value, torch.Tensor):
        return "tensor", value.dtype, value.tolist()
    if isinstance(value, np.ndarray):
        return "array", value.dtype.kind, value.tolist()
    if isinstance(value, dict):
        return {key: kinds_of(part) for key, part in value.items()}
    return type(value)(map(kinds_of, value)) if isinstance(value, (list, tuple)) else value


def seen_of_two_batches(world: World) -> list[str]:
    """What a function gets, where each rank has a batch of three or two samples, or one rank has both."""
    seen: list[Any] = []
    metric = WholeSet("f1", lambda *values: seen.extend(values) or 1.0)
    for start, end in [(0, 3), (3, 5)][world.rank :: world.size]:
        metric.add(start, end - start, [value[start:end] for value in VALUES], {})
    assert metric.compute(world) == {"f1": 1.0}
    return [repr(kinds_of(value)) for value in seen]


def test_values_come_as_they_are_from_another_rank_too() -> None:
    expected = [repr(kinds_of(value)) for value in VALUES]
    assert seen_of_two_batches(one()) == expected
    assert run_ranks(seen_of_two_batches, 2)[0] == expected


def test_and_from_a_checkpoint() -> None:
    seen: list[Any] = []
    first, again = (WholeSet("f1", lambda *values: seen.extend(values) or 1.0) for _ in range(2))
    first.add(0, 3, [value[:3] for value in VALUES], {})
    again.load(unflatten(*flatten(first.state(), "it")))
    again.add(3, 2, [value[3:] for value in VALUES], {})
    again.compute(one())
    assert [kinds_of(value) for value in seen] == [kinds_of(value) for value in VALUES]


def test_a_loader_may_use_the_memory_of_its_batch_again() -> None:
    room, array = torch.zeros(2), np.zeros(2)
    metric = WholeSet("f1", lambda x, y: float(x.sum()) + float(y.sum()))
    for batch in range(3):
        room.fill_(batch)
        array[:] = batch
        metric.add(2 * batch, 2, [room, array], {})
    assert metric.compute(one()) == {"f1": 12.0}


@pytest.mark.parametrize("value", [[object()], [b"bytes"], np.array(["2026-01-01"], dtype="datetime64[D]")])
def test_what_no_other_rank_could_get_is_refused_on_one_rank_too(value: Any) -> None:
    with pytest.raises(
        StepError, match=r"metric 'f1': a step returned a \w+ for it, which cannot be sent to other ranks"
    ):
        WholeSet("f1", lambda x: 0.0).add(0, 1, [value], {})


@pytest.mark.parametrize("thing", [3, "f1", f1_score.__class__, type("Own", (), {"compute": 1, "__call__": 2})()])
def test_what_is_no_metric_is_refused(thing: Any) -> None:
    with pytest.raises(UsageError, match="neither a single torchmetrics metric nor a function"):
        check_metrics({"f1": thing}, "metrics")
