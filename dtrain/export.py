"""Predictions to a file: CSV, NumPy or Parquet; written whole or not at all."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

ENDINGS = (".csv", ".npy", ".parquet")


def check_target(path: Path) -> None:
    """Checks, before any work, that a file can be written.

    Raises:
        UsageError: its ending is unknown, what writes it is not installed, or its folder is not there.
    """
    if path.suffix not in ENDINGS:
        raise UsageError(
            f"-o {path}: cannot write {path.suffix or 'a file without an ending'}. Use {', '.join(ENDINGS)}."
        )
    if path.suffix == ".parquet" and not _has_parquet():
        raise UsageError(
            f"-o {path}: pandas writes Parquet through pyarrow, which is not installed: pip install pyarrow."
        )
    if not path.parent.is_dir():
        raise UsageError(f"-o {path}: there is no folder {path.parent}. Make it first.")
    if path.is_dir():
        raise UsageError(f"-o {path}: this is a folder. Name a file.")


def _has_parquet() -> bool:
    return any(importlib.util.find_spec(name) is not None for name in ("pyarrow", "fastparquet"))


def write_predictions(predictions: Any, path: Path) -> None:
    """Writes predictions to a temporary name and renames it, so that the file is whole or not there.

    Args:
        predictions: a tensor, its first dimension the rows; or, for tables, a tuple or mapping of such.
        path: ends in .csv, .npy or .parquet. A table has one column for each number of a row.

    Raises:
        UsageError: the predictions do not fit the kind of file.
        OSError: the file cannot be written.
    """
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        with part.open("wb") as file:
            _write(predictions, path, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write(predictions: Any, path: Path, file: Any) -> None:
    if path.suffix == ".npy":
        import numpy as np

        if isinstance(predictions, (tuple, Mapping)):
            raise UsageError(f"-o {path}: the predictions are several tensors; a .npy file holds one. Use .csv.")
        np.save(file, _array(predictions), allow_pickle=False)
    elif path.suffix == ".csv":
        table(predictions).to_csv(file, index=False, lineterminator="\n")
    else:
        table(predictions).to_parquet(file, index=False)


def table(predictions: Any) -> pd.DataFrame:
    """Returns predictions as a table: column `prediction`, or `prediction_0`, `prediction_1`, ..."""
    import pandas as pd

    frame: pd.DataFrame = pd.DataFrame(_columns(predictions, "prediction"))
    return frame


def _columns(predictions: Any, name: str) -> dict[str, Any]:
    if isinstance(predictions, Mapping):
        parts = [_columns(part, str(key)) for key, part in predictions.items()]
    elif isinstance(predictions, tuple):
        parts = [_columns(part, f"{name}_{number}") for number, part in enumerate(predictions)]
    else:
        rows = _array(predictions)
        rows = rows.reshape(len(rows), -1)
        if rows.shape[1] == 1:
            return {name: rows[:, 0]}
        return {f"{name}_{number}": rows[:, number] for number in range(rows.shape[1])}
    return {column: values for part in parts for column, values in part.items()}


def _array(tensor: Any) -> Any:
    """A tensor as NumPy has it; bfloat16, which NumPy lacks, as float32, which holds each of its values."""
    return tensor.float().numpy() if str(tensor.dtype) == "torch.bfloat16" else tensor.numpy()
