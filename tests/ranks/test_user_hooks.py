"""Hooks of the user's own: when they are called and with what, on one rank and on several; what they may ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Dtrain
from helpers.ranks import run_ranks, write_once
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dtrain as dt
from dtrain.config import load_settings
from dtrain.distributed.world import World, bring_up
from dtrain.errors import StepError
from dtrain.rundir.history import read_history
from dtrain.trainer.train import train_run

RECIPE = Path(__file__).parent.parent / "recipes" / "hooked.py"
STEPS = 6  # optimizer steps of an epoch, on any number of ranks: batch=global


def start(folder: Path, *words: str, world: World | None = None, resume: str = "auto") -> Path:
    how = [f"run.dir={folder}", "run.name=it", "train.batch=global", "epochs=2", *words]
    return train_run(load_settings(str(RECIPE), how, {}), world or bring_up(cpu=True), resume)


def noted(folder: Path, rank: int = 0) -> list[list[Any]]:
    return [one for one in json.loads((folder / f"rank{rank}.json").read_text()) if one[0] != "weights"]


def expected(first: int, last: int, *, within: tuple[int, ...] = ()) -> list[list[Any]]:
    """What is called, in order, of these epochs."""
    calls: list[list[Any]] = [["before_train", 0, last, (first - 1) * STEPS]]
    for epoch in range(first, last + 1):
        calls.append(["before_epoch", epoch, (epoch - 1) * STEPS])
        for step in range((epoch - 1) * STEPS + 1, epoch * STEPS + 1):
            calls.append(["after_step", epoch, step])
            calls += [["after_validation", epoch, step, False]] * (step in within)
        calls += [["after_epoch", epoch, epoch * STEPS, False, ["epoch"]], ["counts", epoch]]
    columns = ["epoch", "loss", "val_loss", "own", "same", "val_main", "lr"]
    return [*calls, ["after_train", last, columns]]


def of_ranks(world: World, folder: str, words: list[str]) -> None:
    start(Path(folder), *words, world=world)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_they_are_called_in_order_on_every_rank_and_add_columns(tmp_path: Path, ranks: int) -> None:
    run_ranks(of_ranks, ranks, env={"NOTED": str(tmp_path)}, folder=str(tmp_path), words=["val_every_steps=4"])
    for rank in range(ranks):
        assert noted(tmp_path, rank) == expected(1, 2, within=(4, 8))
    history = read_history(tmp_path / "it")
    count = sum(range(1, ranks + 1))
    assert history["own"].tolist() == pytest.approx([10.0 * count * epoch / count for epoch in (1, 2)])
    assert history["same"].tolist() == [0.5, 0.5]
    assert history["val_main"].tolist() == [3, 3]
    assert list(history.columns)[-2:] == ["seconds", "samples_per_second"]


def test_a_resumed_run_has_their_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTED", str(tmp_path))
    start(tmp_path)
    start(tmp_path, "epochs=4")
    assert noted(tmp_path) == expected(3, 4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_rank_ends_training_and_the_run_is_complete(tmp_path: Path, ranks: int, dtrain: Dtrain) -> None:
    words = ["train", RECIPE, "--cpu", "-n", ranks, f"run.dir={tmp_path}", "run.name=it", "fault=stop", "batch=global"]
    done = dtrain(*words, "epochs=5", NOTED=str(tmp_path))
    assert done.code == 0
    assert "stopped after epoch 2 of 5: it is enough" in done.out
    assert read_history(tmp_path / "it")["epoch"].tolist() == [1, 2]
    again = dtrain(*words, "epochs=5")
    assert again.code == 0
    assert "is complete: 2 epochs. It was stopped after epoch 2 of 5: it is enough." in again.out
    assert dtrain(*words, "epochs=3").code == 0
    assert read_history(tmp_path / "it")["epoch"].tolist() == [1, 2, 3]


def test_one_that_raises_on_one_rank_is_named_with_its_place(tmp_path: Path, dtrain: Dtrain) -> None:
    words = ["train", RECIPE, "--cpu", "-n", 2, f"run.dir={tmp_path}", "run.name=it", "batch=global", "epochs=3"]
    done = dtrain(*words, "fault=raises", NOTED=str(tmp_path))
    line = next(n for n, text in enumerate(RECIPE.read_text().splitlines(), 1) if text.startswith("def after_epoch"))
    assert done.code == 1
    assert "RuntimeError: a fault after an epoch" in done.err
    assert f"in after_epoch (hooked.py:{line})" in done.err
    assert "at rank 1, epoch 2" in done.err
    assert noted(tmp_path, 1)[-1] == ["on_exception", "RuntimeError"]
    assert read_history(tmp_path / "it")["epoch"].tolist() == [1]


def told_of_disagreement(world: World, folder: str) -> str:
    with pytest.raises(StepError) as raised:
        start(Path(folder), "fault=disagree", world=world)
    return str(raised.value)


def test_ranks_that_do_not_agree_on_a_column_are_refused(tmp_path: Path) -> None:
    told = run_ranks(told_of_disagreement, 3, folder=str(tmp_path))
    assert len(set(told)) == 1
    assert "returned own = 0.0 on rank 0 and 1.0 on rank 1" in told[0]
    assert "dtrain.Mean(total, count)" in told[0]


def told_of_hooks(world: World, folder: str) -> str:
    text = f"{RECIPE.read_text()}\n\nif not dtrain.is_main():\n    del after_epoch\n"
    recipe = write_once(Path(folder) / "apart.py", text, world)
    settings = load_settings(str(recipe), [f"run.dir={folder}", "epochs=1"], {})
    with pytest.raises(dt.UsageError) as raised:
        train_run(settings, world)
    return str(raised.value)


def test_hooks_of_some_ranks_alone_are_refused(tmp_path: Path) -> None:
    one, other = run_ranks(told_of_hooks, 2, folder=str(tmp_path))
    assert one == other
    assert "the ranks have different hooks (rank 0: before_train, before_epoch, after_step" in one
    assert "Define them on all ranks, and ask run.is_main within." in one


def test_a_column_that_comes_late_is_nan_before(tmp_path: Path) -> None:
    run = start(tmp_path, "fault=late", "epochs=3")
    history = read_history(run)
    assert list(history.columns[:7]) == ["epoch", "loss", "val_loss", "own", "same", "val_main", "lr"]
    assert history["val_main"].isna().tolist() == [True, False, False]
    assert not list(run.glob("history-*.csv")), "the file that was written anew is no stranger's"
    assert read_history(start(tmp_path, "fault=late", "epochs=4"))["val_main"].isna().sum() == 1


def test_a_column_of_theirs_can_be_monitored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = start(
        tmp_path, "epochs=9", "early_stopping.target=30", "early_stopping.monitor=own", "early_stopping.mode=max"
    )
    assert read_history(run)["own"].tolist() == [10, 20, 30]
    assert "own = 30 has reached early_stopping.target = 30.0" in capsys.readouterr().out
    with pytest.raises(dt.UsageError, match=r"checkpoint\.monitor = 'owm'.*Did you mean 'own'"):
        start(tmp_path, "run.name=other", "checkpoint.monitor=owm")


def test_they_see_the_averaged_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtrain.checkpoint.tensors import read_file

    monkeypatch.setenv("NOTED", str(tmp_path))
    run = start(tmp_path, "train.ema_decay=0.8", "epochs=1")
    seen = next(one[1] for one in json.loads((tmp_path / "rank0.json").read_text()) if one[0] == "weights")
    saved, _ = read_file(run / "checkpoints/epoch-1/model.safetensors")
    assert seen == saved["0.weight"].flatten().tolist()


class Watches(dt.Callback):
    def __init__(self) -> None:
        self.rows: list[float] = []
        self.lock = print  # nothing that could be sent back

    def after_epoch(self, model: nn.Module, row: Any, run: dt.Run) -> dict[str, float] | bool:
        self.rows.append(row["val_loss"])
        assert run.folder is None
        run.image("nowhere", torch.zeros(3, 3))
        return {"rows": len(self.rows)} if len(self.rows) < 3 else False


def small() -> tuple[nn.Module, DataLoader[Any]]:
    torch.manual_seed(0)
    x = torch.randn(12, 2)
    return nn.Linear(2, 1), DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


@pytest.mark.parametrize("ranks", [None, 2])
@pytest.mark.parametrize("style", ["function", "keras"])
def test_a_call_takes_them_and_has_what_they_have_seen(style: str, ranks: int | None) -> None:
    net, data = small()
    watch, how = Watches(), {"num_processes": ranks, "cpu": True, "verbose": False}
    if style == "keras":
        model = dt.KerasModel(net, nn.MSELoss(), optimizer=torch.optim.SGD(net.parameters(), 0.1))
        history = model.fit(data, data, epochs=9, ckpt_path=None, patience=None, callbacks=[watch], **how)
    else:
        net.optimizer = torch.optim.SGD(net.parameters(), 0.1)
        step = _step
        history = dt.train_model(net, 9, data, data, train_step=step, valid_step=step, callbacks=[watch], **how)
    assert history["val_loss"].tolist() == watch.rows
    assert len(watch.rows) == 3
    assert history["rows"].tolist()[:2] == [1, 2]


def _step(model: Any, x: Any, y: Any) -> Any:
    return {"loss": (model(x) - y).square().mean()}
