"""`--from`: a new run begins with the weights of another run or of a file; what they give is computed by a plain loop."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Dtrain
from helpers.ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import nn

import dtrain
from dtrain.cli.train import settings_to_train
from dtrain.config import load_settings
from dtrain.distributed.world import World, bring_up
from dtrain.errors import AgreedError, UsageError
from dtrain.trainer.train import train_run

RECIPE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

anchor = None  # the weights as an optimizer's builder finds them, as of L2-SP

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, classes)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))

def build_model(classes: int = 2):
    return Net(classes)

def build_dataloaders():
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, x[:, :1] * 2)
    return DataLoader(data, batch_size=4), DataLoader(data, batch_size=4)

def build_optimizer(model, lr: float = 0.2):
    global anchor
    anchor = [p.detach().clone() for p in model.parameters()]
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)

def train_step(model, x, y):
    pull = sum((p - a).square().sum() for p, a in zip(model.parameters(), anchor))
    return {"loss": (model(x) - y).square().mean() + 0.1 * pull}

def valid_step(model, x, y):
    return {"loss": (model(x) - y).square().mean()}
"""


def start(folder: Path, *words: str, name: str = "it", resume: str = "auto", world: World | None = None) -> Path:
    file = folder / "mine.py"
    if not file.exists():
        file.write_text(RECIPE)
    named = [f"run.dir={folder}", f"run.name={name}", "epochs=2", "data.batch_size=4"][:3]
    return train_run(load_settings(str(file), [*named, *words], environ={}), world or bring_up(cpu=True), resume)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(tmp_path_factory.mktemp("first"), "checkpoint.mode=max", "checkpoint.monitor=val_loss", name="first")


def best(first: Path) -> dict[str, torch.Tensor]:
    epoch = int(dtrain.read_history(first)["val_loss"].idxmax()) + 1
    assert epoch == 1, "not the last one, so that it is seen which is taken"
    return load_file(first / f"checkpoints/epoch-{epoch}/model.safetensors")


def by_hand(state: dict[str, torch.Tensor], epochs: int, lr: float) -> list[float]:
    """The validation losses of a plain loop that begins with these weights; the body is frozen."""
    body, head = nn.Linear(3, 4), nn.Linear(4, 2)
    for module, name in ((body, "body"), (head, "head")):
        module.load_state_dict({key: state[f"{name}.{key}"] for key in ("weight", "bias")})
    anchor = [p.detach().clone() for p in head.parameters()]
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    y, losses = x[:, :1] * 2, []
    optimizer = torch.optim.SGD(head.parameters(), lr=lr)
    for _ in range(epochs):
        for rows in torch.arange(12).split(4):
            optimizer.zero_grad()
            pull = sum((p - a).square().sum() for p, a in zip(head.parameters(), anchor, strict=True))
            loss = (head(torch.tanh(body(x[rows]))) - y[rows]).square().mean() + 0.1 * pull
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            losses.append(float((head(torch.tanh(body(x))) - y).square().mean()))
    return losses


def train_on_ranks(world: World, folder: str, source: str) -> list[float]:
    path = Path(folder)
    start(path, f"train.init_from={source}", *TUNED, "train.batch=global", "epochs=3", name="ranks", world=world)
    return [float(value) for value in dtrain.read_history(path / "ranks")["val_loss"]]


TUNED = ("parameters.freeze=[body.*]", "optimizer.lr=0.05")


def test_it_is_a_plain_loop_from_those_weights_on_1_and_2_ranks(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = by_hand(best(first), 3, 0.05)
    run = start(tmp_path, f"train.init_from={first}", *TUNED, "epochs=3")
    assert dtrain.read_history(run)["val_loss"].tolist() == pytest.approx(expected, rel=1e-6)
    assert f"weights from {first}/checkpoints/epoch-1/model.safetensors\n" in capsys.readouterr().out
    state = dtrain.load(run, "last").state_dict()
    assert torch.equal(state["body.weight"], best(first)["body.weight"]), "frozen"
    for losses in run_ranks(train_on_ranks, 2, folder=str(tmp_path), source=str(first)):
        assert losses == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_needs_the_source_no_more(first: Path, tmp_path: Path) -> None:
    words = (f"train.init_from={tmp_path / 'first'}", *TUNED)
    shutil.copytree(first, tmp_path / "first")
    whole = start(tmp_path, *words, "epochs=4", name="whole")
    run = start(tmp_path, *words, "epochs=2")
    shutil.rmtree(tmp_path / "first")
    start(tmp_path, *words, "epochs=4")
    # What the optimizer's builder made of the weights is the same again, too: the pull is to where the run began.
    assert (run / "history.csv").read_text().split()[1:] != []
    columns = ["epoch", "loss", "val_loss"]
    assert dtrain.read_history(run)[columns].equals(dtrain.read_history(whole)[columns])
    for name, value in load_file(whole / "checkpoints/epoch-4/model.safetensors").items():
        assert torch.equal(value, load_file(run / "checkpoints/epoch-4/model.safetensors")[name])
    branch = start(tmp_path, *words, "epochs=4", name="branch", resume=str(run / "checkpoints/epoch-3"))
    assert dtrain.read_history(branch)[columns].equals(dtrain.read_history(whole)[columns])
    shutil.rmtree(run / "checkpoints")  # killed before its first checkpoint
    for name in ("history.csv", "starts.jsonl"):
        (run / name).unlink()
    start(tmp_path, *words, "epochs=4")
    assert dtrain.read_history(run)[columns].equals(dtrain.read_history(whole)[columns])
    with pytest.raises(AgreedError, match=r"train\.init_from was '.*first' and is '.*other'"):
        start(tmp_path, f"train.init_from={tmp_path / 'other'}", *TUNED, "epochs=5")
    kept = json.loads((run / "initial-weights/weights/manifest.json").read_text())
    assert kept["from"].endswith("first/checkpoints/epoch-1/model.safetensors") and kept["not_taken"] == []


def test_what_does_not_match_is_named_and_refused_or_left_out(
    first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = (f"train.init_from={first}", "model.classes=5")
    with pytest.raises(AgreedError) as refused:
        start(tmp_path, *words)
    assert "head.weight has shape (2, 4) there and has shape (5, 4) here; head.bias" in str(refused.value)
    assert re.search(r"To build the model as there, see model: in .*config\.yaml\. To begin", str(refused.value))
    assert "the 2 of 4 tensors that match" in str(refused.value) and "train.init_partial=true" in str(refused.value)
    assert not (tmp_path / "it").exists(), "no folder is left behind"
    run = start(tmp_path, *words, "train.init_partial=true", "epochs=1", "optimizer.lr=1e-9")
    assert "2 of 4 tensors; not taken: head.weight has shape (2, 4) there" in caplog.text
    state, source = load_file(run / "checkpoints/epoch-1/model.safetensors"), best(first)
    assert torch.allclose(state["body.weight"], source["body.weight"], atol=1e-6)
    torch.manual_seed(42)
    nn.Linear(3, 4)
    assert torch.allclose(state["head.weight"], nn.Linear(4, 5).weight, atol=1e-6), "as the recipe builds it"
    save_file({"encoder.weight": source["body.weight"], "more": torch.ones(1)}, tmp_path / "w.safetensors")
    for more, told in (
        ((), "has no parameter of the model: it has encoder.weight, more; the model has body.weight"),
        (("train.init_partial=true",), "has no parameter of the model"),
        (
            ("train.init_rename={encoder.: body.}",),
            "not there: body.bias, head.weight, head.bias; not in the model: more",
        ),
        (("train.init_rename={encodr.: body.}",), "no name begins with 'encodr.', which is to be renamed."),
        (("train.init_rename={encoder.weight: more}",), "both become more"),
    ):
        with pytest.raises(AgreedError, match=re.escape(told)):
            start(tmp_path, f"train.init_from={tmp_path}/w.safetensors", *more, name="other")
    for source_, told in (
        ("nothing", "no such file or run"),
        (tmp_path, "is neither a run's folder nor a checkpoint"),
        (tmp_path / "mine.py", "should be a run's folder, a .safetensors file"),
    ):
        with pytest.raises(AgreedError, match=re.escape(told)):
            start(tmp_path, f"train.init_from={source_}", name="other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(dtrain.ConfigError, match=r"init_partial needs train\.init_from"):
        start(tmp_path, "train.init_partial=true", name="other")


def test_a_state_dict_of_torch_into_a_net(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prefixes of wrappers, a state dict among other things, tied weights, dtypes; and code in a pickle is not run."""
    net, file = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), tmp_path / "w.pt"
    state = {name: torch.full_like(value, 0.5) for name, value in net.state_dict().items()}
    wrapped = {f"module.{name}": value.bfloat16() for name, value in state.items()}
    torch.save({"epoch": 3, "state_dict": wrapped, "optimizer": {"lr": 0.1}}, file)
    assert dtrain.load_weights(net, file) == []
    assert all(bool((value == 0.5).all()) and value.dtype is torch.float32 for value in net.state_dict().values())
    torch.save({**state, "0.weight": torch.ones(5, 3), "2.bias": torch.ones(2)}, file)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(dtrain.UsageError, match=r"partial=True\. For other names: rename="):
        dtrain.load_weights(net, file)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    left = dtrain.load_weights(net, file, partial=True)
    assert left == ["0.weight has shape (5, 3) there and has shape (2, 3) here", "not in the model: 2.bias"]
    assert "3 of 4 tensors; not taken: 0.weight" in caplog.text
    tied = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    tied[1].weight = tied[0].weight
    torch.save({"0.weight": torch.eye(2)}, file)
    assert dtrain.load_weights(tied, file) == [] and torch.equal(tied[1].weight.detach(), torch.eye(2))
    torch.save({"0.weight": torch.eye(2), "1.weight": torch.ones(2, 2)}, file)
    with pytest.raises(dtrain.UsageError, match="are one parameter in the model, and two with different values"):
        dtrain.load_weights(tied, file)
    torch.save(net, file)
    with pytest.raises(dtrain.UsageError, match=r"weights_only=True.*torch\.save\(model\.state_dict\(\), FILE\)"):
        dtrain.load_weights(net, file)


def test_the_command_takes_the_runs_config_where_none_is_named(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(words: list[str], source: Any, resume: str = "auto") -> Any:
        return settings_to_train(words, resume, str(source), as_words=False).config

    monkeypatch.chdir(tmp_path)
    taken = config(["optimizer.lr=0.7"], first)
    assert taken.recipe.endswith("mine.py") and taken.optimizer == {"lr": 0.7} and taken.run.name is None
    assert taken.train.init_from == str(first) and taken.checkpoint.monitor == "val_loss"
    assert config(["run.name=b"], first / "checkpoints/epoch-1").run.name == "b"
    assert config(["dtrain.recipes.digits"], first).recipe == "dtrain.recipes.digits"
    assert config([], "w.safetensors").recipe == "dtrain.recipes.digits"
    monkeypatch.setenv("DTRAIN_RUN__NAME", "again")  # as a start after a failure has it
    assert config([], first).run.name == "again"
    done = Dtrain(tmp_path)(
        "train",
        "--from",
        first,
        "lr=0.01",
        "parameters.freeze=[body.*]",
        "--cpu",
        "epochs=1",
        "run.name=tuned",
        f"run.dir={tmp_path}",
    )
    assert done.code == 0, done.text
    assert f"weights from {first}/checkpoints/epoch-1" in done.out
    done = Dtrain(tmp_path)("train", "--from", first, "model.classes=3", "--cpu", "run.name=no", f"run.dir={tmp_path}")
    assert done.code == 2 and "does not match the model" in done.err and not (tmp_path / "no").exists(), done.text


def test_of_a_run_without_its_base_the_base_is_where_that_began(first: Path, tmp_path: Path) -> None:
    """`checkpoint.weights=trained` and `--from`: what the checkpoints lack is no builder's, but of the run's folder."""
    run = start(tmp_path, f"train.init_from={first}", *TUNED, "checkpoint.weights=trained", "epochs=1")
    expected = best(first)["body.weight"]
    assert "body.weight" not in best(run)
    given = nn.Module()
    given.body, given.head = nn.Linear(3, 4), nn.Linear(4, 2)
    assert torch.equal(dtrain.load(run, model=given).body.weight, expected)
    given.body.reset_parameters()
    assert dtrain.load_weights(given, run) == [] and torch.equal(given.body.weight, expected)
    start(tmp_path, f"train.init_from={first}", *TUNED, "checkpoint.weights=all", "epochs=2")
    assert torch.equal(dtrain.load(run, "epoch-1").body.weight, expected), "although the later checkpoints have it"
    again = start(tmp_path, f"train.init_from={run}", "train.seed=5", "epochs=1", name="again")
    assert torch.equal(load_file(again / "initial-weights/weights/model.safetensors")["body.weight"], expected)
    file = run / "initial-weights/weights/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UsageError, match="began with cannot be read"):
        dtrain.load_weights(given, run / "checkpoints/epoch-1")
