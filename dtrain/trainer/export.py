"""Predictions to a file: CSV, NumPy, Parquet or JSON lines; written whole or not at all."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.errors import UsageError
from dtrain.files import written_whole

if TYPE_CHECKING:
    import pandas as pd

ENDINGS = (".csv", ".npy", ".parquet", ".jsonl")


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
        raise UsageError(f"-o {path}: Parquet needs pyarrow: pip install pyarrow.")
    if not path.parent.is_dir():
        raise UsageError(f"-o {path}: no such folder: {path.parent}. Create it first.")
    if path.is_dir():
        raise UsageError(f"-o {path}: this is a folder. Name a file.")


def _has_parquet() -> bool:
    return any(importlib.util.find_spec(name) is not None for name in ("pyarrow", "fastparquet"))


def write_predictions(predictions: Any, path: Path) -> None:
    """Writes predictions to a temporary name and renames it, so that the file is whole or not there.

    Args:
        predictions: a tensor, its first dimension the rows; or, for tables, a tuple or mapping of such; or a list with
            an entry for each sample.
        path: ends in .csv, .npy, .parquet or .jsonl. A table has one column for each number of a row; JSON lines have
            an object for each sample, nested as it is.

    Raises:
        UsageError: the predictions do not fit the kind of file.
        OSError: the file cannot be written.
    """
    with written_whole(path) as file:
        _write(predictions, path, file)


def _write(predictions: Any, path: Path, file: Any) -> None:
    if path.suffix == ".npy":
        import numpy as np

        if isinstance(predictions, list):
            raise UsageError(f"-o {path}: predict_step returns an entry per sample, not rows of numbers. Use .jsonl.")
        if isinstance(predictions, (tuple, Mapping)):
            raise UsageError(f"-o {path}: predict_step returns several tensors, but a .npy file holds one. Use .csv.")
        np.save(file, _array(predictions), allow_pickle=False)
    elif path.suffix == ".jsonl":
        for number in range(_count(predictions)):
            file.write(_json_line(predictions, number))
    elif path.suffix == ".csv":
        frame = table(predictions)
        if isinstance(predictions, list) and any(isinstance(cell, (list, dict)) for cell in frame.to_numpy().ravel()):
            raise UsageError(f"-o {path}: predict_step returns nested entries, for which CSV has no cells. Use .jsonl.")
        frame.to_csv(file, index=False, lineterminator="\n")
    else:
        table(predictions).to_parquet(file, index=False)


def table(predictions: Any) -> pd.DataFrame:
    """Returns predictions as a table: column `prediction`, or `prediction_0`, `prediction_1`, ..."""
    import pandas as pd

    if isinstance(predictions, list):
        rows = [_plain(one) for one in predictions]
        listed: pd.DataFrame = pd.DataFrame([one if isinstance(one, dict) else {"prediction": one} for one in rows])
        return listed
    frame: pd.DataFrame = pd.DataFrame(_columns(predictions, "prediction"))
    return frame


def _count(predictions: Any) -> int:
    """The number of samples."""
    if isinstance(predictions, Mapping):
        return _count(next(iter(predictions.values())))
    return _count(predictions[0]) if isinstance(predictions, tuple) else len(predictions)


def _json_line(predictions: Any, number: int) -> bytes:
    """One sample's predictions as a line; NaN and the infinities, which JSON has not, as text."""
    row = _row(predictions, number)
    return (json.dumps(row if isinstance(row, dict) else {"prediction": row}, allow_nan=False) + "\n").encode()


def _row(predictions: Any, number: int) -> Any:
    if isinstance(predictions, Mapping):
        return {str(key): _row(part, number) for key, part in predictions.items()}
    if isinstance(predictions, tuple):
        return [_row(part, number) for part in predictions]
    return _plain(predictions[number])


def _plain(value: Any) -> Any:
    """Nested values in the types that JSON has."""
    if _is_array(value):
        value = _array(value).tolist() if hasattr(value, "detach") else value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise UsageError(
        f"predict_step returned a {type(value).__name__} for a sample, which no file of predictions holds. Return "
        "numbers, texts, tensors, and lists and dicts of these."
    )


def _is_array(value: Any) -> bool:
    return hasattr(value, "tolist")


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
