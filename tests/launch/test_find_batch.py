"""The largest batch that fits: real tries, in processes that a limit ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers.commands import BIN, Dtrain, clean_environment
from helpers.ranks import run_ranks
from helpers.sweep import some

from dtrain.config import load_settings
from dtrain.distributed.world import bring_up
from dtrain.errors import AgreedError
from dtrain.tools.find.memory import is_out_of_memory
from dtrain.tools.find.trial import try_batch

RECIPE = """
import os
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

SEEN = []

def build_model(mib: int = 0, most: int = 99, only_rank: int = -1, broken: bool = False):
    net = nn.Linear(3, 5)
    net.mib, net.most, net.only_rank, net.broken = mib, most, only_rank, broken
    SEEN.clear()
    return net

def build_optimizer(model, lr: float = 0.01):
    return torch.optim.Adam(model.parameters(), lr=lr)

def data():
    return TensorDataset(torch.randn(40, 3), torch.randn(40, 5))

def build_dataloaders(batch_size: int = 2):
    return DataLoader(data(), batch_size, shuffle=True, drop_last=True), DataLoader(data(), batch_size)

def train_step(model, x, y):
    SEEN.append(len(x))
    here = model.only_rank in (-1, int(os.environ.get("RANK", 0)))
    if here and len(x) > model.most:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    if model.broken and len(x) > 2:
        raise ValueError("a fault of the user's own")
    room = torch.ones(len(x), model.mib << 18) if here else None  # float32: mib MiB of each sample
    loss = ((model(x) - y) ** 2).mean()
    return loss + 0 * room[:, :1].sum() if room is not None and model.mib else loss

def valid_step(model, x, y):
    SEEN.append(-len(x))
    return ((model(x) - y) ** 2).mean()
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "sized.py"
    file.write_text(RECIPE)
    return file


def result(folder: Path) -> dict[str, Any]:
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ("facts", "result")}


def tried(recipe: str, out: Path, batch: int, *words: str, world: Any = None) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    settings = load_settings(recipe, [*words], {})
    try_batch(settings, world or bring_up(cpu=True), batch, out, None)
    return result(out)


def test_a_try_says_what_there_is_and_what_it_took(recipe: Path, tmp_path: Path) -> None:
    """Adam has two numbers for each parameter, and a count of its steps, a float, for each tensor."""
    found = tried(str(recipe), tmp_path / "own", 0, "batch_size=4")
    facts = found["facts"]
    assert (facts["batch"], facts["times"], facts["most"], facts["key"]) == (4, 1, 40, "data.batch_size")
    taken = found["result"]
    assert taken["fits"] and taken["batch"] == 4 and taken["samples_per_second"] > 0
    assert (taken["parameters"], taken["gradients"], taken["optimizer"]) == (80, 80, 168)
    assert taken["peak"] > 50 << 20


OWN_LOADER = RECIPE.replace("batch_size: int = 2", "rows: int = 2").replace("(data(), batch_size", "(data(), rows")


@pytest.mark.parametrize("text", [RECIPE, OWN_LOADER])
def test_the_batch_is_set_in_the_recipe_or_from_outside(text: str, recipe: Path, tmp_path: Path) -> None:
    """16 of 40 make two steps: the third is of the next epoch; each epoch ends with a validation step."""
    name = f"sized{len(text)}"
    file = tmp_path / f"{name}.py"
    file.write_text(text.replace("SEEN = []", "import builtins\nSEEN = builtins.SEEN = []"))
    found = tried(str(file), tmp_path / "it", 16, *(["batch_size=9"] if text == RECIPE else ["rows=9"]))
    import builtins

    seen = builtins.SEEN  # type: ignore[attr-defined]
    del builtins.SEEN  # type: ignore[attr-defined]
    assert [size for size in seen if size > 0] == [16, 16, 16]
    assert sum(size < 0 for size in seen) == 2
    assert found["facts"]["key"] == ("data.batch_size" if text == RECIPE else None)
    assert found["result"]["batch"] == 16


def test_a_loader_with_batches_of_its_own_is_refused_by_name(recipe: Path, tmp_path: Path) -> None:
    for there, told in (
        (
            "[(torch.randn(2, 3), torch.randn(2, 5))]",
            "has no batch size that can be changed. Give build_dataloaders a parameter",
        ),
        ("DataLoader(data(), 5)", r"build_dataloaders\(batch_size=8\) returned a training loader with batches of 5"),
    ):
        recipe.write_text(
            RECIPE.replace("return DataLoader(data(), batch_size, shuffle=True, drop_last=True)", f"return {there}")
        )
        with pytest.raises(AgreedError, match=told):
            tried(str(recipe), tmp_path / "it", 8)
    mine = "DataLoader(data(), batch_sampler=Mine())"
    recipe.write_text(
        OWN_LOADER.replace("DataLoader(data(), rows, shuffle=True, drop_last=True)", mine)
        + "class Mine:\n    batch_size = 4\n    def __iter__(self):\n        return iter([[0, 1]])\n"
    )
    with pytest.raises(
        AgreedError, match=r"cannot be changed from outside.*Give build_dataloaders a parameter batch_size"
    ):
        tried(str(recipe), tmp_path / "it", 8)


def tried_by_ranks(world: Any, recipe: str, folder: str) -> list[dict[str, Any]]:
    found = []
    for name, *words in (["it"], ["sharded", "train.shard=fsdp"]):
        out = Path(folder) / name
        words += ["batch=global", "accumulation=3", "batch_size=7"]
        found.append(tried(recipe, out, 5, *words, world=world) if world.is_main else _other(recipe, out, words, world))
    return found


def _other(recipe: str, out: Path, words: list[str], world: Any) -> dict[str, Any]:
    try_batch(load_settings(recipe, words, {}), world, 5, out, None)
    return {}


def test_ranks_agree_on_a_try_and_a_global_batch_is_that_of_all(recipe: Path, tmp_path: Path) -> None:
    """Sharded, rank 0 holds three of the five rows: 12 of 20 numbers, and as many of each of Adam's two."""
    (found, sharded), _ = run_ranks(tried_by_ranks, 2, recipe=str(recipe), folder=str(tmp_path))
    assert (found["facts"]["batch"], found["facts"]["times"], found["facts"]["most"]) == (5, 2, 20)
    assert found["result"]["batch"] == 5 and found["result"]["fits"]
    taken = [[one["result"][name] for name in ("parameters", "gradients", "optimizer")] for one in (found, sharded)]
    assert taken == [[80, 80, 168], [48, 48, 104]]


def test_memory_that_ran_out_is_told_from_other_errors() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(KeyboardInterrupt())


def test_the_largest_batch_within_a_limit(dtrain: Dtrain, recipe: Path) -> None:
    """200 MiB of each sample, above what a process of dtrain takes anyway: 200 to 400 MiB, of 1 GiB."""
    done = dtrain("find", "batch", recipe, "mib=200", "batch_size=3", "--memory", "1", "--cpu", "--max", 5)
    assert done.code == 0, done.text
    head, fits, fails, *_, found, estimate, following = done.out.splitlines()
    assert head.split() == ["batch", "peak", "memory", "samples/s"]
    assert fits.split()[0] == "3" and 700 < float(fits.split()[1]) < 1024, done.text
    assert fails.split()[0] == "5" and "does not fit: took" in fails and fails.endswith("of 1024 MiB"), done.text
    best = 3 if done.out.count("does not fit") == 2 else 4
    assert found == f"largest batch that fits: {best} samples per rank, of 1 GiB"
    assert estimate.startswith("estimate of a rank's memory: parameters 80 B, gradients 80 B, optimizer states 168 B")
    assert following == f"next: dtrain train {recipe} mib=200 data.batch_size={best} --cpu"
    assert sorted(path.name for path in dtrain.folder.iterdir() if path.name != "__pycache__") == ["sized.py"]


def test_memory_that_ends_before_there_is_a_batch_is_told(dtrain: Dtrain, recipe: Path) -> None:
    done = dtrain("find", "batch", recipe, "--memory", "0.05", "--cpu")
    assert done.code == 1, done.text
    assert re.search(
        r"dtrain: error: the recipe does not fit even without a batch: took \d+ of 51 MiB\. Allow more "
        r"memory per rank \(--memory\), or start fewer ranks \(-n\)\.",
        done.err,
    ), done.text


def test_a_fault_of_the_users_own_is_no_lack_of_memory(dtrain: Dtrain, recipe: Path) -> None:
    done = dtrain("find", "batch", recipe, "broken=true", "batch_size=4", "--cpu")
    assert done.code == 1
    assert "a fault of the user's own" in done.err and "largest batch" not in done.out


@pytest.mark.parametrize("number", some([signal.SIGKILL], [signal.SIGTERM, signal.SIGHUP]))
def test_a_search_that_is_ended_leaves_nothing_that_runs(dtrain: Dtrain, recipe: Path, number: int) -> None:
    argv = [BIN / "dtrain", "find", "batch", recipe, "-n", "2", "--cpu"]
    search = subprocess.Popen(
        argv, cwd=dtrain.folder, env=clean_environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        started = wait_for(
            lambda: found if len(found := psutil.Process(search.pid).children(recursive=True)) >= 3 else []
        )
    finally:
        search.send_signal(number)
        assert search.wait(60) == (-9 if number == signal.SIGKILL else 128 + number)
    wait_for(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in started))


def wait_for(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (there := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return there


@pytest.mark.parametrize("ranks", some([2], [3]))
def test_the_worst_rank_decides(ranks: int, dtrain: Dtrain, recipe: Path) -> None:
    words = ("most=3", f"only_rank={ranks - 1}", "train.batch=global", "-n", ranks, "--cpu")
    done = dtrain("find", "batch", recipe, *words)
    assert done.code == 0, done.text
    assert "does not fit: CUDA out of memory. Tried to allocate 2 GiB" in done.out
    assert "largest batch that fits: 3 samples per rank" in done.out
    assert done.out.splitlines()[-1].endswith(f"data.batch_size={3 * ranks} -n {ranks} --cpu")


def test_bounds_are_checked_before_anything_starts(dtrain: Dtrain, recipe: Path) -> None:
    done = dtrain("find", "batch", recipe, "--memory", "-1")
    assert done.code == 2 and "--memory -1: should be above 0, in GiB per rank." in done.err
    done = dtrain("find", "batch", recipe, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="x", MASTER_PORT="1")
    assert done.code == 2 and "find batch starts its own ranks" in done.err


def test_several_optimizers_in_a_step(dtrain: Dtrain, recipes: Path) -> None:
    done = dtrain("find", "batch", recipes / "two_optimizers.py", "--cpu", "--max", 12)
    assert done.code == 0, done.text
    assert "largest batch that fits: 12 samples per rank" in done.out
    states = re.search(r"parameters (\d[\d.]*) (K?i?B), .*optimizer states (\d[\d.]*) (K?i?B)", done.out)
    assert states is not None and float(states[3]) > 0, "Adam's, of one of the two"
