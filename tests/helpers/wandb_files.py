"""Reads an offline W&B run: a log of protobuf records in LevelDB's block format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

_BLOCK = 32768
_HEADER = 7  # of the file, and of each chunk: crc (4 bytes), length (2), kind (1)
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def _records(data: bytes) -> Iterator[bytes]:
    position, parts = _HEADER, []
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + _HEADER])
        parts.append(data[position + _HEADER : position + _HEADER + length])
        position += _HEADER + length
        if kind in (_FULL, _LAST):
            yield b"".join(parts)
            parts = []


def wandb_rows(file: Path) -> list[dict[str, float]]:
    """The run's rows of the history, without W&B's own columns and what is of moments within epochs."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for data in _records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            rows.append({k: v for k, v in items.items() if not k.startswith(("_", "step/", "gpu/", "history"))})
    return [row for row in rows if row]


def wandb_media(file: Path) -> list[tuple[int, str, str]]:
    """The step, name and type of each image, histogram and HTML in the run's history, and the files saved with it."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for data in _records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "files":
            found += [(-1, one.path, "file") for one in record.files.files if one.path.endswith("yaml")]
        for item in record.history.item if kind == "history" else ():
            if item.nested_key[-1:] == ["_type"] and item.nested_key[0] != "history":
                found.append((record.history.step.num, item.nested_key[0], json.loads(item.value_json)))
    return found
