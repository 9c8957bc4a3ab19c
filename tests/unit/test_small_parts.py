"""History, checkpoints, metrics, steps, rank facts, threads, signatures: each on its own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import dtrain
from dtrain.checkpoint import save_epoch
from dtrain.checkpoint.folder import all_saved
from dtrain.engine.metrics import Mean, MeanTable
from dtrain.engine.passes import batches_on_device
from dtrain.engine.position import TrainPosition
from dtrain.engine.step_contract import StepValues, kind_of
from dtrain.errors import StepError, UsageError, WorldError
from dtrain.launch.env import cgroups, threads
from dtrain.launch.env.rank_env import read_rank_facts
from dtrain.launch.monitor.exit_report import ExceptionInfo, Report
from dtrain.launch.monitor.heartbeat import Beat, Heartbeat, read_beat
from dtrain.launch.monitor.postmortem import _how
from dtrain.model.fsdp import refuse_averaging
from dtrain.model.hooks import warn_of_gradient_hooks
from dtrain.recipe.signature import Builder
from dtrain.rundir.history import History, best_row, read_history


class TestHistory:
    def test_numbers_come_back_exactly(self, tmp_path: Path) -> None:
        rows = [{"epoch": e, "loss": 0.1 + 0.2 / e, "val_loss": float("nan"), "lr": 1e-300} for e in (1, 2, 3)]
        history = History(tmp_path / "history.csv")
        for row in rows:
            history.append(row)
        frame = read_history(tmp_path)
        assert list(frame.columns) == list(rows[0])
        assert frame["loss"].tolist() == [row["loss"] for row in rows]
        assert frame["lr"].tolist() == [1e-300] * 3
        assert history.dataframe().equals(frame)

    def test_a_line_without_its_end_is_left_out(self, tmp_path: Path) -> None:
        (tmp_path / "history.csv").write_text("epoch,loss\n1,0.5\n2,0.2")
        assert read_history(tmp_path)["epoch"].tolist() == [1]

    def test_nothing_is_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "history.csv").write_text("mine\n")
        with pytest.raises(UsageError, match="is not overwritten"):
            History(tmp_path / "history.csv")
        assert (tmp_path / "history.csv").read_text() == "mine\n"

    def test_missing_and_empty_files_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"history\.csv"):
            read_history(tmp_path)
        (tmp_path / "history.csv").write_text("")
        with pytest.raises(UsageError, match="no complete row"):
            read_history(tmp_path)

    def test_best_is_the_lowest_validation_loss(self) -> None:
        rows = [{"loss": 3, "val_loss": 0.2}, {"loss": 1, "val_loss": 0.1}, {"loss": 0, "val_loss": float("nan")}]
        assert best_row(rows) == (rows[1], "val_loss")
        assert best_row([{"loss": 2}, {"loss": 1}]) == ({"loss": 1}, "loss")
        assert best_row([]) == (None, None)

    def test_best_is_what_the_monitor_says(self) -> None:
        rows = [{"loss": 3, "hits": 5}, {"loss": 1, "hits": 7}, {"loss": 0, "hits": float("nan")}, {"hits": 7}]
        assert best_row(rows, "hits", "max") == (rows[1], "hits")
        assert best_row(rows, "hits", "min") == (rows[0], "hits")
        assert best_row(rows, "hits") == (rows[1], "hits")
        assert best_row(rows, "absent") == (rows[3], None)


class TestCheckpoint:
    def test_last_and_best_are_kept_and_load_back(self, tmp_path: Path) -> None:
        net = nn.Linear(2, 2)
        for epoch, loss in ((1, 0.3), (2, 0.1), (3, 0.5), (4, 0.4)):
            with torch.no_grad():
                net.weight.fill_(epoch)
            save_epoch(tmp_path, net, {"epoch": epoch, "val_loss": loss})
        assert [one.path.name for one in all_saved(tmp_path)] == ["epoch-2", "epoch-4"]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch-2", "epoch-4"]
        fresh = nn.Linear(2, 2)
        fresh.load_state_dict(load_file(tmp_path / "epoch-2" / "model.safetensors"))
        assert torch.equal(fresh.weight, torch.full((2, 2), 2.0))

    def test_a_save_that_fails_leaves_nothing_half_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_epoch(tmp_path, nn.Linear(2, 2), {"epoch": 1, "loss": 1.0})

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("dtrain.checkpoint.folder._sync", full)
        with pytest.raises(OSError, match="No space left"):
            save_epoch(tmp_path, nn.Linear(2, 2), {"epoch": 2, "loss": 0.5})
        assert [path.name for path in tmp_path.iterdir()] == ["epoch-1"]

    def test_tied_sliced_and_transposed_weights_load_back(self, tmp_path: Path) -> None:
        def make() -> nn.Module:
            net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
            net[1].weight = net[0].weight
            net.register_buffer("view", torch.arange(12.0).reshape(3, 4).t()[1:])
            return net

        torch.manual_seed(1)
        net, fresh = make(), make()
        save_epoch(tmp_path, net, {"epoch": 1, "loss": 1.0})
        fresh.load_state_dict(load_file(tmp_path / "epoch-1" / "model.safetensors"), strict=True)
        for (name, a), b in zip(net.state_dict().items(), fresh.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


class TestMetrics:
    def test_values_are_weighted_by_samples_or_by_their_own_count(self) -> None:
        table = MeanTable("train")
        table.add({"loss": 1.0, "perplexity": Mean(10.0, 4)}, 3)
        table.add({"loss": torch.tensor(5.0), "perplexity": Mean(torch.tensor(2.0), torch.tensor(0))}, 1)
        table.add({"loss": 99.0, "perplexity": Mean(99.0, 9)}, 0)
        assert table.running() == {"loss": 2.0, "perplexity": 3.0}
        assert (table.samples, table.steps) == (4, 3)

    def test_names_must_stay(self) -> None:
        table = MeanTable("valid")
        table.add({"loss": 1.0}, 1)
        with pytest.raises(StepError, match="valid step returned the values loss, f1"):
            table.add({"loss": 1.0, "f1": 1.0}, 1)


class TestSteps:
    def test_what_a_step_may_return(self) -> None:
        net = nn.Linear(1, 1)
        net.metric_name = "mae"
        assert StepValues(net, "train")((1.0, 2)) == {"loss": 1.0, "mae": 2}
        assert StepValues(net, "train")(torch.tensor([3.0]))["loss"].shape == ()
        assert StepValues(net, "train")({"loss": np.float32(0.5)}) == {"loss": 0.5}
        assert StepValues(nn.Linear(1, 1), "train")((1.0, 2.0)) == {"loss": 1.0, "metric": 2.0}
        assert StepValues(net, "train")(Mean(1.0, 2)) == {"loss": Mean(1.0, 2)}
        assert StepValues(net, "train")(np.float32(0.5)) == {"loss": 0.5}
        net.metric_name = "loss"
        with pytest.raises(StepError, match="metric_name"):
            StepValues(net, "train")((1.0, 2.0))

    @pytest.mark.parametrize(
        ("returned", "told"),
        [
            (None, r"nothing \(None\)"),
            ((1.0, 2.0, 3.0), "a tuple of 3 values"),
            ((1.0, "good"), "'metric' as str"),
            ((1.0, torch.ones(2)), r"shape \(2,\)"),
            ((1.0, None), "'metric' as NoneType"),
            ({}, "dict"),
            ({3: 1.0}, "the key 3"),
            ((1.0, torch.tensor(1j)), "complex64"),
            ({"loss": 1.0, "epoch": 3.0}, "'epoch', which is reserved for a column"),
            ({"loss": 1.0, "val_loss": 3.0}, "'val_loss', which is reserved for a column"),
            ({"loss": 1.0, "a\rb": 3.0}, r"'a\\rb', which contains a line break or another control character"),
            ({"loss": 1.0, "a\udc80": 3.0}, "which contains a line break or another control character"),
        ],
    )
    def test_anything_else_is_refused_by_name(self, returned: object, told: str) -> None:
        with pytest.raises(StepError, match=told):
            StepValues(nn.Linear(1, 1), "train")(returned)

    def test_the_kind_is_told_by_what_the_step_did(self) -> None:
        graph = torch.ones(1, requires_grad=True).sum()
        assert kind_of(True, False, {"loss": 1.0}) == "imperative"
        assert kind_of(False, True, {"loss": 1.0}) == "imperative"
        assert kind_of(True, True, {"loss": graph}) == "imperative"
        assert kind_of(False, False, {"loss": graph}) == "declarative"
        assert kind_of(False, False, {"loss": Mean(graph, 3)}) == "declarative"
        for dead in (1.0, torch.tensor(1.0)):
            assert kind_of(False, False, {"loss": dead}) is None, "it may have left the batch out"
        assert kind_of(False, False, {"accuracy": 1.0}) is None

    def test_a_loss_under_another_name_is_told(self) -> None:
        graph = torch.ones(1, requires_grad=True).sum()
        with pytest.raises(StepError, match=r"returned 'los', 'accuracy', and no value named 'loss'.*Is 'los' a typo"):
            kind_of(False, False, {"los": graph, "accuracy": 1.0})
        with pytest.raises(
            StepError, match=r"returned 'objective', and no value named 'loss', on which.*backward\(\)\. R"
        ):
            kind_of(False, False, {"objective": graph})


class TestRankFacts:
    def test_unlaunched_is_one_rank(self) -> None:
        facts = read_rank_facts({})
        assert (facts.rank, facts.size, facts.launched) == (0, 1, False)

    def test_launched(self) -> None:
        env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
        facts = read_rank_facts(env)
        assert (facts.rank, facts.size, facts.local_rank, facts.local_size) == (5, 8, 1, 4)

    @pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
    def test_tasks_without_ranks_are_refused(self, name: str) -> None:
        with pytest.raises(WorldError, match="started 4 tasks"):
            read_rank_facts({name: "4"})
        assert read_rank_facts({name: "1"}).size == 1

    @pytest.mark.parametrize(
        "env", [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}]
    )
    def test_what_does_not_fit_is_refused(self, env: dict[str, str]) -> None:
        with pytest.raises(WorldError, match="RANK"):
            read_rank_facts(env)


class TestThreads:
    def test_a_users_own_value_is_kept(self) -> None:
        env = {"OMP_NUM_THREADS": "7"}
        threads.set_threads(2, env)
        assert env == {"OMP_NUM_THREADS": "7"}

    def test_cores_are_shared_among_local_ranks_and_at_least_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(threads, "usable_cores", lambda: 6)
        for local_size, expected in ((1, "6"), (2, "3"), (4, "1"), (16, "1")):
            env: dict[str, str] = {}
            threads.set_threads(local_size, env)
            assert env["OMP_NUM_THREADS"] == expected

    @pytest.mark.parametrize(("limit", "expected"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 4)])
    def test_a_cgroups_quota_counts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int
    ) -> None:
        (tmp_path / "cpu.max").write_text(limit)
        monkeypatch.setattr(cgroups, "ROOT", tmp_path)
        monkeypatch.setattr(cgroups, "OWN", tmp_path / "none")
        monkeypatch.setattr(threads, "_CPUS", tmp_path / "none")
        monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
        assert threads.usable_cores() == expected

    def test_two_threads_of_one_core_count_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for cpu in range(4):
            folder = tmp_path / f"cpu{cpu}" / "topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
        monkeypatch.setattr(threads, "_CPUS", tmp_path)
        monkeypatch.setattr(cgroups, "ROOT", tmp_path)
        monkeypatch.setattr(cgroups, "OWN", tmp_path / "none")
        monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
        assert threads.usable_cores() == 2


def test_a_signature_is_read_without_what_dtrain_passes_itself() -> None:
    def build_optimizer(model, lr: float = 0.1, *, nesterov: bool = False, **more):
        return None

    builder = Builder.of(build_optimizer, skip=1)
    assert list(builder.parameters) == ["lr", "nesterov"]
    assert builder.takes_any
    assert builder.defaults() == {"lr": 0.1, "nesterov": False}
    assert builder.where.startswith(str(Path(__file__)))


def test_train_model_refuses_nonsense_before_it_starts() -> None:
    net = nn.Linear(1, 1)
    for epochs in (0, -1, True, "3", 1.5):
        with pytest.raises(UsageError, match=r"epochs = "):
            dtrain.train_model(net, epochs, [], None)
    with pytest.raises(UsageError, match=r"model\.loss_func, model\.metric_func, model\.optimizer"):
        dtrain.train_model(net, 1, [], None)


def test_manifests_are_json(tmp_path: Path) -> None:
    save_epoch(tmp_path, nn.Linear(1, 1), {"epoch": 1, "loss": 0.5})
    manifest = json.loads((tmp_path / "epoch-1" / "manifest.json").read_text())
    assert manifest["row"] == {"epoch": 1, "loss": 0.5}
    assert list(manifest["files"]) == ["model.safetensors"]


def test_a_pass_ends_at_its_last_step(tmp_path: Path) -> None:
    """What is found at an epoch's end is not told of a step that there never was."""
    iter_batches = [SimpleNamespace(batch=torch.ones(1)) for _ in range(3)]
    loader, world = (
        SimpleNamespace(iter_batches=lambda epoch: iter(iter_batches), pass_of=lambda epoch: epoch, prefetch=True),
        SimpleNamespace(device=torch.device("cpu")),
    )
    place = TrainPosition(0, heartbeat=Heartbeat(tmp_path / "rank-0.beat"))
    place.enter("valid", 2)
    assert len(list(batches_on_device(loader, world, place))) == 3
    assert str(place) == "rank 0, epoch 2, valid step 3"
    assert str(read_beat(tmp_path, 0)) == "epoch 2, valid step 3"


@pytest.mark.parametrize(("kind", "trace", "told"), [("StepError", "", "failed"), ("OSError", "...", "OSError")])
def test_how_another_rank_ended_is_told_without_classes_of_dtrain_s(kind: str, trace: str, told: str) -> None:
    report = Report(1, 1, "", 0.0, ExceptionInfo("exception", kind, "words", trace))
    assert _how(report, 1, Beat(5, "train", 1, 3)) == f"{told} in epoch 1, train step 3"


def test_gradient_hooks_of_the_users_own_are_named(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Linear(2, 1)
    warn_of_gradient_hooks(net)
    assert not caplog.records
    net.weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
    warn_of_gradient_hooks(net)
    assert "weight has a gradient hook (register_hook)" in caplog.text


def test_ddp_averages_no_sharded_net() -> None:
    refuse_averaging("auto")
    with pytest.raises(UsageError, match=r"train\.average = ddp: the model is sharded"):
        refuse_averaging("ddp")
