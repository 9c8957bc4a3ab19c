"""Nets as files: each kind is run from its file alone and compared; what cannot be is refused, and leaves nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import dtrain
from dtrain.errors import DtrainError, UsageError
from dtrain.tools.export import checked
from dtrain.tools.export.formats import format_of

HAS_ONNX = all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="pip install onnx onnxscript onnxruntime")


class Two(nn.Module):
    """Two inputs, and outputs by name, one of which is no float."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))

    def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        y = self.body(x)
        y = y if mask is None else y * mask[:, None]
        return {"logits": y, "label": y.argmax(1)}


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() > 0 else -self.body(x)


class FixedBatch(DataDependent):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).view(5, 2)


class Random(DataDependent):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x) + self.calls


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net() -> Two:
    torch.manual_seed(1)
    net = Two()
    net(torch.randn(8, 3))  # so that BatchNorm has statistics of its own
    return net


def by_hand(net: Two, x: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same with NumPy, from the weights."""
    s = {name: value.double().numpy() for name, value in net.state_dict().items()}
    y = x @ s["body.0.weight"].T + s["body.0.bias"]
    y = (y - s["body.1.running_mean"]) / np.sqrt(s["body.1.running_var"] + 1e-5) * s["body.1.weight"] + s["body.1.bias"]
    return (y @ s["body.3.weight"].T + s["body.3.bias"]) * mask[:, None]


def test_weights_alone(net: Two, x: Tensor, tmp_path: Path) -> None:
    assert dtrain.export(net, tmp_path / "a.safetensors", x) == 0
    other = Two()
    other.load_state_dict(load_file(tmp_path / "a.safetensors"))
    assert torch.equal(other.eval()(x)["logits"], net.eval()(x)["logits"])


def test_a_program_of_torch(net: Two, x: Tensor, tmp_path: Path) -> None:
    """Batches of any size, of which the export has seen one; the other inputs by position and by name."""
    assert dtrain.export(net, tmp_path / "a.pt2", {"mask": torch.ones(5), "x": x}) < 1e-6
    assert net.training, "the net is left as it was"
    program = torch.export.load(tmp_path / "a.pt2").module()
    for size in (1, 2, 40):
        x, mask = torch.randn(size, 3), torch.randn(size)
        returned = program(mask=mask, x=x)
        assert (
            np.abs(returned["logits"].detach().numpy() - by_hand(net, x.double().numpy(), mask.double().numpy())).max()
            < 1e-5
        )
        assert torch.equal(returned["label"], returned["logits"].argmax(1))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt2"]


@needs_onnx
@pytest.mark.filterwarnings("ignore")
def test_onnx(net: Two, x: Tensor, tmp_path: Path) -> None:
    import onnxruntime

    assert 0 <= dtrain.export(net, tmp_path / "a.onnx", {"mask": torch.ones(5), "x": x}) < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    assert sorted(one.name for one in session.get_inputs()) == ["mask", "x"]
    for size in (1, 2, 40):
        given = {"x": np.random.rand(size, 3).astype("float32"), "mask": np.random.rand(size).astype("float32")}
        logits, label = session.run(["logits", "label"], given)
        assert np.abs(logits - by_hand(net, given["x"].astype(float), given["mask"].astype(float))).max() < 1e-5
        assert (label == logits.argmax(1)).all()
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


def test_one_sample_is_enough_to_trace(net: Two, x: Tensor, tmp_path: Path) -> None:
    dtrain.export(net, tmp_path / "a.pt2", (x[:1], torch.ones(1)))
    assert len(torch.export.load(tmp_path / "a.pt2").module()(torch.ones(7, 3), torch.ones(7))["logits"]) == 7


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            DataDependent,
            r"depends on values of the data, as in `if x.sum\(\) > 0` \(.*test_export.py, line \d+.*to a \.safetensors file",
        ),
        (FixedBatch, r"only takes batches of 5 samples.*to a \.safetensors file"),
        (Random, r"was not written: its outputs for 5 samples differ by up to \d"),
    ],
)
def test_what_cannot_be_exported_leaves_nothing(kind: Any, words: str, x: Tensor, tmp_path: Path) -> None:
    with pytest.raises(DtrainError, match=words) as caught:
        dtrain.export(kind(), tmp_path / "a.pt2", x)
    assert len(str(caught.value)) < 500
    assert not list(tmp_path.iterdir())
    if kind is not Random:  # the remedy that the message names
        dtrain.export(kind(), tmp_path / "a.safetensors", x)


def test_a_file_whose_outputs_differ_is_not_kept(
    net: Two, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one was there before: it stays as it was."""
    dtrain.export(net, tmp_path / "a.safetensors", x)
    before = (tmp_path / "a.safetensors").read_bytes()
    monkeypatch.setattr(checked, "tensors_of", lambda value, old=checked.tensors_of: [one + 1 for one in old(value)])
    with pytest.raises(DtrainError, match=r"differ by up to 1 from the model's, and 0\.0001"):
        dtrain.export(net, tmp_path / "a.safetensors", x, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_differences() -> None:
    of = checked._difference
    one = torch.tensor([1.0, float("nan"), float("inf")])
    assert of(one, one.clone(), 1e-4) == (0, 1e-4)
    assert of(one, one.nan_to_num(), 1e-4)[0] == float("inf")
    assert of(-one, one, 1e-4)[0] == float("inf")
    assert of(torch.tensor([100.0, 0.5]), torch.tensor([100.0, 0.0]), 1e-4) == (0.5, pytest.approx(0.01))
    assert of(torch.tensor([1, 2]), torch.tensor([1, 3]), 1e-4)[0] == float("inf")
    assert of(torch.zeros(0, 3), torch.zeros(0, 3), 1e-4)[0] == 0


def test_bad_input_is_refused_before_any_work(
    net: Two, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there.pt2").write_text("mine")
    for file, words in {
        "a.tflite": r"cannot export to \.tflite\. Use \.safetensors, \.pt2, \.onnx",
        "a": "a file without an ending",
        "there.pt2": "already exists and is not overwritten. Use --force",
        "no/a.pt2": "no such folder",
    }.items():
        with pytest.raises(UsageError, match=words):
            dtrain.export(net, tmp_path / file, x)
    assert (tmp_path / "there.pt2").read_text() == "mine"
    for inputs in (torch.tensor(1.0), "text", {}):
        with pytest.raises(UsageError, match="no first dimension"):
            dtrain.export(net, tmp_path / "a.pt2", inputs)
    with pytest.raises(UsageError, match="Did you mean 'onnx'"):
        format_of("onx", None)
    with pytest.raises(UsageError, match=r"of --format onnx ends in \.onnx"):
        format_of("pt2", Path("a.pt2")) and format_of("onnx", Path("a.pt2"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(UsageError, match=r"needs .*onnxruntime.*: pip install .*onnxruntime$"):
        format_of("onnx", None)
