"""Keeps the images, histograms, texts and files of the user's hooks, and passes them to the trackers; on rank 0."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from dtrain.callbacks.tracking.tracking import Tracking
from dtrain.errors import UsageError
from dtrain.layout import MEDIA
from dtrain.rundir.media import Entry, MediaFolder

logger = logging.getLogger(__name__)

_BINS = 64
_CHANNELS = (1, 3, 4)
_DIMENSIONS = (2, 3)
_ROUNDING = 1e-6
_PART = 1 << 20  # bytes of a file that are copied at once


class RunMedia:
    """What a `Run` hands its images and the like to.

    Args:
        run: the run's folder.
        updates: optimizer steps of the run so far.
        tracking: the trackers; None for none.
    """

    def __init__(self, run: Path, updates: int, tracking: Tracking | None) -> None:
        self._folder = MediaFolder(run, updates)
        self._run, self._tracking = run, tracking
        self._warned = False

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Passes numbers of this moment to the trackers."""
        if self._tracking is not None:
            self._tracking.log_values(values, step)

    def add(self, kind: str, name: str, content: Any, *, epoch: int, step: int) -> None:
        """Keeps one thing.

        Raises:
            UsageError: it is not what its kind says.
        """
        entry, suffix = Entry(kind, str(name), epoch, step), ""
        data: bytes | Iterable[bytes] | None = None
        if kind == "image":
            data, suffix = png_of(content, name), ".png"
        elif kind == "histogram":
            entry = histogram_of(entry, content)
        elif kind == "text":
            data, suffix = str(content).encode("utf-8", "replace"), ".txt"
        else:
            data, suffix = _parts(content), content.suffix
        try:
            entry = self._folder.add(entry, data, suffix)
        except OSError as error:  # a disk that takes none of these ends no training
            if not self._warned:
                self._warned = True
                logger.warning("%s %r cannot be saved in %s: %s", kind, str(name), self._run / MEDIA, error)
            return
        if self._tracking is not None:
            self._tracking.log_media(entry)


def png_of(image: Any, name: str) -> bytes:
    """Returns an image as a PNG file's content.

    Args:
        image: as for `Run.image`.
        name: what the user calls it.

    Raises:
        UsageError: it is no image.
    """
    out = io.BytesIO()
    if hasattr(image, "savefig"):
        image.savefig(out, format="png", bbox_inches="tight")
        return out.getvalue()
    if hasattr(image, "convert") and callable(getattr(image, "save", None)):
        image.save(out, format="PNG")
        return out.getvalue()
    from matplotlib.image import imsave

    imsave(out, _pixels(image, name), format="png")
    return out.getvalue()


def _pixels(image: Any, name: str) -> np.ndarray[Any, Any]:
    """Returns an array of bytes of shape (height, width, 3 or 4)."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    try:
        array = np.asarray(image)
    except ValueError:
        array = np.empty(0)
    if array.ndim not in _DIMENSIONS or array.size == 0 or array.dtype.kind not in "biuf":
        shape = f" of shape {tuple(array.shape)}" if hasattr(image, "shape") else ""
        raise UsageError(
            f"image {name!r} is a {type(image).__name__}{shape}: should be a figure, a PIL image, or an array of shape "
            "(height, width), (height, width, 3 or 4) or (1, 3 or 4, height, width)."
        )
    return np.ascontiguousarray(_as_bytes(_channels_last(array, name), name))


def _channels_last(array: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    if array.ndim == 2:
        array = array[..., None]
    if array.shape[-1] not in _CHANNELS and array.shape[0] in _CHANNELS:
        array = np.moveaxis(array, 0, -1)
    if array.shape[-1] not in _CHANNELS:
        raise UsageError(f"image {name!r} has shape {tuple(array.shape)}: no dimension is of 1, 3 or 4 channels.")
    return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array


def _as_bytes(array: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    if array.dtype.kind == "b":
        array = array.astype(np.uint8) * 255
    array = np.nan_to_num(array) if array.dtype.kind == "f" else array
    most = 1.0 + _ROUNDING if array.dtype.kind == "f" else 255
    if array.min() < -_ROUNDING or array.max() > most:
        raise UsageError(
            f"image {name!r} has values from {array.min():.4g} to {array.max():.4g}. Integers should be from 0 to 255, "
            "floats from 0 to 1: scale it."
        )
    if array.dtype.kind == "f":
        array = np.round(array.clip(0, 1) * 255)
    return array.astype(np.uint8)


def histogram_of(entry: Entry, values: Any) -> Entry:
    """Returns an entry with the counts and edges of the finite ones of some numbers.

    Raises:
        UsageError: there is none.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().float().cpu().numpy()
    array = np.asarray(values).ravel()
    if array.dtype.kind not in "biuf":
        raise UsageError(f"histogram {entry.name!r} is of {array.dtype} values: should be numbers.")
    numbers = array.astype(np.float64)
    numbers = numbers[np.isfinite(numbers)]
    if not numbers.size:
        raise UsageError(f"histogram {entry.name!r} has no finite number among its {array.size} values.")
    counts, edges = np.histogram(numbers, bins=_BINS)
    return Entry(
        entry.kind, entry.name, entry.epoch, entry.step, counts=tuple(counts.tolist()), edges=tuple(edges.tolist())
    )


def _parts(path: Path) -> Iterator[bytes]:
    """Returns a file's content in parts, since it may be larger than the memory that is left.

    Raises:
        UsageError: it cannot be opened.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UsageError(f"{path}: cannot read the file: {error.strerror}.") from None
    return _read(file)


def _read(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while part := file.read(_PART):
            yield part
