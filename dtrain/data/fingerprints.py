"""Fingerprints of batches and their samples, by which is compared what ranks and runs have read."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtrain.data.batch_tree import Node, Scalars, Struct, tree_of
from dtrain.data.batch_types import UnclearError
from dtrain.data.batches import BatchReader
from dtrain.data.collate import Collated

_EDGE = 512  # values
_AN_ADDRESS = " at 0x"  # in the text of an object that says no more of itself


def sample_fingerprints(reader: BatchReader, batch: Any, count: int) -> list[int]:
    """Returns a fingerprint of each sample of a batch; none where it is not known what a sample is.

    Args:
        reader: of the loader's batches.
        batch: the batch, or a rank's part of it.
        count: its number of samples.
    """
    try:
        samples = reader.samples(batch, count)
    except UnclearError:
        return []
    return [_fingerprint(sample) for sample in samples]


def row_shapes(batch: Any) -> list[list[int]]:
    """Returns the shapes of a batch's tensors and arrays without their first dimension, as padding changes them."""
    batch = batch.batch if type(batch) is Collated else batch
    return [list(tensor.shape[1:]) for _, tensor in _leaves(batch) if not getattr(tensor, "is_nested", False)]


def first_bytes(batch: Any) -> bytes:
    """Returns the values of a batch's first tensor or array, to take a fingerprint of."""
    batch = batch.batch if type(batch) is Collated else batch
    return next((tensor_bytes(tensor) for _, tensor in _leaves(batch)), b"")


def edge_mark(batch: Any) -> int:
    """Returns a fingerprint of a batch or sample: of some of the first and the last values of all its tensors.

    It is 0 where there is nothing to take one of.
    """
    batch = batch.batch if type(batch) is Collated else batch
    found = [f"{path} {tuple(tensor.shape)}".encode() + _edges(tensor) for path, tensor in _leaves(batch)]
    if not found and _AN_ADDRESS in (text := repr(batch)):
        return 0
    return 1 + zlib.crc32(b"".join(found) or text.encode())


def _edges(tensor: Tensor | np.ndarray) -> bytes:
    if isinstance(tensor, Tensor) and (tensor.is_nested or tensor.layout is not torch.strided):
        return tensor_bytes(tensor)
    flat = tensor.reshape(-1)
    return tensor_bytes(flat[:_EDGE]) + tensor_bytes(flat[-_EDGE:])


def tensor_bytes(tensor: Tensor | np.ndarray) -> bytes:
    """Returns a tensor's values as they lie in memory, to take a fingerprint of."""
    if isinstance(tensor, np.ndarray):
        return repr(tensor.tolist()).encode() if tensor.dtype.hasobject else np.ascontiguousarray(tensor).tobytes()
    tensor = tensor.detach()
    if tensor.is_nested:
        return b"".join(tensor_bytes(part) for part in tensor.unbind())
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return bytes(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _fingerprint(part: Any) -> int:
    """Of a sample's first tensor or array that is more than a number."""
    return zlib.crc32(next((tensor_bytes(tensor) for _, tensor in _leaves(part) if tensor.ndim > 0), b""))


def _leaves(batch: Any) -> Iterator[tuple[str, Tensor | np.ndarray]]:
    """Yields the tensors and arrays of a batch with their places, also those within objects of known types."""
    for node in _all_nodes(tree_of(batch, collated=True)):
        value = node.value
        if isinstance(value, (Tensor, np.ndarray)):
            yield node.path, value
        elif not isinstance(node, (Struct, Scalars)):
            inner = _inner(value)
            for name, tensor in inner.items():
                if isinstance(tensor, (Tensor, np.ndarray)):
                    yield f"{node.path}.{name}", tensor


def _all_nodes(node: Node) -> Iterator[Node]:
    yield node
    if isinstance(node, Struct):
        for child in node.children.values():
            yield from _all_nodes(child)


def _inner(value: Any) -> dict[str, Any]:
    """The attributes of an object; PackedSequence has fields, PyTorch Geometric's batches say theirs."""
    if hasattr(value, "_asdict"):
        return dict(value._asdict())
    to_dict = getattr(value, "to_dict", None)
    if callable(to_dict) and callable(getattr(value, "to_data_list", None)):
        return dict(to_dict())
    return dict(getattr(value, "__dict__", {}))
