"""`dtrain evaluate`, `predict` and `summary` as a user starts them, on a run that `dtrain train` left."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.commands import BIN, Dtrain, clean_environment
from helpers.sweep import some
from safetensors.numpy import load_file, save_file

from dtrain import read_history
from dtrain.cli.evaluate import by_name

# Another number of threads rounds float32 sums otherwise, in the tenth digit.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/digits of 2 epochs, the first of which is the better one, and runs/small of a relative recipe."""
    folder = tmp_path_factory.mktemp("trained")
    dtrain = Dtrain(folder)
    words = ["epochs=2", "n_train=12", "n_valid=7", "batch_size=2", "lr=0.05"]
    (folder / "recipes").mkdir()
    shutil.copy(Path(__file__).parents[1] / "recipes" / "small.py", folder / "recipes")
    for argv in (["epochs=2", "run.name=digits"], ["recipes/small.py", *words, "run.name=small"]):
        done = dtrain("train", *argv, **ONE_THREAD)
        assert done.code == 0, done.text
        assert done.out.splitlines()[-1] == f"next: dtrain evaluate runs/{argv[-1].partition('=')[2]}"
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of runs/small that a test may break."""
    shutil.copytree(trained / "runs" / "small", tmp_path / "small")
    return tmp_path / "small"


def means_of(text: str) -> dict[str, float]:
    return {line.partition(" = ")[0]: float(line.partition(" = ")[2]) for line in text.splitlines() if " = " in line}


@pytest.mark.parametrize(
    ("run", "ranks"), some([("digits", 2), ("small", 3)], [("digits", 1), ("digits", 3), ("small", 1), ("small", 2)])
)
def test_evaluate_equals_the_history(trained: Path, run: str, ranks: int) -> None:
    frame = read_history(trained / "runs" / run)
    expected = {
        "best": frame.loc[frame["val_loss"].idxmin()],
        "last": frame.iloc[-1],
    }
    for which, row in expected.items() if ranks == 2 else [("best", expected["best"])]:
        done = Dtrain(trained)("evaluate", f"runs/{run}", "--checkpoint", which, "-n", ranks, "--cpu", **ONE_THREAD)
        assert done.code == 0, done.text
        assert f"epoch {row['epoch']:.0f} of runs/{run}" in done.out
        means = means_of(done.out)
        assert set(means) == {name for name in frame.columns if name.startswith("val_")}
        assert means == {name: pytest.approx(row[name], abs=1e-9) for name in means}


def test_the_best_epoch_is_the_one_that_the_run_monitors(dtrain: Dtrain, recipes: Path) -> None:
    monitor = ["checkpoint.monitor=val_loss", "checkpoint.mode=max"]
    done = dtrain("train", recipes / "small.py", "epochs=3", "run.name=it", *monitor, **ONE_THREAD)
    losses = read_history(dtrain.folder / "runs/it")["val_loss"]
    assert losses.idxmax() != losses.idxmin()
    worst = losses.idxmax() + 1
    assert f"best epoch: {worst} (val_loss = " in done.out, done.text
    for argv in (["evaluate", "runs/it"], ["predict", "runs/it", "-o", "out.npy"]):
        done = dtrain(*argv, "--cpu")
        assert f"epoch {worst} " in done.out, done.text


@pytest.mark.parametrize("words", some([["evaluate", "-n", "2"]], [["evaluate"], ["predict", "-o", "p.npy"]]))
def test_a_reader_that_has_gone_is_no_failure(trained: Path, tmp_path: Path, words: list[str]) -> None:
    """As in `dtrain evaluate RUN | head -1`, at its worst: nobody reads at all."""
    reading, writing = os.pipe()
    os.close(reading)
    argv = [BIN / "dtrain", *words, "--cpu", trained / "runs" / "small"]
    done = subprocess.run(
        argv, cwd=tmp_path, env=clean_environment(), stdout=writing, stderr=subprocess.PIPE, timeout=120, check=False
    )
    os.close(writing)
    assert done.returncode == 0
    assert done.stderr == b""


def test_the_recipe_is_found_from_another_folder(trained: Path, tmp_path: Path) -> None:
    done = Dtrain(tmp_path)("evaluate", trained / "runs" / "small")
    assert done.code == 0, done.text


def test_a_run_is_meant_by_its_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/it", "runs/here", "here", "elsewhere/it"):
        (tmp_path / name).mkdir(parents=True)
    assert [by_name(Path(name)) for name in ("it", "here", "none")] == [Path("runs/it"), Path("here"), Path("none")]
    monkeypatch.setenv("DTRAIN_RUN__DIR", "elsewhere")
    assert by_name(Path("it")) == Path("elsewhere/it")


@pytest.mark.parametrize("ranks", [1, 3])
def test_predictions_are_whole_and_in_order(trained: Path, tmp_path: Path, ranks: int) -> None:
    run = trained / "runs" / "small"
    for name in ("p.csv", "p.npy"):
        done = Dtrain(tmp_path)("predict", run, "-o", name, "--checkpoint", "last", "-n", ranks, "--cpu")
        assert done.code == 0, done.text
        assert done.out == f"predictions of epoch 2 of {run}: {name}\n"
    torch.manual_seed(0)
    features = torch.randn(19, 3)[12:].double().numpy()
    weights = load_file(run / "checkpoints" / "epoch-2" / "model.safetensors")
    expected = features @ weights["weight"].T.astype(float) + weights["bias"]
    frame = pd.read_csv(tmp_path / "p.csv")
    assert list(frame.columns) == ["prediction"]
    np.testing.assert_allclose(frame.to_numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(np.load(tmp_path / "p.npy"), expected, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.csv", "p.npy"]


def test_a_recipes_own_predict_step_names_its_columns(trained: Path, tmp_path: Path) -> None:
    source = trained / "recipes" / "small.py"
    step = (
        "def predict_step(model, features):\n    p = model(features)\n    return {'mean': p, 'pair': features[:, :2]}\n"
    )
    (tmp_path / "mine.py").write_text(source.read_text() + step)
    run = trained / "runs" / "small"
    done = Dtrain(tmp_path)("predict", run, "recipe=mine.py", "--data", "train", "-o", "p.csv")
    assert done.code == 0, done.text
    frame = pd.read_csv(tmp_path / "p.csv")
    assert list(frame.columns) == ["mean", "pair_0", "pair_1"]
    assert len(frame) == 12
    refused = Dtrain(tmp_path)("predict", run, "recipe=mine.py", "-o", "q.npy")
    assert refused.code == 2
    assert "holds one" in refused.err
    assert not list(tmp_path.glob("*q.npy*"))


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["evaluate", "runs/smal"], "no such run. Did you mean 'small'? Runs in runs: digits, small."),
        (["evaluate", "recipes"], "recipes is not a run's folder: it has no config.yaml."),
        (["predict", "runs/small", "-o", "p.txt"], "cannot write .txt. Use .csv, .npy, .parquet, .jsonl."),
        (["predict", "runs/small", "-o", "no/p.csv"], "no such folder: no. Create it first."),
        (["evaluate", "runs/small", "model.width=2"], "weight has shape (1, 3) in the file, and has shape (1, 2) in"),
        (["evaluate", "runs/small", "kind=no-valid"], "no validation loader, so there is nothing to evaluate"),
        (["evaluate", "runs/small", "nonsense=1"], "neither the config nor the recipe has a key 'nonsense'"),
    ],
)
def test_what_cannot_be_is_one_message(trained: Path, argv: list[str], told: str) -> None:
    done = Dtrain(trained)(*argv)
    assert done.code == 2, done.text
    assert told in done.err
    assert "Traceback" not in done.err


def test_parquet_is_written_or_its_library_is_named(trained: Path, tmp_path: Path) -> None:
    done = Dtrain(tmp_path)("predict", trained / "runs" / "small", "-o", "p.parquet")
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError:
        assert done.code == 2
        assert "pip install pyarrow" in done.err
    else:
        assert len(pd.read_parquet(tmp_path / "p.parquet")) == 7


def test_missing_and_foreign_weights_are_told(copied: Path) -> None:
    dtrain = Dtrain(copied.parent)
    file = copied / "checkpoints" / "epoch-2" / "model.safetensors"
    done = dtrain("evaluate", "small", "--checkpoint", "last", "-n", 2, "--cpu", "model.width=4")
    assert done.code == 2
    assert done.err.count("weight has shape (1, 3) in the file, and has shape (1, 4) in the model") == 1
    save_file(load_file(file) | {"bias": np.zeros(1, dtype=np.float32)}, file)
    done = dtrain("evaluate", "small", "--checkpoint", "last")
    assert done.code == 2
    assert f"{file.relative_to(copied.parent)} is damaged" in done.err
    shutil.rmtree(copied / "checkpoints")
    assert "small has no checkpoint" in dtrain("evaluate", "small").err


def test_summary_shows_layers_and_parameters(dtrain: Dtrain, recipes: Path) -> None:
    done = dtrain("summary")
    assert done.code == 0, done.text
    for words in ("Conv2d", "[16, 1, 28, 28]", "Total params: 53,994"):
        assert words in done.out
    assert "Total params: 4" in dtrain("summary", recipes / "small.py").out
    assert list(dtrain.folder.iterdir()) == []
