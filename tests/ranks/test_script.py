"""The script style: a hand-written loop computes on N ranks what it computes on one."""

from __future__ import annotations

import copy
import difflib
import pickle
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import Dtrain
from helpers.pages import PAGES, blocks, said
from helpers.ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from dtrain import read_history
from dtrain.checkpoint import save_epoch


def values_0_to_8() -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(9, dtype=torch.float64)), batch_size=2)


def meter_values(world) -> list[dict[str, Any]]:
    return [meter_of(mode) for mode in ("per_rank", "global")]


def meter_of(mode: str) -> dict[str, Any]:
    """One rank: the mean of 0..8 in a training and in a validation pass, and what it saw."""
    import dtrain

    net, loader = dtrain.prepare(nn.Linear(1, 1), values_0_to_8(), batch=mode)
    result: dict[str, Any] = {"length": len(loader), "batch_size": loader.batch_size}
    for split in ("train", "valid"):
        net.train(split == "train")
        meter, steps = dtrain.Meter(), 0
        for (x,) in loader:
            meter.add(value=x.mean(), tokens=dtrain.Mean(x.sum(), 2 * len(x)))
            steps += 1
        result[split] = {"means": meter.means(), "steps": steps}
    return result


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_meter_is_exact(ranks: int) -> None:
    expected = {"value": np.arange(9).mean(), "tokens": np.arange(9).sum() / 18}
    per_rank, cut = zip(*run_ranks(meter_values, ranks), strict=True)
    for result in (*per_rank, *cut):
        assert result["train"]["means"] == result["valid"]["means"] == expected
        assert result["train"]["steps"] == result["length"], "every rank takes part in every training step"
        assert result["batch_size"] == 2
    assert sum(result["valid"]["steps"] for result in per_rank) == 5, "no filler in validation"
    assert [result["length"] for result in cut] == [5] * ranks
    assert [result["length"] for result in per_rank] == [-(-5 // ranks)] * ranks


def data(n: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x, (x**2).sum(dim=1, keepdim=True))


def fresh_net() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def loop(world, n: int, mode: str, accumulate: int = 1) -> dict[str, Any]:
    """One rank: two epochs by hand, validation in the middle of training as well."""
    import dtrain

    net = fresh_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    train = DataLoader(data(n), batch_size=4, shuffle=True)
    valid = DataLoader(data(7), batch_size=3)
    prepared, train, valid, same = dtrain.prepare(net, train, valid, optimizer, batch=mode)
    assert prepared is net
    assert same is optimizer
    rows = []
    for epoch in (1, 2):
        net.train()
        meter = dtrain.Meter()
        for step, (x, y) in enumerate(train, 1):
            loss = ((net(x) - y) ** 2).mean()
            (loss / accumulate).backward()
            meter.add(loss=loss)
            if step % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
            if step == 2:
                net.eval()
                middle = dtrain.Meter()
                for xv, yv in valid:
                    middle.add(middle=((net(xv) - yv) ** 2).mean())
                middle.means()
                net.train()
        optimizer.step()  # on what was accumulated since
        optimizer.zero_grad()
        net.eval()
        held = dtrain.Meter()
        for x, y in valid:
            held.add(loss=((net(x) - y) ** 2).mean())
        rows.append({"epoch": epoch, **meter.means(), **middle.means(), **held.means("val_")})
    return {"rows": rows, "weights": torch.cat([p.detach().flatten() for p in net.parameters()]).tolist()}


def loops(world) -> list[dict[str, Any]]:
    return [loop(world, n, "global", accumulate) for n in (13, 21) for accumulate in (1, 2)]


def test_a_loop_equals_one_rank_on_the_same_global_batches() -> None:
    (alone,) = run_ranks(loops, 1)
    for ranks in (2, 3):
        for results in run_ranks(loops, ranks):
            for result, one in zip(results, alone, strict=True):
                np.testing.assert_allclose(result["weights"], one["weights"], rtol=1e-9)
                for mine, expected in zip(result["rows"], one["rows"], strict=True):
                    assert mine == pytest.approx(expected, rel=1e-9)


def loop_and_train_model(world) -> list[list[float]]:
    from dtrain import train_model

    by_hand = loop(world, n=13, mode="per_rank")
    net = fresh_net()
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

    def step(model, x, y):
        return {"loss": ((model(x) - y) ** 2).mean()}

    loaders = DataLoader(data(13), batch_size=4, shuffle=True), DataLoader(data(7), batch_size=3)
    frame = train_model(net, 2, *loaders, train_step=step, valid_step=step, verbose=False, world=world)
    return [[row["loss"] for row in by_hand["rows"]], frame["loss"].tolist()]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loop_equals_train_model(ranks: int) -> None:
    for by_hand, engine in run_ranks(loop_and_train_model, ranks):
        assert by_hand == pytest.approx(engine, rel=1e-12)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 1), nn.BatchNorm1d(1)

    def forward(self, x):
        return self.norm(self.layer(x))


def look_at_the_net(world) -> dict[str, Any]:
    import dtrain

    torch.manual_seed(0)
    net, train, valid = dtrain.prepare(Counting(), *(DataLoader(data(n), batch_size=2) for n in (8, 7)))
    # The worker imports this file without noting it where pickle looks.
    sys.modules[__name__] = types.SimpleNamespace(Counting=Counting)  # type: ignore[assignment]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    seen: dict[str, Any] = {}
    for x, y in train:
        with torch.no_grad():
            net(x.float())  # a call without gradients, as of a teacher
        ((net(x.float()) - y.float()) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):  # noqa: S301
            seen["twin"] = torch.equal(twin.eval()(x.float()), copy.deepcopy(net).eval()(x.float()))
    seen["clean"] = "forward" not in vars(net)
    for _ in train:
        break
    seen["clean after break"] = "forward" not in vars(net)
    net.eval()
    for _ in zip(valid, valid, strict=True):
        seen["mean"] = net.norm.running_mean.tolist()
    seen["clean after zip"] = "forward" not in vars(net)
    net.eval()
    for x, _ in valid:
        net(x.float())  # unequal numbers of steps, gradients on: must not wait for other ranks
    return {"type": type(net).__name__, "names": list(net.state_dict())[:2], **seen}


def test_the_net_stays_the_users_own() -> None:
    for ranks in (1, 2):
        results = run_ranks(look_at_the_net, ranks)
        for seen in results:
            assert seen["type"] == "Counting"
            assert seen["names"] == ["layer.weight", "layer.bias"]
            assert all(value for name, value in seen.items() if name.startswith(("clean", "twin")))
            assert seen["mean"] == results[0]["mean"], "all ranks validate with rank 0's statistics"


def go_wrong(world, how: str) -> str:
    """Each mistake that would make the numbers wrong in silence."""
    import dtrain

    if how == "data":
        torch.manual_seed(world.rank)
    split = Subset(data(16), torch.randperm(16).tolist())
    net = fresh_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    raw = DataLoader(split if how == "data" else data(16), batch_size=4)
    try:
        net, loader, _ = dtrain.prepare(net, raw, optimizer)
        net.train(how != "eval")
        meter = dtrain.Meter()
        for x, y in raw if how in ("raw", "count") else loader:
            if how == "count":
                meter.add(loss=1.0)
            if how == "names":
                meter.add(**{f"loss_{world.rank}": 1.0})
            ((net(x) - y) ** 2).mean().backward()
            optimizer.step()
        meter.means()
    except dtrain.DtrainError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("eval", "began with the model in eval mode. Call model.train() before the loop"),
        ("raw", "outside of a loop over a prepared loader"),
        ("count", "write meter.add(count=len(features), ...)"),
        ("names", "Return the same names on every rank"),
        ("data", "argument 2's samples are not the same on all ranks"),
    ],
)
def test_mistakes_that_would_pass_in_silence_are_found(how: str, told: str) -> None:
    for answer in run_ranks(go_wrong, 2, how=how):
        assert told in answer


def files(world, folder: str) -> list[str]:
    import dtrain

    torch.manual_seed(world.rank)
    net, loader = dtrain.prepare(nn.Linear(4, 1).double(), DataLoader(data(8), batch_size=2))
    for _ in loader:
        pass
    history = dtrain.History(f"{folder}/history.csv")
    told = []
    for epoch, loss in ((1, 0.5), (2, 0.9), (3, 0.7), (3, 0.7)):
        row = {"epoch": epoch, "loss": loss}
        history.append(row)
        try:
            saved = dtrain.save_weights(net, f"{folder}/checkpoints", row)
            told.append(str((saved / "model.safetensors").is_file()))
        except dtrain.DtrainError as error:
            told.append(str(error))
    return [*told, str(len(list(history)))]


def test_rank_0_alone_writes_and_all_know_when_it_could_not(tmp_path: Path) -> None:
    for *saved, again, rows in run_ranks(files, 2, folder=str(tmp_path)):
        assert saved == ["True"] * 3, "on disk when any rank goes on"
        assert "epoch-3 already exists" in again
        assert rows == "4"
    assert read_history(tmp_path)["epoch"].tolist() == [1, 2, 3, 3]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["epoch-1", "epoch-3"]


def save_epochs(world, folder: str, epochs: list[list[float]]) -> list[str]:
    """What a process is told that saves these epochs; each is a number and its val_loss."""
    import dtrain

    told = []
    for epoch, loss in epochs:
        try:
            told.append(dtrain.save_weights(nn.Linear(1, 1), folder, {"epoch": epoch, "val_loss": loss}).name)
        except dtrain.DtrainError as error:
            told.append(str(error))
    return told


def test_weights_of_two_runs_do_not_mix(tmp_path: Path) -> None:
    """The best epoch of an earlier run would have those of a new one removed at once."""
    folder = tmp_path / "weights"
    assert run_ranks(save_epochs, 1, folder=str(folder), epochs=[[1, 0.9], [2, 0.1]]) == [["epoch-1", "epoch-2"]]
    for told in run_ranks(save_epochs, 2, folder=str(folder), epochs=[[1, 0.5], [3, 0.05]]):
        for words in told:
            assert words.startswith(f"save_weights: {folder} contains the weights of an earlier run (epoch-2)"), words
    assert [path.name for path in folder.iterdir()] == ["epoch-2"]
    # As a cell of a notebook that is run again does.
    ((*_, again),) = run_ranks(save_epochs, 1, folder=str(tmp_path / "new"), epochs=[[1, 0.9], [2, 0.1], [1, 0.5]])
    assert "epoch-1 comes after epoch-2" in again
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["epoch-2"]


def test_epochs_of_others_stay(tmp_path: Path) -> None:
    """What came into the folder meanwhile is not of this run's; it may be all that another one has."""
    mine: set[Path] = set()
    for epoch in (1, 2, 3):
        mine.add(save_epoch(tmp_path, nn.Linear(1, 1), {"epoch": epoch, "loss": 0.1 * epoch}, mine))
        if epoch == 1:
            save_epoch(tmp_path, nn.Linear(1, 1), {"epoch": 7, "loss": 9.0}, ())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-1", "epoch-3", "epoch-7"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (lambda: ("net",), "first argument of prepare is a str"),
        (lambda: (nn.Linear(1, 1), nn.Linear(1, 1)), "argument 2 of prepare is a second model"),
        (lambda: (nn.Linear(1, 1), data(3)), r"Wrap it: DataLoader\(dataset"),
        (lambda: (nn.Linear(1, 1), 5), "argument 2 of prepare is a int: pass loaders and optimizers only"),
    ],
)
def test_wrong_arguments_are_named(arguments: Any, told: str) -> None:
    import dtrain

    with pytest.raises(dtrain.UsageError, match=told):
        dtrain.prepare(*arguments())
    with pytest.raises(dtrain.UsageError, match="per_rank"):
        dtrain.prepare(nn.Linear(1, 1), batch="both")


def test_the_tutorials_script_needs_the_lines_that_the_page_counts(dtrain: Dtrain, recipes: Path) -> None:
    before, after = (recipes / name for name in ("script_before.py", "script_after.py"))
    done = dtrain.run("python", before, 3)
    diff = list(difflib.ndiff(before.read_text().splitlines(), after.read_text().splitlines()))
    added, removed = ([line for line in diff if line.startswith(f"{sign} ") and line[2:].strip()] for sign in "+-")
    assert (len(added), len(removed), sum("rows" in line for line in added)) == (11, 12, 2)
    (page,) = (page for page in PAGES if page.name == "script-style.md")
    assert "Eleven lines make the tutorials' script" in page.read_text()
    shown = next(block.commands for block in blocks(page, "text"))
    for (command, lines), out in zip(shown, (done.out, dtrain.run("python", after, 3).out), strict=True):
        found = [line for line in out.splitlines() if line.startswith("EPOCH")]
        assert not said(lines).differs("\n".join(found) + "\n"), command


def test_a_run_whose_loop_is_over_a_range_of_its_own_is_told(dtrain: Dtrain, recipes: Path) -> None:
    text = (recipes / "script_after.py").read_text()
    made = 'rows = dtrain.History("history.csv")\n'
    run = 'run = dtrain.run("runs/first", net, optimizer)\nrows = run.history\n'
    assert made in text and "range(1, epochs + 1)" in text
    (dtrain.folder / "page.py").write_text(
        text.replace(made, run).replace("range(1, epochs + 1)", "run.epochs(epochs)")
    )
    done = dtrain.run("python", "page.py", 1)
    assert done.code == 0 and "EPOCH = 1," in done.out, "the three lines of the page"
    assert "resuming from runs/first/checkpoints/epoch-1" in dtrain.run("python", "page.py", 2).out
    (dtrain.folder / "range.py").write_text(text.replace(made, run.replace("first", "second")))
    done = dtrain.run("python", "range.py", 2)
    assert done.code == 1 and "Write the loop as `for epoch in run.epochs(N):`." in done.err
    (dtrain.folder / "own.py").write_text(
        text.replace(made, run.replace("first", "third").replace("run.history", "[]"))
    )
    done = dtrain.run("python", "own.py", 1)
    assert done.code == 0 and "runs/third: nothing was saved" in done.err


def test_the_page_s_commands_can_be_typed_one_after_another(dtrain: Dtrain, recipes: Path) -> None:
    (dtrain.folder / "script_after.py").write_text((recipes / "script_after.py").read_text())
    (page,) = (page for page in PAGES if page.name == "script-style.md")
    typed = [shlex.split(line, comments=True) for block in blocks(page, "console") for line, _ in block.commands]
    for words in typed:
        done = dtrain.run(*words)
        assert done.code == 0, done.text
        assert done.err == "" or words[0] == "torchrun"  # which speaks of OMP_NUM_THREADS
        assert done.out.count("EPOCH = 1,") == (words[0] != "mv")
    one, *more = (read_history(dtrain.folder / name) for name in ("one.csv", "two.csv", "history.csv"))
    assert one["val_loss"].iloc[2] < one["val_loss"].iloc[0]
    for frame in more:
        np.testing.assert_allclose(frame.to_numpy(), one.to_numpy(), rtol=0, atol=1e-6)
    again = dtrain.run(*typed[0])
    assert "history.csv already exists" in again.err and 'History("history-2.csv")' in again.err
    assert "run.name" not in again.err
