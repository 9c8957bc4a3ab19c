"""Whole runs on the GPU: killed and resumed, failures and what they say, doctor, one rank under torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

DTRAIN = [sys.executable, "-m", "dtrain"]
ENVIRONMENT = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

RECIPE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def build_model():
    return nn.Sequential(nn.Embedding(20, 16), nn.Flatten(), nn.Linear(48, 3))


def build_dataloaders(wrong: int = -1):
    torch.manual_seed(0)
    x, y = torch.randint(20, (512, 3)), torch.randint(3, (512,))
    if wrong >= 0:
        y[wrong] = 9
    return DataLoader(TensorDataset(x, y), 32, shuffle=True), None


def build_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def train_step(model, x, y, gigabytes: int = 0):
    held = torch.empty(gigabytes << 30, dtype=torch.uint8, device=x.device)
    loss = nn.functional.cross_entropy(model(x), y)
    return loss, loss.detach() + held.numel() * 0
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return path


def run(*words: Any, cwd: Path, device: torch.device, launcher: list[str] = DTRAIN) -> subprocess.CompletedProcess[str]:
    line = [*launcher, *map(str, words), *(["--cpu"] if device.type == "cpu" else [])]
    return subprocess.run(line, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False)


def numbers(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "history.csv").drop(
        columns=["seconds", "samples_per_second", "gpu_memory_mib"], errors="ignore"
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    last = sorted(folder.glob("checkpoints/epoch-*"), key=lambda path: int(path.name.split("-")[1]))[-1]
    return {
        name: tensor for path in sorted(last.glob("model*.safetensors")) for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("kept", ["auto", "false"])
def test_a_run_that_was_killed_and_resumed_is_the_uninterrupted_one(
    kept: str, tmp_path: Path, device: torch.device, note: Callable[..., None]
) -> None:
    words = [
        "train",
        "epochs=4",
        "train.deterministic=true",
        f"train.data_on_device={kept}",
        "checkpoint.every_steps=7",
    ]
    whole = run(*words, "run.name=whole", cwd=tmp_path, device=device)
    assert whole.returncode == 0, whole.stderr
    line = [*DTRAIN, *words, "run.name=killed", *(["--cpu"] if device.type == "cpu" else [])]
    process = subprocess.Popen(
        line,
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    found: list[Path] = []
    until = time.monotonic() + 100
    while not found and process.poll() is None and time.monotonic() < until:
        found = list((tmp_path / "runs/killed/checkpoints").glob("epoch-*step-*"))
        time.sleep(0.005)
    interrupted = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    resumed = run(*words, "run.name=killed", cwd=tmp_path, device=device)
    assert resumed.returncode == 0, resumed.stderr
    pd.testing.assert_frame_equal(numbers(tmp_path / "runs/killed"), numbers(tmp_path / "runs/whole"), check_exact=True)
    one, other = weights(tmp_path / "runs/killed"), weights(tmp_path / "runs/whole")
    assert one
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    how = "killed within an epoch and resumed" if interrupted else "(was over before it could be killed)"
    note(f"digits, data_on_device={kept}, {how}: history and weights", "bitwise equal")


def test_a_label_out_of_range_is_named(recipe: Path, device: torch.device, note: Callable[..., None]) -> None:
    done = run("train", recipe, "data.wrong=77", "train.epochs=2", cwd=recipe.parent, device=device)
    assert done.returncode == 1
    assert "the label 9 of the sample with index 77 in the dataset" in done.stderr, done.stderr
    if device.type == "cuda":
        assert "the GPU reports errors late" in done.stderr
        assert "CUDA_LAUNCH_BLOCKING=1 dtrain train" in done.stderr
    note("label out of range: value and sample are named", "yes")


def test_out_of_memory_names_the_peak_and_a_smaller_batch(
    recipe: Path, gpu: torch.device, note: Callable[..., None]
) -> None:
    done = run("train", recipe, "step.gigabytes=4000", cwd=recipe.parent, device=gpu)
    assert done.returncode == 1
    assert "GPU memory: tensors took up to" in done.stderr, done.stderr
    assert "try batch_size=16 with train.accumulation=2" in done.stderr
    note("out of memory: peak and smaller batch are named", "yes")


def test_torch_does_not_ask_for_destroy_process_group(
    recipe: Path, device: torch.device, note: Callable[..., None]
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "dtrain"]
    for words in (["train", recipe, "train.epochs=1"], ["bench", recipe, "--steps", "5"]):
        done = run(*words, cwd=recipe.parent, device=device, launcher=launcher if words[0] == "train" else DTRAIN)
        assert done.returncode == 0, done.stderr
        assert "destroy_process_group" not in done.stdout + done.stderr
    note("torch's warning of destroy_process_group()", "not seen")


def test_the_memory_column_and_the_start(recipe: Path, gpu: torch.device, note: Callable[..., None]) -> None:
    done = run("train", recipe, "train.epochs=2", "run.name=one", cwd=recipe.parent, device=gpu)
    assert "data on the GPU: train (" in done.stdout + done.stderr
    peaks = pd.read_csv(recipe.parent / "runs/one/history.csv")["gpu_memory_mib"]
    assert (peaks > 0).all()
    note("gpu_memory_mib of a tiny run", ", ".join(f"{peak:.1f}" for peak in peaks))


def test_doctor_measures_the_card(tmp_path: Path, gpu: torch.device, note: Callable[..., None]) -> None:
    done = run("doctor", "-n", max(1, torch.cuda.device_count()), cwd=tmp_path, device=gpu)
    lines = [line.strip() for line in done.stdout.splitlines() if "TFLOP/s in bf16" in line]
    assert lines, done.stdout + done.stderr
    for line in lines:
        note("doctor", line)
