"""The bundled recipes: they come to what their configs say, and to the same on two ranks as on one."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.first_minutes import read_promise
from helpers.ranks import run_ranks
from helpers.sweep import some
from sklearn.datasets import load_digits

from dtrain.config import bundled as share
from dtrain.config import load_settings
from dtrain.distributed.world import bring_up
from dtrain.trainer.setup import configured_engine, load_task, run_epochs
from dtrain.trainer.train import train_run

CONFIGS = ("digits", "text", "diabetes", "images", "mnist")


def write_mnist(folder: Path) -> None:
    """Scikit-learn's digits, enlarged, as the four files."""
    scans = load_digits()
    pixels = np.kron(scans.images[:, 1:8, 1:8] * 255 / 16, np.ones((4, 4))).astype(np.uint8)
    valid = np.arange(len(pixels)) % 5 == 0
    for name, rows in (("train", ~valid), ("t10k", valid)):
        images, labels = pixels[rows], scans.target[rows].astype(np.uint8)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, *images.shape) + images.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, len(labels)) + labels.tobytes())


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """More words for a config, by its name; the current folder is empty."""
    monkeypatch.chdir(tmp_path)
    mnist = tmp_path / "idx"
    mnist.mkdir()
    write_mnist(mnist)
    return {"mnist": [f"data.folder={mnist}"], "images": [f"data.folder={tmp_path}/shapes"]}


def test_there_is_a_config_for_each_recipe() -> None:
    assert {path.stem for path in share.folder("configs").glob("*.yaml")} == set(CONFIGS)
    assert all(load_settings(name, [], {}).config.recipe == f"dtrain.recipes.{name}" for name in CONFIGS)


# The digits' is in tests/launch/test_train.py. CI trains the text from its template.
@pytest.mark.parametrize("name", some(["diabetes", "images", "mnist"], ["text"]))
def test_a_config_comes_to_what_it_says(name: str, words: dict[str, list[str]]) -> None:
    more = words["mnist"] if name == "mnist" else []
    settings = load_settings(f"configs/{name}.yaml", more, {})
    folder = train_run(settings, bring_up(cpu=True))
    read_promise(share.folder("configs") / f"{name}.yaml").value_in(folder / "history.csv")


def histories(world, cases: list[list[str]]) -> list[list[dict[str, Any]]]:
    """One rank: the rows of a short run of each config."""
    found = []
    for name, *more in cases:
        settings = load_settings(name, ["train.batch=global", "limit_batches=7", "epochs=2", *more], {})
        task = load_task(settings)
        rows = configured_engine(task, world, settings, epochs=run_epochs(task, world.size, settings)).fit().rows
        found.append([{key: row[key] for key in row if key not in ("seconds", "samples_per_second")} for row in rows])
    return found


def test_two_ranks_have_the_history_of_one(words: dict[str, list[str]], tmp_path: Path) -> None:
    from dtrain.recipes.shapes import draw_shapes

    draw_shapes(tmp_path / "shapes")
    own = {"digits": ["dropout=0"], "text": ["characters=20000"]} | words
    cases = [[name, *own.get(name, [])] for name in CONFIGS]
    alone = histories(bring_up(cpu=True), cases)
    together = run_ranks(histories, 2, cases=cases)
    assert together[0] == together[1]
    for name, expected, rows in zip(CONFIGS, alone, together[0], strict=True):
        assert len(rows) == 2
        for before, row in zip(expected, rows, strict=True):
            assert list(row) == list(before)
            assert list(row.values()) == pytest.approx(list(before.values()), rel=2e-4, abs=1e-5), name


def draw(world, folder: str) -> list[int]:
    """One rank: the images that it finds, where all ranks draw them at once."""
    from dtrain.recipes import images

    for number in range(5):
        images.draw_shapes(Path(folder) / str(number), each=4)
    return [len(list((Path(folder) / str(number)).rglob("*.png"))) for number in range(5)]


def test_ranks_that_draw_the_same_folder_at_once_find_it_whole(tmp_path: Path) -> None:
    assert run_ranks(draw, 3, folder=str(tmp_path / "drawn")) == [[12] * 5] * 3
    assert len(list((tmp_path / "drawn").iterdir())) == 5
