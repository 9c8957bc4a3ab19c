"""TensorBoard, MLflow and trackio, in real runs that are stopped and gone on with: each has what history.csv has."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Dtrain
from helpers.wandb_files import wandb_rows

from dtrain.callbacks.tracking.files import read_json
from dtrain.layout import TRACKING
from dtrain.rundir.history import read_history

Series = dict[str, list[tuple[int, float]]]


def truth(run: Path) -> Series:
    """Column -> its values by epoch."""
    rows = read_history(run).to_dict("records")
    return {name: [(row["epoch"], row[name]) for row in rows] for name in rows[0]}


def in_tensorboard(run: Path) -> Series:
    # TensorBoard's own reader; the one that is better known, event_accumulator, hides no tensors.
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(run / "tensorboard" / "epochs"))
    events.Reload()
    tags = events.Tags()["tensors"]
    assert {"config/text_summary", "about/text_summary", "history/text_summary"} <= set(tags)
    found = {tag: events.Tensors(tag) for tag in tags if not tag.endswith("/text_summary")}
    return {tag: [(one.step, make_ndarray(one.tensor_proto).item()) for one in all_] for tag, all_ in found.items()}


def in_mlflow(run: Path) -> Series:
    with sqlite3.connect(run.parent.parent / "mlflow.db") as store:
        found: Series = {}
        for name, step, value in store.execute("SELECT key, step, value FROM metrics ORDER BY key, step"):
            if not name.startswith("step/"):
                found.setdefault(name, []).append((step, value))
        assert store.execute("SELECT name, status FROM runs").fetchall() == [("it", "FINISHED")]
        params = dict(store.execute("SELECT key, value FROM params"))
        tags = dict(store.execute("SELECT key, value FROM tags"))
    store.close()
    assert params["train.seed"] == "42"
    assert params["about.parameters"] == "4"
    assert tags["mlflow.user"] == ""
    assert tags["mlflow.source.name"] == "dtrain"
    (table,) = run.parent.parent.glob("mlruns/**/artifacts/history.csv")
    assert table.read_bytes() == (run / "history.csv").read_bytes()
    (weights,) = run.parent.parent.glob("mlruns/**/artifacts/weights/model.safetensors")
    assert weights.read_bytes() == (run / "checkpoints" / "epoch-3" / "model.safetensors").read_bytes()
    return found


def in_trackio(run: Path) -> Series:
    store = sqlite3.connect(run.parent.parent / "trackio" / "mine.db")
    found: Series = {}
    for name, step, values in store.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step, id"):
        assert name == "it"
        for column, value in json.loads(values).items():
            if not column.startswith("step/"):
                found.setdefault(column, []).append((step, value))
    store.close()
    return found


KEYS = {
    "tensorboard": ("track.tensorboard=true", in_tensorboard),
    "mlflow": ("track.mlflow.uri=sqlite:///mlflow.db", in_mlflow),
    "trackio": ("track.trackio.project=mine", in_trackio),
}


@pytest.mark.timeout(900)
def test_each_tracker_has_what_the_history_has(dtrain: Dtrain, recipes: Path) -> None:
    """All that are installed at once, and W&B; stopped after an epoch and gone on with on two ranks."""
    readers: dict[str, Callable[[Path], Series]] = {n: read for n, (_, read) in KEYS.items() if find_spec(n)}
    if "tensorboard" not in readers:
        pytest.fail("tensorboard is missing: pip install -e '.[test]'")
    words = ["train", recipes / "small.py", "run.name=it", "track.wandb.project=p", "track.wandb.mode=offline"]
    words += [
        "track.artifacts=last",
        "track.every_seconds=0.001",
        "train.batch=global",
        *(KEYS[name][0] for name in readers),
    ]
    env = {"TRACKIO_DIR": str(dtrain.folder / "trackio"), "MLFLOW_DISABLE_TELEMETRY": "true", "SECRET": "the-canary"}
    for more in (["epochs=1"], ["epochs=3", "-n", 2, "--cpu"]):
        done = dtrain(*words, *more, **env)
        assert done.code == 0, done.text
        assert "not tracked" not in done.text and "tracking stopped" not in done.text
        assert "not everything was sent" not in done.text
    run = dtrain.run_folder()
    expected = truth(run)
    assert [epoch for epoch, _ in expected["loss"]] == [1, 2, 3]
    for name, read in readers.items():
        assert read(run) == expected, name
    parts = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert [part.stem for part in parts] == [f"run-{read_json(run / TRACKING / 'ids.json')['wandb']}"] * 2, (
        "one run of W&B's"
    )
    rows = [row for part in parts for row in wandb_rows(part)]
    assert {name: [(row["epoch"], row[name]) for row in rows] for name in rows[0]} == expected
    assert set(read_json(run / TRACKING / "ids.json")) == {"wandb", *readers}
    for path in dtrain.folder.rglob("*"):
        assert not path.is_file() or b"the-canary" not in path.read_bytes(), path


def test_what_a_killed_run_wrote_after_its_checkpoint_is_hidden(tmp_path: Path) -> None:
    from dtrain.callbacks.tracking.accelerated import TensorBoardBackend
    from dtrain.callbacks.tracking.base import RunEnd, TrackedRun

    about: dict[str, Any] = {"model": "a net", "code": "c0de"}
    first = TensorBoardBackend(TrackedRun(tmp_path, {"lr": 0.1}, about))
    first.start()
    for epoch in (1, 2, 3):
        first.log({"epoch": epoch, "loss": 1.0 / epoch}, epoch)
    first.finish(RunEnd(failed=True, complete=False))
    second = TensorBoardBackend(TrackedRun(tmp_path, {"lr": 0.1}, about, {"tensorboard": "tensorboard"}, 20))
    second.start()
    assert second.last_epoch() == 0, "of what it was given before nobody knows how much it wrote"
    for epoch, loss in ((1, 1.0), (2, 0.5), (3, 0.3)):
        second.log({"epoch": epoch, "loss": loss}, epoch)
    second.finish(RunEnd(rows=({"epoch": 1}, {"epoch": 2}, {"epoch": 3})))
    assert in_tensorboard(tmp_path)["loss"] == [(1, 1.0), (2, 0.5), (3, 0.3)]


def test_a_tracker_that_is_missing_is_told_before_anything_starts(dtrain: Dtrain, recipes: Path) -> None:
    (dtrain.folder / "sitecustomize.py").write_text(
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'mlflow' else find(name, *a)\n"
    )
    done = dtrain("train", recipes / "small.py", "track.mlflow.experiment=x", "-n", 2, PYTHONPATH=str(dtrain.folder))
    assert done.code == 2
    assert done.err == (
        "dtrain: error: track.mlflow is set, and mlflow is not installed: pip install mlflow, or omit it.\n"
    )
    assert not (dtrain.folder / "runs").exists()


def test_tensorboard_gets_what_hooks_keep(tmp_path: Path) -> None:
    import numpy as np
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    from dtrain.callbacks.media import RunMedia
    from dtrain.callbacks.tracking.accelerated import TensorBoardBackend
    from dtrain.callbacks.tracking.base import RunEnd, TrackedRun
    from dtrain.callbacks.tracking.threaded import Threaded

    backend = TensorBoardBackend(TrackedRun(tmp_path, {}, {}, {}, 0))
    tracker = Threaded(backend)
    tracker.begin()

    class Passes:
        def log_media(self, entry: Any) -> None:
            tracker.log_media(entry, tmp_path / "media")

    media = RunMedia(tmp_path, 0, Passes())  # type: ignore[arg-type]
    media.add("image", "filter", np.full((3, 5), 7, np.uint8), epoch=1, step=4)
    media.add("histogram", "w", np.arange(10.0), epoch=1, step=4)
    media.add("text", "note", "words", epoch=1, step=4)
    media.add("file", "x.txt", tmp_path / "media/index.jsonl", epoch=1, step=4)
    tracker.finish(RunEnd())
    events = EventAccumulator(str(tmp_path / "tensorboard/steps"))
    events.Reload()
    assert set(events.Tags()["tensors"]) == {"filter", "w", "note/text_summary"}
    found = {tag: make_ndarray(events.Tensors(tag)[0].tensor_proto) for tag in events.Tags()["tensors"]}
    assert [int(part) for part in found["filter"][:2]] == [5, 3], "width and height"
    assert found["w"][:, 2].sum() == 10
    assert found["note/text_summary"].tolist() == [b"words"]
    assert {events.Tensors(tag)[0].step for tag in found} == {4}
