"""Validation within epochs: right, of no influence on the training, and without gap or duplicate after a kill."""

from __future__ import annotations

import copy
import csv
import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from helpers.callbacks import on
from helpers.ranks import run_ranks
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from dtrain.config import load_settings
from dtrain.distributed.world import World, bring_up
from dtrain.engine import passes
from dtrain.engine.loop import Engine
from dtrain.engine.options import RunOptions
from dtrain.engine.passes import ValidPass
from dtrain.engine.train_step import Task
from dtrain.errors import AgreedError, StopRequested, UsageError
from dtrain.trainer.train import train_run

RECIPES = Path(__file__).parent.parent / "recipes"
TIMES = ("seconds", "samples_per_second")


class Noisy(Dataset):
    """Augments from torch's global stream."""

    def __init__(self, n: int) -> None:
        self.x = torch.randn(n, 4, generator=torch.Generator().manual_seed(n))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index] + 0.1 * torch.randn(4), self.x[index].sum().reshape(1)


class Stream(IterableDataset):
    """Without a length."""

    def __iter__(self) -> Any:
        data = Noisy(24)
        return (data[index] for index in range(len(data)))


def engine_of(world: World, every: int | None, kind: str, *, ema: float | None = None, stream: bool = False) -> Engine:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.4), nn.Linear(6, 1))
    net[1].eval()  # a part that the user keeps in another mode, within the step below
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(4)  # of both loaders, so that each would draw on the other's

    def train_step(model: Any, x: Any, y: Any) -> Any:
        model[2].train()
        loss = (model(x) - y).square().mean()
        if kind == "imperative":
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss = loss.detach()
        return {"loss": loss, "seen": (x.mean(),)}

    def valid_step(model: Any, x: Any, y: Any) -> Any:
        torch.rand(5)
        assert not model[2].training
        return {"loss": (model(x) - y).square().mean(), "seen": (x.mean(),)}

    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(8))
    valid = DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=4, shuffle=True, generator=generator)
    data: Any = DataLoader(Stream(), 4) if stream else DataLoader(Noisy(24), 4, shuffle=True, generator=generator)
    task = Task(net, train_step, data, valid_step, valid, optimizer, metrics={"seen": torchmetrics.MeanMetric()})
    return Engine(task, world, epochs=2, val_every_steps=every, options=RunOptions(ema_decay=ema, batch="global"))


def digest(engine: Engine) -> str:
    state = [engine.task.module.state_dict(), *([engine.average.weights()] if engine.average else [])]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for part in state for t in part.values())).hexdigest()


def by_hand(engine: Engine) -> float:
    """The validation loss over all samples, with a copy of the net, averaged where that is so."""
    net = copy.deepcopy(engine.task.module).eval()
    if engine.average is not None:
        net.load_state_dict({**net.state_dict(), **engine.average.weights()})
    x, y = engine.task.dl_valid.dataset.tensors
    with torch.no_grad():
        return float((net(x) - y).square().mean())


def trained(world: World, cases: list[list[Any]]) -> list[Any]:
    """One rank: for each case, without and with validation within epochs."""
    found = []
    for kind, ema, stream in cases:
        runs = []
        for every in (None, 2):
            engine = engine_of(world, every, kind, ema=ema, stream=stream)
            expected: dict[int, float] = {}
            modes = set()

            def look(place: Any, engine: Engine = engine, expected: Any = expected, modes: Any = modes) -> None:
                if place.split == "train":
                    modes.add((*(part.training for part in engine.task.module.modules()), place.step > 0))
                    expected[place.updates] = by_hand(engine)

            engine.callbacks.add(on(on_save_point=look))
            engine.fit()
            rows = [{k: v for k, v in row.items() if k not in TIMES} for row in engine.history.rows]
            within = engine.validations.rows
            runs.append([digest(engine), rows, sorted(modes), within, expected])
        found.append(runs)
    return found


CASES = [["declarative", None, False], ["imperative", 0.8, False], ["declarative", 0.8, True]]


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_is_right_and_changes_nothing_of_the_training(ranks: int) -> None:
    """24 samples in batches of 4: six steps an epoch, the sixth of which is the epoch's end."""
    answers = run_ranks(trained, ranks, cases=CASES)
    for case, (without, with_) in zip(CASES, answers[0], strict=True):
        assert without[0] == with_[0], f"{case}: weights, buffers and average to the last bit"
        assert without[1] == with_[1], f"{case}: history"
        assert without[2] == with_[2], f"{case}: modes"
        steps = [2, 4, 6, 8, 10, 12] if case[2] else [2, 4, 8, 10]  # a stream's end is not known in advance
        assert [row["step"] for row in with_[3]] == steps
        assert [row["epoch"] for row in with_[3]] == [1 if step < 7 else 2 for step in steps]
        for row in with_[3]:
            assert row["val_loss"] == pytest.approx(with_[4][str(row["step"])], rel=1e-5), (case, row)
            assert row["seconds"] > 0 and list(row) == ["epoch", "step", "val_loss", "val_seen", "seconds"]
    for other in answers[1:]:
        assert [[run[0] for run in runs] for runs in other] == [[run[0] for run in runs] for runs in answers[0]]


def test_one_that_coincides_with_an_epochs_end_is_not_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    run = ValidPass.run
    monkeypatch.setattr(
        ValidPass, "run", lambda self, *a, **k: ran.append(k.get("within", False)) or run(self, *a, **k)
    )
    for stream, expected in ((False, [True, False] * 2), (True, [True, True] * 2)):
        ran.clear()
        engine = engine_of(bring_up(cpu=True), 3, "declarative", stream=stream)
        engine.fit()
        assert ran == expected
        assert [row["step"] for row in engine.validations.rows] == ([3, 6, 9, 12] if stream else [3, 9])
        last = engine.validations.rows[-1]
        if stream:
            assert last["val_loss"] == engine.history.rows[-1]["val_loss"]


def test_its_time_is_none_of_the_train_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(passes.time, "perf_counter", lambda: now[0])
    engine = engine_of(bring_up(cpu=True), 2, "declarative")
    learn, valid = engine.task.train_step, engine.task.valid_step

    def train_step(*batch: Any) -> Any:
        now[0] += 1.0
        return learn(*batch)

    def valid_step(*batch: Any) -> Any:  # three batches
        now[0] += 100.0
        return valid(*batch)

    engine.learner._steps[""], engine.within._pass.step, engine.valid.step = train_step, valid_step, valid_step
    engine.fit()
    row = engine.history.rows[0]
    assert row["samples_per_second"] == 24 / 6.0
    assert row["seconds"] == 6.0 + 3 * 300.0
    assert [row["seconds"] for row in engine.validations.rows] == [300.0] * 4


# --- a run that is cut off ------------------------------------------------------------------------------


WORDS = [
    "epochs=2",
    "train.val_every_steps=3",
    "train.log_norms=1",
    "checkpoint.every_steps=1",
    "checkpoint.keep_last=99",
]


def run_in(folder: Path, world: World, name: str, *words: str) -> Path:
    settings = load_settings(
        str(RECIPES / "resumable.py"), [*WORDS, f"run.dir={folder}", f"run.name={name}", "data.n=40", *words], {}
    )
    return train_run(settings, world)


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "validations.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def stop_in_validation(at: int) -> Any:
    """Has the validation after so many optimizer steps left, as on a request to stop."""
    run = ValidPass.run

    def stopped(self: ValidPass, epoch: int, place: Any, *more: Any, **how: Any) -> Any:
        if how.get("within") and place.updates == at:
            place.enter("valid", epoch)
            torch.rand(3)
            raise StopRequested("on request")
        return run(self, epoch, place, *more, **how)

    ValidPass.run = stopped  # type: ignore[method-assign]
    return run


def cut_off(world: World, folder: str) -> list[str]:
    """One rank: a whole run; then ones that are cut off, and go on; what differs."""
    root, wrong = Path(folder), []
    whole = run_in(root, world, "whole")
    ranks = world.size
    steps = 10 // ranks  # of an epoch
    places = [f"epoch-1-step-{steps - 1}", "epoch-1", f"epoch-2-step-{6 - steps if ranks > 1 else 2}"]
    for place in [*places, "stop"]:
        if place == "stop":
            run, close = stop_in_validation(6), World.close
            World.close = lambda _: None  # type: ignore[method-assign] - the ranks go on below
            try:
                run_in(root, world, "stop")
                wrong.append("no stop")
            except StopRequested:
                pass
            finally:
                ValidPass.run, World.close = run, close  # type: ignore[method-assign]
        elif world.is_main:
            shutil.copytree(whole, root / place)
            at = place.removeprefix("epoch-").split("-step-")
            limit = (int(at[0]), int(at[1]) if len(at) > 1 else 99)
            for path in (root / place / "checkpoints").iterdir():
                epoch, _, step = path.name.removeprefix("epoch-").partition("-step-")
                if (int(epoch), int(step or 99)) > limit:
                    shutil.rmtree(path)
        world.gather_json("ready")
        run_in(root, world, place)
        if world.is_main:
            if rows_of(root / place) != rows_of(whole):
                wrong.append(f"{place}: {rows_of(root / place)} is not {rows_of(whole)}")
            if (root / place / "norms.csv").read_text() != (whole / "norms.csv").read_text():
                wrong.append(f"{place}: other norms")
            one, two = (load_file(path / "checkpoints/epoch-2/model.safetensors") for path in (whole, root / place))
            wrong += [f"{place}: {name}" for name in one if not torch.equal(one[name], two[name])]
        world.gather_json("done")
    return wrong


def test_a_run_that_was_cut_off_has_neither_gap_nor_duplicate(tmp_path: Path) -> None:
    assert cut_off_alone(tmp_path) == []
    assert [row["step"] for row in rows_of(tmp_path / "whole")] == ["3", "6", "9", "12", "15", "18"]


def cut_off_alone(folder: Path) -> list[str]:
    return cut_off(bring_up(cpu=True), str(folder))


def test_nor_on_two_ranks(tmp_path: Path) -> None:
    assert run_ranks(cut_off, 2, folder=str(tmp_path)) == [[], []]
    assert [row["step"] for row in rows_of(tmp_path / "whole")] == ["3", "6", "9"]


def test_it_may_begin_and_end_with_a_run_that_goes_on(tmp_path: Path) -> None:
    world = bring_up(cpu=True)
    run = run_in(tmp_path, world, "it")
    before = (run / "validations.csv").read_text()
    run_in(tmp_path, world, "it", "epochs=3", "train.val_every_steps=null")
    assert (run / "validations.csv").read_text() == before
    run_in(tmp_path, world, "it", "epochs=4", "train.val_every_steps=5")
    assert (run / "validations.csv").read_text().startswith(before)
    assert [row["step"] for row in rows_of(run)][6:] == ["35"]


def test_what_it_needs_is_named(tmp_path: Path) -> None:
    settings = load_settings(
        str(RECIPES / "small.py"), ["data.kind=no-valid", "val_every_steps=2", f"run.dir={tmp_path}"], {}
    )
    with pytest.raises((AgreedError, UsageError), match=r"train\.val_every_steps = 2: there is no validation loader"):
        train_run(settings, bring_up(cpu=True))
    assert list(tmp_path.iterdir()) == []
