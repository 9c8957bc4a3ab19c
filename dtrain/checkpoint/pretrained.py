"""A net in its library's own form beside a checkpoint: what its `save_pretrained()` writes (Hugging Face)."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from dtrain.checkpoint.folder import remove
from dtrain.errors import UsageError

PRETRAINED = "pretrained"  # in the checkpoint's folder


def check_pretrained(module: nn.Module, *, sharded: bool) -> None:
    """Looks whether a net can be written so.

    Raises:
        UsageError: it has no such method, or each rank has a part of it alone.
    """
    if sharded:
        raise UsageError("checkpoint.pretrained=true: not with train.shard. Remove one of them.")
    if not callable(getattr(module, "save_pretrained", None)):
        raise UsageError(
            f"checkpoint.pretrained=true: the model ({type(module).__name__}) has no save_pretrained(folder). Remove "
            "it, or give the model that method."
        )


def write_pretrained(module: nn.Module, folder: Path, name: str) -> Path:
    """Writes a net as it is now, under a name that a run's next start removes; its place is in the checkpoint.

    Args:
        module: the net.
        folder: of all checkpoints.
        name: the checkpoint's, which is not there yet.

    Raises:
        OSError: the disk is full, say.
    """
    part = folder / f".{name}.{PRETRAINED}.part"
    remove(part)
    part.mkdir(parents=True)
    try:
        module.save_pretrained(str(part))  # type: ignore[operator]
    except BaseException:
        remove(part)
        raise
    return part
