"""What a bench tries, how it judges what it measured, and what it says."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dtrain.config.schema import TrainConfig
from dtrain.tools.bench.advice import BenchResult, TrialResult, advice, compute_words, trial_words
from dtrain.tools.bench.candidates import BATCH_NOTE, Facts, candidates

TRAIN = dict(TrainConfig())


def trial(name: str = "x", base: list[float] = [], tried: list[float] = [], **more: Any) -> TrialResult:  # noqa: B006
    return TrialResult(name, f"change {name}", base=base, tried=tried, **more)


@pytest.mark.parametrize(
    ("base", "tried", "verdict"),
    [
        ([2.0, 2.1, 2.2, 2.0, 1.9], [1.0, 1.1, 1.0, 1.2, 1.0], "faster"),
        ([2.0, 2.1, 2.2, 2.0, 1.9], [1.0, 1.1, 1.0, 1.95, 1.0], "faster"),  # one of 25 pairs is the wrong way round
        ([2.0, 2.1, 2.2, 2.0, 1.9], [1.0, 1.1, 1.0, 2.05, 1.0], "noise"),
        ([1.0, 1.01, 1.0, 1.02, 1.0], [0.99, 0.98, 0.99, 0.98, 0.99], "noise"),  # separate, and 2 %
        ([1.0, 1.4, 1.1, 0.8, 1.0], [0.9, 1.3, 0.8, 0.7, 0.9], "noise"),
        ([2.0, 2.1], [1.0, 1.1], "faster"),
        ([2.0, 2.1], [1.8, 1.9], "noise"),
        ([2.0], [1.0], "skipped"),  # one turn shows nothing
        ([1.0], [2.0], "skipped"),
        ([1.0, 1.0], [2.0, 2.0], "slower"),
        ([1.0, 1.0], [2.0, 0.9], "noise"),
        ([1.0, 1.0, 1.0], [1.2, 1.3, 1.2], "slower"),
        ([], [], "skipped"),
    ],
)
def test_a_gain_counts_beyond_what_the_turns_scatter_by(base: list[float], tried: list[float], verdict: str) -> None:
    assert trial(base=base, tried=tried).verdict == verdict


def test_a_gain_is_that_of_the_medians() -> None:
    assert trial(base=[4.0, 2.0, 100.0], tried=[2.0, 1.0, 1.0]).gain == 4.0
    assert math.isnan(trial().gain)
    assert trial(base=[2.0, 2.0], tried=[1.0, 1.0], why="it failed").verdict == "skipped"


def names(**facts: Any) -> list[str]:
    return [one.name for one in candidates(Facts(**{"train": TRAIN, **facts}))]


def test_only_what_applies_is_tried() -> None:
    assert names() == []
    assert names(workers=0, data=0.5, cores=4) == ["num_workers=2", "num_workers=4"]
    assert names(workers=0, data=0.5, cores=1) == ["num_workers=2"]  # waiting takes no core
    assert names(workers=0, data=0.1, cores=4) == []
    assert names(workers=0, data=0.5, cores=4, whole=True) == []
    assert names(workers=2, data=0.1, whole=True) == ["num_workers=0"]
    assert names(workers=2, data=0.5, whole=True, cores=4) == ["num_workers=0", "num_workers=4"]
    assert names(workers=2, data=0.1) == [], "an image pipeline that its workers keep up with"
    assert names(optimizer="AdamW") == ["fused=True"]
    assert names(images=True) == ["channels_last=true"]
    assert names(bf16=True) == ["precision=bf16"]
    assert names(bf16=True, precision="fp16") == []
    assert names(batch=32) == ["batch_size=64"]
    assert names(compile=True, batch=8) == ["batch_size=16", "compile=true"]
    assert names(whole=True, workers=0, train={**TRAIN, "fetch_batches": False}) == ["fetch_batches=true"]


def test_what_needs_a_gpu_is_tried_there_alone() -> None:
    off = {**TRAIN, "prefetch_to_device": False, "data_on_device": False, "cuda_graph": False}
    gpu = {"train": off, "workers": 0, "could_be": True, "whole": True}
    assert names(**gpu) == []
    device = ["cuda_graph=true", "data_on_device=true", "prefetch_to_device=true", "pin_memory=True"]
    assert names(cuda=True, **gpu) == device
    assert names(cuda=True, **gpu, on_device=True, pinned=True) == ["cuda_graph=true"]
    assert names(cuda=True) == ["cuda_graph=true"], "also where the config has it: it is measured without"


def test_the_change_is_what_the_user_would_write() -> None:
    keys = {"num_workers": "data.num_workers", "batch_size": "data.bs", "fused": "optimizer.fused"}
    facts = Facts(train=TRAIN, workers=2, whole=True, optimizer="Adam", batch=4)
    assert [one.change for one in candidates(facts)] == [
        *("DataLoader(..., num_workers=0)", "Adam(..., fused=True)", "DataLoader(..., batch_size=8)")
    ]
    facts = Facts(train=TRAIN, workers=2, whole=True, optimizer="Adam", batch=4, keys=keys)
    assert [one.change for one in candidates(facts)] == ["data.num_workers=0", "optimizer.fused=true", "data.bs=8"]


def measured(**changes: Any) -> BenchResult:
    parts = {"data": 0.1, "transfer": 0.1, "forward and backward": 1.0, "metric function": 0.1, "optimizer": 0.1}
    fields = {"step_seconds": 1.4, "samples_per_second": 10.0, "parts": parts, "asked": 0.0, "device": "cpu"}
    return BenchResult(**{**fields, "workers": 0, "by_batch": False, "steps": 5, **changes})


def as_json(*trials: TrialResult) -> list[dict[str, Any]]:
    return [vars(one) for one in trials]


def test_the_table_has_the_best_first_and_says_what_was_not_faster() -> None:
    trials = as_json(
        trial("fused=True", [1.1, 1.1, 1.1, 1.1, 1.1], [1.0, 1.0, 1.0, 1.0, 1.0]),
        trial("batch_size=8", [3.0, 3.0], [1.0, 1.0], note=BATCH_NOTE),
        trial("channels_last=true", [1.0, 1.0], [1.0, 1.0]),
        trial("num_workers=2", [1.0, 1.0], [4.0, 4.0]),
        trial("precision=bf16", why="RuntimeError: no"),
        trial("pin_memory=True"),
    )
    assert trial_words(measured(trials=trials)) == [
        f"  batch_size=8  3.00 times the samples/s  change batch_size=8 ({BATCH_NOTE})",
        "  fused=True    1.10 times as fast        change fused=True",
        "  within noise: channels_last=true (1.00)",
        "  slower: num_workers=2 (0.25)",
        "  skipped: precision=bf16: RuntimeError: no",
        "  skipped: pin_memory=True: no time was left",
    ]
    (nothing, _) = trial_words(measured(trials=as_json(trial("a", [1.0, 1.0], [1.0, 1.0]))))
    assert nothing == "  nothing that was tried is faster"
    assert trial_words(measured(untried="nothing was tried: the model is sharded")) == [
        "nothing was tried: the model is sharded"
    ]


def test_advice_names_no_cause_that_is_not_there() -> None:
    assert advice(measured()) == []
    reads = {"recipe.py:7 (item)": 2.0}
    assert advice(measured(reads=reads)) == [], "the CPU waits for nobody"
    assert advice(measured(device="cuda")) == []
    (gpu,) = advice(measured(device="cuda", reads=reads))
    assert "recipe.py:7 (item) 2 times" in gpu
    metric = {"data": 0.0, "forward and backward": 1.0, "metric function": 1.0}
    (slow,) = advice(measured(parts=metric))
    assert "model.metric_func takes 1000.00 ms a step, 50 %" in slow


def test_advice_on_data_follows_the_trials() -> None:
    slow = {"data": 2.0, "transfer": 0.0, "forward and backward": 1.0, "metric function": 0.0}
    helps = trial("num_workers=2", [2.0, 2.0], [1.0, 1.0])
    helps_not = trial("num_workers=2", [1.0, 1.0], [1.0, 1.0])
    assert advice(measured(parts=slow, trials=as_json(helps))) == []
    (text,) = advice(measured(parts=slow, trials=as_json(helps_not)))
    assert "67 % of a step is spent waiting for data, and num_workers=2 did not help: do less in __getitem__" in text
    (text,) = advice(measured(parts=slow, workers=None))
    assert "in the main process" in text
    assert advice(measured(parts=slow, by_batch=True)) == [], "nothing is known to help"


def test_compute_is_a_share_of_what_the_device_reaches() -> None:
    assert compute_words(measured()) == []
    (compute,) = compute_words(measured(flops=2.8e9, peak=8e9))
    assert compute == (
        "compute: 2.8 GFLOP a step in forward and backward, 2 GFLOP/s: 25 % of the 8 GFLOP/s of a matrix product in "
        "float32 on this device"
    )
    (launches,) = compute_words(measured(enqueue_seconds=4e-4, device_seconds=1e-4))
    assert launches.endswith("takes 0.400 ms, computing it 0.100 ms: 75 % of a step is launch overhead")
    (launches,) = compute_words(measured(enqueue_seconds=1e-4, device_seconds=4e-4))
    assert launches.endswith("no launch overhead")
