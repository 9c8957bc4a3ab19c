"""torch.compile of the net: really compiled, the same numbers but for rounding, and nothing else changed.

By default with torch's backend aot_eager, which takes the same way through torch and runs without a compiler;
DTRAIN_TEST_SWEEP=full adds inductor, which takes its time.
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.callbacks import on
from helpers.commands import Dtrain
from helpers.ranks import run_ranks
from helpers.sweep import some
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dtrain as library
from dtrain.config import load_settings
from dtrain.distributed.world import World, bring_up
from dtrain.engine import passes
from dtrain.engine.loop import Engine
from dtrain.engine.options import RunOptions
from dtrain.engine.position import StartPosition
from dtrain.engine.predict import predict
from dtrain.engine.train_step import Task
from dtrain.errors import ConfigError, UsageError
from dtrain.model import compile as compiling
from dtrain.model.activation_checkpointing import recompute
from dtrain.model.compile import Compilation, CompileClock, compilation, compiled
from dtrain.rundir.history import read_history
from dtrain.trainer.train import train_run

RECIPES = Path(__file__).parent.parent / "recipes"
BACKENDS = some(["aot_eager"], ["inductor"])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 1)
        self.loss_func = nn.MSELoss()

    def forward(self, x: Any) -> Any:
        return self.head(self.layers(x))


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def run_once(world: World, kind: str, recomputes: bool) -> dict[str, Any]:
    torch.manual_seed(2)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    x = torch.randn(52, 5, generator=torch.Generator().manual_seed(3))
    y = x.sum(dim=1, keepdim=True)
    net = Net()
    if recomputes:
        recompute(net, ["layers"], "test")
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.05)  # type: ignore[assignment]
    reached = []

    def step(model: Any, x: Any, y: Any) -> Any:
        reached.append((model is net, model.loss_func is net.loss_func))
        loss = model.loss_func(model(x), y)
        if kind == "imperative" and model.training:
            model.optimizer.zero_grad()
            loss.backward()
            model.optimizer.step()
            return loss.item()
        return loss

    valid = DataLoader(TensorDataset(x[:11], y[:11]), batch_size=4)
    task = Task(net, step, DataLoader(TensorDataset(x, y), batch_size=8), step, valid)
    # The same parts with and without compiling: with same_draws the first batch is cut otherwise, which BatchNorm sees.
    engine = Engine(
        task, world, epochs=3, options=RunOptions(batch="global", same_draws=False, accumulation=2, ema_decay=0.5)
    )
    counted, trained = [], []
    engine.callbacks.add(
        on(on_train_pass_end=lambda _: trained.append(graphs()), on_epoch_end=lambda _: counted.append(graphs()))
    )
    engine.fit()
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in engine.history.rows]
    predicted = predict(net, valid, world)
    return {
        "rows": rows,
        "counted": counted,
        "trained": trained,
        "keys": list(net.state_dict()),
        "plain": [name for name in net.__dict__ if name == "forward"],
        "reached": all(map(all, reached)),
        "predicted": predicted.flatten().tolist(),
        "buffers": net.layers[1].running_mean.tolist(),
        "rate": [row["samples_per_second"] > 0 for row in engine.history.rows],
    }


def refused(world: World) -> str:
    """One rank: the words."""
    net = Net()
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)  # type: ignore[assignment]
    data = DataLoader(TensorDataset(torch.randn(8, 5)), batch_size=4)
    try:
        Engine(
            Task(net, lambda model, x: model(x).mean(), data), world, epochs=1, options=RunOptions(sync_batchnorm=True)
        )
    except UsageError as error:
        return str(error)
    return ""


def run_all(world: World, cases: list[list[Any]]) -> list[Any]:
    """One rank: each case, compiled where the environment says so; and what is said of BatchNorm over the ranks."""
    return [*(run_once(world, *case) for case in cases), refused(world)]


CASES = some([["imperative", False], ["declarative", True]], [["declarative", False], ["imperative", True]])


@pytest.mark.parametrize("ranks", some([2], [1]))
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_compiled_and_the_numbers_are_the_same(backend: str, ranks: int) -> None:
    """By Accelerate's settings; batches of 8 and a last one of 4, which is compiled for any size from then on."""
    plain = run_ranks(run_all, ranks, cases=CASES)[0]
    answers = run_ranks(run_all, ranks, env={"ACCELERATE_DYNAMO_BACKEND": backend.upper()}, cases=CASES)
    for answer in answers:
        told = "train.compile and train.sync_batchnorm cannot be combined"
        assert (told in answer[-1], answer[-1] == "") == (ranks > 1, ranks == 1)
        for case, one, two in zip(CASES, plain[:-1], answer[:-1], strict=True):
            assert one["counted"] == [0, 0, 0] and two["counted"][0] > two["trained"][0] > 0, "both passes"
            assert two["counted"][0] == two["counted"][2], f"{case}: nothing is compiled anew after the first epoch"
            assert two["counted"][0] <= 8, case
            assert two["reached"] and two["keys"] == one["keys"] and two["plain"] == one["plain"] == []
            for a, b in zip(one["rows"], two["rows"], strict=True):
                assert a == pytest.approx(b, rel=1e-4), case
            assert one["predicted"] == pytest.approx(two["predicted"], rel=1e-3, abs=1e-4), case
            assert one["buffers"] == pytest.approx(two["buffers"], rel=1e-4, abs=1e-6), f"{case}: they change once"
            assert all(two["rate"])


# --- who says what --------------------------------------------------------------------------------------


def settings_of(backend: str = "NO", mode: str = "default", **more: Any) -> Any:
    plugin = {"backend": backend, "mode": mode, "fullgraph": False, "dynamic": None, "use_regional_compilation": False}
    state = SimpleNamespace(dynamo_plugin=SimpleNamespace(**plugin | more))
    return SimpleNamespace(accelerator=SimpleNamespace(state=state), device=torch.device("cpu"))


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_check_works", lambda *_: None)


@pytest.mark.usefixtures("untried")
def test_what_holds_where_one_of_the_two_or_both_say_it() -> None:
    nothing, inductor = settings_of(), settings_of("INDUCTOR", "max-autotune", fullgraph=True, dynamic=True)
    assert compilation(None, nothing) is compilation(False, nothing) is None
    assert compilation(True, nothing) == Compilation()
    assert compilation("reduce-overhead", nothing) == Compilation(mode="reduce-overhead")
    theirs = Compilation("inductor", "max-autotune", fullgraph=True, dynamic=True)
    assert compilation(None, inductor) == compilation(True, inductor) == compilation("max-autotune", inductor) == theirs
    assert compilation("reduce-overhead", settings_of("INDUCTOR")) == Compilation(mode="reduce-overhead")
    assert compilation(True, settings_of("AOT_EAGER")) == Compilation("aot_eager")
    for asked, launched in (
        (False, inductor),
        ("reduce-overhead", inductor),
        ("max-autotune", settings_of("AOT_EAGER")),
    ):
        with pytest.raises(
            UsageError, match=r"train\.compile = .*, but Accelerate's settings say .*Use only one of the"
        ):
            compilation(asked, launched)
    with pytest.raises(UsageError, match=r"use_regional_compilation .* is not supported"):
        compilation(None, settings_of("INDUCTOR", use_regional_compilation=True))


def test_a_value_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.compile = 'fast' \(command line\): should be False, True, 'reduce-"):
        load_settings("digits", ["train.compile=fast"], {})
    with pytest.raises(UsageError, match="compile = 'fast': should be False, True, 'reduce-overhead'"):
        library.train_model(nn.Linear(1, 1), 1, [], compile="fast")  # type: ignore[arg-type]


def test_a_machine_without_a_compiler_is_told_before_training() -> None:
    from torch._inductor import config

    compiling._check_works.cache_clear()
    told = r"needs a C\+\+ compiler on the CPU, and none was found: install g\+\+"
    none = config.patch({"cpp.cxx": (None, "/no/such/compiler")})  # type: ignore[no-untyped-call]
    with none, pytest.raises(UsageError, match=told):
        compilation(True, settings_of())
    with pytest.raises(UsageError, match=r"\(backend nonsense\) does not work on this machine: "):
        compilation(None, settings_of("NONSENSE"))


# --- the net --------------------------------------------------------------------------------------------


def test_a_copy_has_its_own_weights_and_the_net_is_as_before() -> None:
    net, x = Net().eval(), torch.randn(3, 5)
    before = copy.deepcopy(net)
    with compiled(net, Compilation("eager")):
        other = copy.deepcopy(net)
        other.head.bias.data += 1
        assert torch.allclose(other(x), net(x) + 1)
        assert torch.allclose(net(x), before(x))
    assert "forward" not in net.__dict__


# --- rates ----------------------------------------------------------------------------------------------


def test_the_clock_counts_what_torch_compiles() -> None:
    def slow(graph: Any, _: Any) -> Any:
        time.sleep(0.2)
        return graph.forward

    function = torch.compile(lambda x: x * 3, backend=slow)
    clock = CompileClock()
    try:
        function(torch.ones(2))
        assert clock.take() >= 0.2
        function(torch.ones(2))
        assert clock.take() == 0.0
    finally:
        clock.close()
        clock.close()


def test_steps_that_compile_count_in_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps of a second; the first also compiles for 100 s, and the second waits so long for another rank's."""
    now, clock = [0.0], SimpleNamespace(seconds=0.0)
    clock.take = lambda: clock.__dict__.update(last=clock.seconds, seconds=0.0) or clock.last
    monkeypatch.setattr(passes.time, "perf_counter", lambda: now[0])
    watch = passes.PassWatch(SimpleNamespace(device=torch.device("cpu")))  # type: ignore[arg-type]
    watch.begin(StartPosition())
    for number in range(6):

        def learn(_: Any, number: int = number) -> dict[str, Any]:
            now[0] += 1.0 + (100.0 if number < 2 else 0.0)
            clock.seconds = {0: 100.0, 1: 1.0}.get(number, 0.0)
            return {}

        watch.timed(learn, SimpleNamespace(count=10), clock)  # type: ignore[arg-type]
    assert (watch.seconds(), watch.aside, watch.untimed) == (4.0, 202.0, 20)


# --- going on -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("untried")
def test_checkpoints_of_a_compiled_run_go_on_uncompiled_and_the_other_way_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []
    aot_eager = Compilation("aot_eager")
    call = Compilation.__call__
    monkeypatch.setattr(Compilation, "__call__", lambda _, function: calls.append(1) or call(aot_eager, function))

    def run_in(name: str, *words: str) -> float:
        words = (f"run.dir={tmp_path}", f"run.name={name}", *words)
        run = train_run(load_settings(str(RECIPES / "resumable.py"), list(words), {}), bring_up(cpu=True))
        return float(read_history(run)["val_loss"].iloc[-1])

    plain = run_in("plain", "epochs=3")
    for epochs, compile in ((1, "true"), (2, "false"), (3, "true")):
        loss = run_in("it", f"train.compile={compile}", f"epochs={epochs}")
        assert ("the last digits may differ" in caplog.text) == (epochs > 1)
        caplog.clear()
    assert len(calls) == 2
    assert loss == pytest.approx(plain, rel=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None and not os.environ.get("CI"), reason="inductor needs g++")
def test_inductor_by_config_leaves_no_process(dtrain: Dtrain, recipes: Path) -> None:
    """Its workers end with the ranks, which the tests' own guard looks after."""
    for compile in ("false", "true"):
        words = ["train", recipes / "small.py", "epochs=2", f"train.compile={compile}", f"run.name={compile}", "--cpu"]
        done = dtrain(*words, timeout=600)
        assert done.code == 0, done.text
    one, two = (read_history(dtrain.folder / "runs" / name) for name in ("false", "true"))
    assert one["val_loss"].tolist() == pytest.approx(two["val_loss"].tolist(), rel=1e-4)
