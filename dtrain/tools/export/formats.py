"""The three kinds of file: how each is written from a net, and how it is run again from the file alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.checkpoint.extra import extra_of, load_extra
from dtrain.checkpoint.tensors import read_file
from dtrain.checkpoint.weights import check_fit, weights_file
from dtrain.errors import UsageError, nearest
from dtrain.tools.export.model_call import ModelCall, tensors_of
from dtrain.tools.export.tracing import quiet, traced

Runner = Callable[[ModelCall], list[Tensor]]  # runs a file that was written

_MOST_ONNX = (2 << 30) - (16 << 20)  # bytes of weights; a protobuf message ends at 2 GiB


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        name: what `--format` calls it.
        ending: of its files.
        packages: what has to be installed besides dtrain.
        write: writes a net, called so, to a path; how it is called may be None for weights alone.
        opened: returns what runs the file at a path; it gets a net with other weights, too.
    """

    name: str
    ending: str
    packages: tuple[str, ...]
    write: Callable[[nn.Module, Any, Path], None]
    opened: Callable[[Path, Callable[[], nn.Module]], Runner]

    @property
    def is_program(self) -> bool:
        """Whether the file runs by itself, for batches of any size; else it holds weights alone."""
        return self.name != "safetensors"


def format_of(name: str | None, file: Path | None) -> Format:
    """Returns the kind of file that is asked for; by default the one that holds weights alone.

    Raises:
        UsageError: there is none of this name or ending, the two disagree, or a package is missing.
    """
    ending = "" if file is None else file.suffix.lower()
    by_ending = next((one for one in FORMATS if one.ending == ending), None)
    known = ", ".join(one.name for one in FORMATS)
    if name is not None:
        found = next((one for one in FORMATS if name.lower() in (one.name, one.ending[1:])), None)
        if found is None:
            raise UsageError(f"--format {name}: no such format.{nearest(name, [f.name for f in FORMATS])} Use {known}.")
        if file is not None and by_ending is not found:
            raise UsageError(f"-o {file}: a file of --format {found.name} ends in {found.ending}.")
    elif file is not None and by_ending is None:
        endings = ", ".join(one.ending for one in FORMATS)
        raise UsageError(f"-o {file}: cannot export to {ending or 'a file without an ending'}. Use {endings}.")
    else:
        found = by_ending or FORMATS[0]
    missing = [package for package in found.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(
            f"--format {found.name} needs {', '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not "
            f"installed: pip install {' '.join(missing)}"
        )
    return found


# --- weights alone


def _write_weights(net: nn.Module, _: ModelCall | None, path: Path) -> None:
    with path.open("wb") as file:
        file.writelines(weights_file(net))


def loaded_weights(path: Path, fresh: Callable[[], nn.Module]) -> nn.Module:
    """Returns the weights in a net that is built anew, so that what the file lacks is noticed."""
    net = fresh().eval()
    tensors, metadata = read_file(path)
    saved: dict[str, Any] = {**tensors, **extra_of(metadata)}
    check_fit(net, saved, str(path))
    net.load_state_dict(load_extra(net, saved), strict=False)
    return net


def _open_weights(path: Path, fresh: Callable[[], nn.Module]) -> Runner:
    net = loaded_weights(path, fresh)
    return lambda call: tensors_of(call.outputs(net))


# --- torch.export


def _write_program(net: nn.Module, call: ModelCall, path: Path) -> None:
    program = traced(net, call)
    with quiet():
        torch.export.save(program, path)


def _open_program(path: Path, _: Callable[[], nn.Module]) -> Runner:
    with quiet():
        net = torch.export.load(path).module()
    return lambda call: tensors_of(call.outputs(net))


# --- ONNX


def _write_onnx(net: nn.Module, call: ModelCall, path: Path) -> None:
    size = sum(tensor.nbytes for tensor in net.state_dict().values() if isinstance(tensor, Tensor))
    if size > _MOST_ONNX:
        raise UsageError(
            f"the weights have {size / 2**30:.1f} GiB, and one ONNX file holds 2 GiB at most. Use --format pt2."
        )
    program = traced(net, call)
    names = _output_names(call.outputs(net))
    try:
        with quiet():
            made = torch.onnx.export(program, dynamo=True, verbose=False, output_names=names)
            assert made is not None  # noqa: S101 - for the type checker
            made.save(path, external_data=False)
    except torch.onnx.OnnxExporterError as error:
        raise UsageError(f"ONNX cannot express the model: {_cause(error)} Use --format pt2, or safetensors.") from None


def _output_names(returned: Any) -> list[str] | None:
    """Names for the outputs: the keys of a flat mapping, else `output` or `output_0`, `output_1`, ..."""
    if isinstance(returned, dict) and all(isinstance(one, Tensor) for one in returned.values()):
        return [str(key) for key in returned]
    count = len(tensors_of(returned))
    return ["output"] if count == 1 else [f"output_{number}" for number in range(count)]


def _cause(error: BaseException) -> str:
    """The innermost cause of torch's, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if text.endswith(".") else f"{text}."


def _open_onnx(path: Path, _: Callable[[], nn.Module]) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - its own kinds, by no common base
        raise UsageError(f"onnxruntime cannot load the model: {_cause(error)} Use --format pt2.") from None
    names = [one.name for one in session.get_inputs()]

    def run(call: ModelCall) -> list[Tensor]:
        values = tensors_of((call.args, call.kwargs))
        given = {name: value.detach().cpu().contiguous().numpy() for name, value in zip(names, values, strict=True)}
        return [torch.from_numpy(one) for one in session.run(None, given)]

    return run


FORMATS = (
    Format("safetensors", ".safetensors", (), _write_weights, _open_weights),
    Format("pt2", ".pt2", (), _write_program, _open_program),
    Format("onnx", ".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _open_onnx),
)
