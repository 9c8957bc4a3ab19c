"""State of samplers, loaders, datasets, modules and objects on the net: a resumed run has it, or it is refused by name."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.sweep import some
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

import dtrain as library
from dtrain.checkpoint.tensors import read_file
from dtrain.config import load_settings
from dtrain.config.saved import load_run_settings
from dtrain.data.sources import Sources
from dtrain.distributed.world import bring_up
from dtrain.errors import DtrainError
from dtrain.rundir.history import read_history
from dtrain.trainer.evaluate import evaluate_run, restore_run
from dtrain.trainer.train import train_run

RECIPE = Path(__file__).parent.parent / "recipes" / "kept.py"
TIMES = ["seconds", "samples_per_second"]
STEPS = 3  # of an epoch, with batch=global


def start(world, folder: Path, name: str, words: list[str], die_at: int = 0) -> tuple[str, list[Any]]:
    """Trains on this rank, from where the run is; returns what ended it, and the samples that it saw."""
    os.environ["DIE_AT"] = str(die_at)
    words = [f"run.dir={folder}", f"run.name={name}", "epochs=3", "batch=global", "checkpoint.keep_last=9", *words]
    ended = ""
    try:
        train_run(load_settings(str(RECIPE), words, environ={}), world)
    except (ValueError, DtrainError) as error:
        ended = str(error)
    finally:
        os.environ.pop("DIE_AT")
    recipe = [module for name, module in sys.modules.items() if name.endswith("kept") and hasattr(module, "SEEN")][-1]
    return ended, list(recipe.SEEN)


def saved(folder: Path) -> list[Any]:
    """The last epoch's weights and state, and the history."""
    last = folder / "checkpoints" / "epoch-3"
    files = [read_file(last / name)[0] for name in ("model.safetensors", "state.safetensors")]
    return [*files, read_history(folder).drop(columns=TIMES)]


def differences(one: list[Any], two: list[Any]) -> list[str]:
    found = [
        name
        for a, b in zip(one[:2], two[:2], strict=True)
        for name in {*a, *b}
        if name not in a or name not in b or not torch.equal(a[name], b[name])
    ]
    return found if one[2].equals(two[2]) else [*found, "the history"]


def resumed(world, cases: list[list[str]]) -> list[dict[str, Any]]:
    """One rank: each case uninterrupted; and cut off within the second epoch, resumed, cut off as the third begins."""
    torch.set_num_threads(1)
    answers = []
    folder = Path(world.gather_json(tempfile.mkdtemp() if world.is_main else "")[0])
    for words in cases:
        whole, seen = start(world, folder, "whole", words)
        parts = [start(world, folder, "cut", [*words, "checkpoint.every_steps=1"], at) for at in (5, 2 * STEPS + 1, 0)]
        answer = {
            "words": words,
            "ended": [whole, *(ended for ended, _ in parts)],
            "order": [part for _, part in parts] == [seen[:4], seen[4 : 2 * STEPS], seen[2 * STEPS :]],
            "steps": len(seen),
            "differs": differences(saved(folder / "whole"), saved(folder / "cut")) if world.is_main else [],
            "evaluated": evaluated(world, folder / "whole") if words[0].startswith("net=") else True,
        }
        answers.append(answer)
        world.gather_json(None)
        if world.is_main:
            for name in ("whole", "cut"):
                shutil.rmtree(folder / name)
        world.gather_json(None)
    if world.is_main:
        shutil.rmtree(folder)
    return answers


def evaluated(world, folder: Path) -> bool:
    """Whether the last epoch's weights alone give what the history says."""
    restored = restore_run(folder, load_run_settings(folder, []), "last", world)
    found = evaluate_run(restored, world).means["loss"]
    return abs(found - float(read_history(folder).iloc[-1]["val_loss"])) <= 1e-12 * abs(found)


CASES = [
    *(["data.data=" + kind] for kind in ("numpy", "batches", "iterable", "loader", "reading", "flow")),
    *(["data.data=" + kind, "data.workers=2"] for kind in ("positions", "reading")),
    *(["net=" + kind] for kind in ("dict", "holder")),
    ["data.data=valid", "val_every_steps=2"],
]
ALONE = [
    *(["data.data=" + kind] for kind in ("streams", "positions", "valid")),
    ["data.data=numpy", "data.workers=2"],
    ["data.data=drawing"],
    ["data.data=drawing", "data.workers=2"],
    *(["net=" + kind] for kind in ("tensor", "spectral", "cache")),
    ["net=unfreeze-same"],
    ["net=unfreeze-group"],
    ["net=unfreeze-group", "ema_decay=0.7"],
]


def check(answers: list[list[dict[str, Any]]]) -> None:
    for answer in (answer for of_rank in answers for answer in of_rank):
        whole, *cut, end = answer["ended"]
        assert (whole, end, answer["steps"]) == ("", "", 3 * STEPS), answer
        assert all("killed" in one for one in cut), answer
        assert answer["order"] and answer["differs"] == [], answer
        # What is no part of the weights is a resumed run's alone.
        assert answer["evaluated"] or answer["words"][0] in ("net=cache",), answer


def test_a_resumed_run_has_all_state_on_one_rank() -> None:
    check([resumed(bring_up(cpu=True), [*CASES, *ALONE])])


@pytest.mark.parametrize("ranks", some([2], [3]))
def test_a_resumed_run_has_all_state_on_ranks(ranks: int) -> None:
    check(run_ranks(resumed, ranks, cases=CASES))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["data.data=unknown"],
            "dl_train.batch_sampler.inner: state/rng is a builtins.module, which a checkpoint cannot",
        ),
        (["net=broken"], "part._extra_state/broken is a builtins.object, which a checkpoint cannot contain"),
        (["net=no-setter"], "model.part (NoSetter) has get_extra_state() but no set_extra_state"),
        (
            ["data.data=reading", "data.workers=1", "data.persistent=true"],
            "dl_train.dataset (Reading) has a state (state_dict, load_state_dict), of which each of the loader's persi",
        ),
    ],
)
def test_state_that_cannot_be_kept_is_refused_by_name_before_the_first_step(
    tmp_path: Path, words: list[str], told: str
) -> None:
    ended, seen = start(bring_up(cpu=True), tmp_path, "it", words)
    assert told in ended and seen == []


def test_a_generator_in_workers_that_live_on_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["data.data=drawing", "data.workers=1", "data.persistent=true", "epochs=1"]
    start(bring_up(cpu=True), tmp_path, "it", words)
    assert "dl_train.dataset.datasets.0.rng (Generator) is a random generator, of which each of the" in caplog.text


def test_numbers_that_are_no_buffers_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start(bring_up(cpu=True), tmp_path, "it", ["net=calls", "epochs=2"])
    told = [record.message for record in caplog.records if "not in checkpoints" in record.message]
    assert len(told) == 1 and told[0].startswith("model.part.calls changed in training")


COUNTS = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Slow(torch.optim.SGD):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.k = 0

    def step(self, closure=None):
        self.k += 1
        return super().step(closure)


def build_model():
    return nn.Linear(2, 1)


def build_dataloaders():
    return DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=4), None


def build_optimizer(model):
    return Slow(model.parameters(), lr=0.1)


def train_step(model, x):
    return model(x).square().mean()
"""


def test_so_is_a_number_of_an_optimizer_of_the_users_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "slow.py").write_text(COUNTS)
    words = [f"run.dir={tmp_path}", "run.name=it", "epochs=1"]
    train_run(load_settings(str(tmp_path / "slow.py"), words, environ={}), bring_up(cpu=True))
    told = [record.message for record in caplog.records if "not in checkpoints" in record.message]
    assert len(told) == 1
    assert told[0].startswith("optimizer.k changed in training")
    assert "keep an optimizer's in its param_groups" in told[0]


class Extra(nn.Linear):
    """A layer whose extra state is of the kind that a test asks for."""

    def __init__(self, state: Any) -> None:
        super().__init__(2, 1)
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_keras_best_weights_have_extra_state(tmp_path: Path, ending: str) -> None:
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, x[:, :1]), 4)
    kept = {"scale": [0.5, torch.arange(3)], "name": "it"}
    model = library.KerasModel(nn.Sequential(Extra(kept)), loss_fn=nn.MSELoss())
    path = tmp_path / f"best{ending}"
    model.fit(loader, loader, epochs=1, ckpt_path=str(path), verbose=False, cpu=True)
    other = library.KerasModel(nn.Sequential(Extra({})), loss_fn=nn.MSELoss())
    other.load_ckpt(path)
    state = other.net[0].state
    assert state["scale"][0] == 0.5 and state["scale"][1].tolist() == [0, 1, 2] and state["name"] == "it"
    assert torch.equal(other.net[0].weight, model.net[0].weight)
    model.net[0].state = {"set": frozenset([len])}
    with pytest.raises(DtrainError, match=r"_extra_state"):
        model.fit(loader, loader, epochs=1, ckpt_path=str(path), verbose=False, cpu=True)


def test_complex128_is_saved_as_a_real_view_and_restored_to_the_bit(tmp_path: Path) -> None:
    net = nn.Module()
    net.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128))
    net.register_buffer("mirrored", torch.randn(2, dtype=torch.complex128).conj())
    folder = library.save_weights(net, tmp_path, {"epoch": 1, "loss": 1.0})
    assert load_file(folder / "model.safetensors")["weight"].shape == (3, 2, 2)
    found, _ = read_file(folder / "model.safetensors")
    assert torch.equal(found["weight"], net.weight) and torch.equal(found["mirrored"], net.mirrored)


def test_a_package_of_the_users_that_is_called_datasets_has_its_states_kept() -> None:
    methods = {name: lambda _, *__: {} for name in ("state_dict", "load_state_dict")}
    kind: Any = type("Ours", (Sampler,), methods | {"__iter__": lambda _: iter([0])})
    for module, kept in (("datasets.ours", True), ("datasets.iterable_dataset", False), ("torchdata.nodes", False)):
        kind.__module__ = module
        found = Sources(DataLoader([1, 2], 1, sampler=kind())).stateful()
        assert bool(found) == kept
