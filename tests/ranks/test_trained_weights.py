"""`checkpoint.weights=trained`: adapters without their base, which the recipe builds again, or the run is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Dtrain
from helpers.ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import nn

import dtrain
from dtrain.config import load_settings
from dtrain.config.saved import load_run_settings
from dtrain.distributed.world import World, bring_up
from dtrain.errors import AgreedError
from dtrain.trainer.evaluate import evaluate_run, restore_run
from dtrain.trainer.train import train_run

RECIPE = '''
import json
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Adapted(nn.Module):
    """A frozen base with batch statistics in eval mode, an adapter beside it, and a layer that trains at times."""

    def __init__(self, width, rank):
        super().__init__()
        self.base = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1)).eval()
        self.down, self.norm, self.up = nn.Linear(3, rank), nn.BatchNorm1d(rank), nn.Linear(rank, 1)
        self.late = nn.Linear(3, 1)
        nn.init.zeros_(self.up.weight)
        for part in (self.base, self.late):
            part.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.up(self.norm(self.down(x))) + self.late(x)

    def save_pretrained(self, folder):
        with open(f"{folder}/net.json", "w") as file:
            json.dump({name: p.tolist() for name, p in self.up.named_parameters()}, file)

def build_model(width: int = 50, rank: int = 2, base: int = 7):
    stream = torch.random.get_rng_state()
    torch.manual_seed(base)
    net = Adapted(width, rank)
    torch.random.set_rng_state(stream)
    return net

def build_dataloaders():
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, x.sum(1, keepdim=True))
    return DataLoader(data, batch_size=4, shuffle=True), DataLoader(data, batch_size=8)

def build_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05)

def before_epoch(model, epoch):
    model.late.requires_grad_(epoch == 2)  # unfrozen and frozen again

def train_step(model, x, y):
    return {"loss": (model(x) - y).square().mean()}

valid_step = train_step
'''


def start(folder: Path, *words: str, name: str = "it", resume: str = "auto", world: World | None = None) -> Path:
    file = folder / "mine.py"
    if not file.exists():
        file.write_text(RECIPE)
    named = [f"run.dir={folder}", f"run.name={name}", "train.ema_decay=0.8", "checkpoint.keep_last=99"]
    return train_run(load_settings(str(file), [*named, *words], environ={}), world or bring_up(cpu=True), resume)


def file_of(run: Path, name: str) -> dict[str, torch.Tensor]:
    return dict(load_file(run / f"checkpoints/{name}/model.safetensors"))


TRAINED = "checkpoint.weights=trained"
ADAPTER = {f"{part}.{kind}" for part in ("down", "norm", "up") for kind in ("weight", "bias")}
ADAPTER |= {f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
LATE = {"late.weight", "late.bias"}
NUMBERS = ["epoch", "loss", "val_loss"]


def on_ranks(world: World, folder: str) -> dict[str, Any]:
    path = Path(folder)
    start(path, TRAINED, "epochs=2", "train.batch=global", name="ranks", world=world)
    start(path, TRAINED, "epochs=3", "train.batch=global", name="ranks", world=world)
    world.gather_json(0)  # rank 0 has written the last one
    settings = load_run_settings(path / "ranks", [])
    means = evaluate_run(restore_run(path / "ranks", settings, "last", world), world).means
    return {"val_loss": dtrain.read_history(path / "ranks")["val_loss"].tolist(), "again": means["loss"]}


def test_a_run_without_its_base_is_the_run_with_it(tmp_path: Path) -> None:
    whole = start(tmp_path, "epochs=3", "checkpoint.every_steps=3", name="whole")
    run = start(tmp_path, TRAINED, "epochs=3", "checkpoint.every_steps=3")
    assert dtrain.read_history(run)[NUMBERS].equals(dtrain.read_history(whole)[NUMBERS])
    for name, names in (("epoch-1", ADAPTER), ("epoch-2", ADAPTER | LATE), ("epoch-3", ADAPTER | LATE)):
        assert file_of(run, name).keys() == names, "what was trained once is kept, frozen as it is now"
        assert all(torch.equal(value, file_of(whole, name)[key]) for key, value in file_of(run, name).items())
    assert "weights" not in json.loads((run / "checkpoints/epoch-3/manifest.json").read_text())["config"]["train"]
    net, other = dtrain.load(run, "epoch-2"), dtrain.load(whole, "epoch-2")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())
    for cut in ("epoch-1", "epoch-2-step-2", "epoch-2"):
        again = start(tmp_path, TRAINED, "epochs=3", "checkpoint.every_steps=3", name=cut)
        for path in sorted((again / "checkpoints").iterdir()):
            if path.name not in ("epoch-1", cut):
                path.rename(again / path.name)
        start(tmp_path, TRAINED, "epochs=3", "checkpoint.every_steps=3", name=cut)
        assert dtrain.read_history(again)[NUMBERS].equals(dtrain.read_history(whole)[NUMBERS])
        assert file_of(again, "epoch-3").keys() == ADAPTER | LATE
        assert all(torch.equal(value, file_of(run, "epoch-3")[key]) for key, value in file_of(again, "epoch-3").items())
    restored = restore_run(run, load_run_settings(run, []), "last", bring_up(cpu=True))
    assert evaluate_run(restored, bring_up(cpu=True)).means["loss"] == pytest.approx(
        dtrain.read_history(run)["val_loss"][2], rel=1e-9
    )
    for found in run_ranks(on_ranks, 2, folder=str(tmp_path)):
        assert found["again"] == pytest.approx(found["val_loss"][-1], rel=1e-6)
    assert file_of(tmp_path / "ranks", "epoch-3").keys() == ADAPTER | LATE


def test_another_base_is_refused_everywhere_and_never_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = start(tmp_path, TRAINED, "epochs=1")
    told = (
        r"epoch-1/model\.safetensors has the trained weights alone .* base\.0\.weight\. Build the model with the same"
    )
    text = RECIPE.replace("torch.manual_seed(base)", "torch.manual_seed(base + 1)")
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(dtrain.UsageError, match=told):
        dtrain.load(run)
    with pytest.raises(AgreedError, match=told):
        start(tmp_path, TRAINED, "epochs=2", "checkpoint.accept=[code]")
    with pytest.raises(AgreedError, match=told):
        restore_run(run, load_run_settings(run, []), "last", bring_up(cpu=True))
    with pytest.raises(AgreedError, match=r"does not match the model: not there: .*base\.0\.weight"):
        start(tmp_path, f"train.init_from={run}", "epochs=1", name="tuned")
    (tmp_path / "mine.py").write_text(RECIPE)
    tuned = start(tmp_path, f"train.init_from={run}", "epochs=1", name="tuned")
    assert file_of(tuned, "epoch-1").keys() > ADAPTER | LATE | {"base.0.weight"}
    # A pretrained base from a file, which is no longer there: the run has kept it.
    base = tmp_path / "base.safetensors"
    save_file(
        {
            name: torch.full_like(v, 0.25)
            for name, v in dtrain.load(run).state_dict().items()
            if "num" not in name and name.startswith("base")
        },
        base,
    )
    words = (f"train.init_from={base}", "train.init_partial=true", TRAINED)
    begun = start(tmp_path, *words, "epochs=1", name="begun")
    base.unlink()
    assert file_of(begun, "epoch-1").keys() == ADAPTER
    assert bool((dtrain.load(begun).base[0].weight == 0.25).all())
    start(tmp_path, *words, "epochs=2", name="begun")
    restored = restore_run(begun, load_run_settings(begun, []), "last", bring_up(cpu=True))
    loss = evaluate_run(restored, bring_up(cpu=True)).means["loss"]
    assert loss == pytest.approx(dtrain.read_history(begun)["val_loss"][1], rel=1e-9)


def test_what_is_written_past_torch_is_kept_in_the_end(tmp_path: Path) -> None:
    """A frozen weight that a step changes through `.data`, which torch does not count as a write."""
    (tmp_path / "mine.py").write_text(
        RECIPE.replace("    return {", "    model.base[0].bias.data.add_(1.0)\n    return {", 1)
    )
    run = start(tmp_path, TRAINED, "epochs=1")
    assert file_of(run, "epoch-1").keys() == ADAPTER | {"base.0.bias"}


def test_the_nets_own_form_lies_beside_the_checkpoint(tmp_path: Path) -> None:
    run = start(tmp_path, "epochs=2", "checkpoint.pretrained=true", TRAINED, "checkpoint.every_steps=3")
    for epoch in (1, 2):
        written = json.loads((run / f"checkpoints/epoch-{epoch}/pretrained/net.json").read_text())
        expected = file_of(run, f"epoch-{epoch}")["up.weight"]
        assert torch.equal(torch.tensor(written["weight"]), expected), "averaged, as validated"
    assert not (run / "checkpoints/epoch-1-step-3/pretrained").exists()
    assert not [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    (tmp_path / "mine.py").write_text(RECIPE.replace("def save_pretrained", "def save"))
    with pytest.raises(dtrain.UsageError, match=r"the model \(Adapted\) has no save_pretrained"):
        start(tmp_path, "epochs=1", "checkpoint.pretrained=true", name="without")


def test_the_commands_know_it(tmp_path: Path) -> None:
    run = start(tmp_path, TRAINED, "epochs=1")
    done = Dtrain(tmp_path)("predict", run, "-o", "out.npy", "--cpu")
    assert done.code == 0, done.text
    done = Dtrain(tmp_path)("evaluate", run, "--cpu", "model.base=9")
    assert done.code == 2 and "has the trained weights alone" in done.err, done.text


def test_all_is_as_it_was_without_the_key(tmp_path: Path) -> None:
    net = nn.Linear(1, 1)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    run = start(tmp_path, "epochs=1")
    assert file_of(run, "epoch-1").keys() > {"base.0.weight", *LATE}
