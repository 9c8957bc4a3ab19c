"""A profile of a few steps: what is recorded, on which ranks, and that no number is another one."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks
from safetensors.torch import load_file

from dtrain.callbacks.profiler import WAIT, WARM_UP
from dtrain.checkpoint.saver import Checkpointer
from dtrain.config import load_settings
from dtrain.distributed.world import bring_up
from dtrain.engine.position import TrainPosition
from dtrain.errors import StopRequested
from dtrain.rundir.history import read_history
from dtrain.trainer.train import train_run

RECIPES = Path(__file__).parent.parent / "recipes"


def run(folder: Path | str, name: str, *words: str, world: Any = None) -> Path:
    more = [f"run.dir={folder}", f"run.name={name}", "epochs=2", *words]
    return train_run(load_settings(str(RECIPES / "resumable.py"), more, {}), world or bring_up(cpu=True))


def steps_of(file: Path) -> list[str]:
    """The optimizer steps that a trace has, by torch's names."""
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return sorted({event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep")})


def test_a_profile_has_the_steps_asked_for_and_changes_no_number(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = run(tmp_path, "plain")
    assert not (plain / "profile").exists()
    capfd.readouterr()
    profiled = run(tmp_path, "profiled", "train.profile=4")
    printed = capfd.readouterr()
    first = WAIT + WARM_UP
    assert steps_of(profiled / "profile/rank-0.json.gz") == [f"ProfilerStep#{n}" for n in range(first, first + 4)]
    assert [path.name for path in (profiled / "profile").iterdir()] == ["rank-0.json.gz"]
    assert f"profile of 4 optimizer steps: {profiled}/profile/rank-0.json.gz\n  operator" in printed.out
    assert "Optimizer.step#AdamW.step" in printed.out and "ProfilerStep" not in printed.out
    assert "profiler_start" not in printed.err
    columns = ["epoch", "loss", "metric", "val_loss", "lr"]
    assert read_history(plain)[columns].equals(read_history(profiled)[columns])
    weights = [load_file(folder / "checkpoints/epoch-2/model.safetensors") for folder in (plain, profiled)]
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())


def test_a_run_that_goes_on_keeps_its_trace(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = run(tmp_path, "it", "train.profile=2", "data.n=32")
    before = (folder / "profile/rank-0.json.gz").read_bytes()
    run(tmp_path, "it", "train.profile=2", "data.n=32", "epochs=3")
    assert "already exists and is not overwritten. Remove it for a new one." in caplog.text
    assert (folder / "profile/rank-0.json.gz").read_bytes() == before


@pytest.mark.parametrize("end", [StopRequested("on request"), RuntimeError("a fault")])
def test_a_run_that_is_cut_off_within_these_steps_leaves_them_to_the_one_that_goes_on(
    end: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(_: Checkpointer, place: TrainPosition) -> None:
        if place.updates == WAIT + WARM_UP + 2:
            raise end

    words = ("it", "train.profile=4", "data.n=32")
    folder = tmp_path / "it/profile"
    with monkeypatch.context() as cut, pytest.raises(type(end)):
        cut.setattr(Checkpointer, "on_save_point", look)
        run(tmp_path, *words)
    assert list(folder.iterdir()) == []
    (folder / ".part-rank-0.json.gz").write_bytes(b"which a kill has left")
    run(tmp_path, *words)
    assert [path.name for path in folder.iterdir()] == ["rank-0.json.gz"]
    assert len(steps_of(folder / "rank-0.json.gz")) == 4


def test_a_run_too_short_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path, "short", "train.profile=2", "max_steps=4")
    assert "the run ended within its first 5 optimizer steps, which are not recorded" in capfd.readouterr().out
    assert list((folder / "profile").iterdir()) == []
    folder = run(tmp_path, "less", "train.profile=9", "max_steps=7")
    assert "profile of 2 optimizer steps" in capfd.readouterr().out
    assert len(steps_of(folder / "profile/rank-0.json.gz")) >= 2


def profiled(world: Any, folder: str) -> None:
    for ranks in ("main", "all"):
        run(folder, ranks, "train.profile=2", f"train.profile_ranks={ranks}", world=world)


def test_each_rank_is_profiled_where_asked(tmp_path: Path) -> None:
    run_ranks(profiled, 2, folder=str(tmp_path))
    found = {name: sorted(path.name for path in (tmp_path / name / "profile").iterdir()) for name in ("main", "all")}
    assert found == {"main": ["rank-0.json.gz"], "all": ["rank-0.json.gz", "rank-1.json.gz"]}
    assert all(len(steps_of(path)) == 2 for path in tmp_path.glob("*/profile/*"))
