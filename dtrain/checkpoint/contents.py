"""What a checkpoint's files hold: the state that all ranks share, and each rank's own."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from torch import Tensor

from dtrain.checkpoint.locate import RANKS, RUN
from dtrain.checkpoint.tensors import pieces, read_tensors
from dtrain.checkpoint.tree import flatten
from dtrain.checkpoint.weights import WEIGHTS


class GlobalState(NamedTuple):
    """What is the same on all ranks.

    Attributes:
        structure: what JSON holds of it.
        tensors: its tensors.
        metadata: what the file of weights has as text.
        rows: files of rows, by name.
    """

    structure: Any
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    rows: dict[str, bytes]


def plain(tensor: Tensor) -> Tensor:
    """Returns a tensor as it is written: on the CPU, contiguous, without a graph."""
    return tensor.detach().to("cpu").contiguous()


def packed(state: Any, rank: int) -> bytes:
    """One rank's state as bytes that travel: the length of its JSON, the JSON, its tensors."""
    structure, tensors = flatten(state, f"rank-{rank}")
    text = json.dumps(structure).encode()
    copied = {name: plain(tensor) for name, tensor in tensors.items()}
    return b"".join([len(text).to_bytes(8, "little"), text, *pieces(copied)])


def checkpoint_files(whole: GlobalState, ranks: list[Tensor | None]) -> dict[str, Any]:
    """Returns the files of a checkpoint, name -> its bytes in pieces.

    Args:
        whole: what is the same on all ranks.
        ranks: what each rank has packed.
    """
    structure, tensors, metadata, rows = whole
    structures: list[Any] = []
    of_ranks: dict[str, Tensor] = {}
    for one in ranks:
        data = b"" if one is None else one.cpu().numpy().tobytes()
        end = 8 + int.from_bytes(data[:8], "little")
        structures.append(json.loads(data[8:end]))
        of_ranks |= read_tensors(data[end:])[0]
    prefix = f"{WEIGHTS}:"
    return {
        WEIGHTS: pieces({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}, metadata),
        f"{RUN}.json": [json.dumps(structure).encode()],
        f"{RUN}.safetensors": pieces({n: t for n, t in tensors.items() if not n.startswith(prefix)}),
        f"{RANKS}.json": [json.dumps({"list": structures}).encode()],
        f"{RANKS}.safetensors": pieces(of_ranks),
        **{name: [lines] for name, lines in rows.items()},
    }
