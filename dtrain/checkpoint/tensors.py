"""Tensors in the safetensors format, made in pieces, and read.

The format's own library makes one copy of everything first, with Python's lock held, for which a training beside it
would wait. Here the bytes go out as they lie in memory. What is read is read by the library.

What the format lacks is written as something else, which the file's metadata tells: a complex128 tensor as its real
view, with one more dimension of size 2.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dtrain.errors import CheckpointError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}
VIEWS = "dtrain.complex"  # the metadata's key: a JSON list of the tensors that are real views of complex ones
_VIEWED = (torch.complex128, torch.complex32)
_PIECE = 1 << 24


def storable(tensor: Tensor) -> bool:
    """Whether a checkpoint can hold a tensor of this type and layout."""
    return tensor.layout is torch.strided and tensor.dtype in (*DTYPES, *_VIEWED)


def check_storable(tensors: Mapping[str, Tensor], what: str = "") -> None:
    """Looks whether tensors can be written.

    Args:
        tensors: by name.
        what: where they are, for the message.

    Raises:
        CheckpointError: one is of a type or layout that the format lacks; it is named.
    """
    for name, tensor in tensors.items():
        if not storable(tensor):
            raise CheckpointError(
                f"{what}{name} is a tensor of type {tensor.dtype}, layout {tensor.layout}, which a checkpoint cannot "
                "contain. Make it a strided tensor of a standard dtype, or a buffer "
                "with persistent=False that __init__ fills."
            )


def pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """Yields a safetensors file of CPU tensors, piece by piece.

    Args:
        tensors: name -> contiguous tensor on the CPU.
        metadata: further text that the file holds, by name.

    Raises:
        CheckpointError: a tensor is of a type that the format lacks.
    """
    check_storable(tensors)
    viewed = sorted(name for name, tensor in tensors.items() if tensor.dtype in _VIEWED)
    tensors = {**tensors, **{name: torch.view_as_real(tensors[name].resolve_conj()) for name in viewed}}
    more = {VIEWS: json.dumps(viewed)} if viewed else {}
    # Wide types first, so that each tensor begins at a multiple of its elements' size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **more, **(metadata or {})}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        if tensors[name].numel():
            data = memoryview(tensors[name].detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            for start in range(0, len(data), _PIECE):
                yield data[start : start + _PIECE]


def read_tensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a safetensors file, in memory of torch's own making, and its metadata.

    Raises:
        CheckpointError: the bytes are no such file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = {name: tensor.clone() for name, tensor in load(data).items()}
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return _viewed(tensors, header.get("__metadata__", {}))
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"a checkpoint has invalid tensors: {error}") from None


def read_file(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the same of a file, without a copy of the whole of it.

    Args:
        path: the file.
        prefix: that the names of the tensors that are read begin with.

    Raises:
        CheckpointError: it is no such file.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return _viewed({name: file.get_tensor(name) for name in names}, file.metadata() or {})
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(str(error)) from None


def _viewed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    viewed = [name for name in json.loads(metadata.get(VIEWS, "[]")) if name in tensors]
    return tensors | {name: torch.view_as_complex(tensors[name]) for name in viewed}, metadata


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Returns the memory that tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
