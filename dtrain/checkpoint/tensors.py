"""Tensors in the safetensors format, made in pieces.

The format's own library makes one copy of everything first, with Python's lock held, for which a training beside it
would wait. Here the bytes go out as they lie in memory. What is read is read by the library.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

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
_PIECE = 1 << 24


def pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yields a safetensors file of CPU tensors, piece by piece.

    Args:
        tensors: name -> contiguous tensor on the CPU, of one of the types in `DTYPES`.
    """
    # Wide types first, so that each tensor begins at a multiple of its elements' size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
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


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Returns the memory that tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
