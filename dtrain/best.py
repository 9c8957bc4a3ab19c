"""The weights of the best epoch: watched for, kept, restored; and an end to training that no longer helps."""

from __future__ import annotations

import copy
import logging
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dtrain.checkpoint.extra import extra_of, load_extra
from dtrain.checkpoint.keeping import check_monitor
from dtrain.checkpoint.tensors import read_file
from dtrain.checkpoint.weights import weights_file
from dtrain.columns import NO_METRICS, VALID, Mode, mode_of
from dtrain.engine import Engine, Row
from dtrain.errors import UsageError
from dtrain.passes import Place

logger = logging.getLogger(__name__)


class EarlyStopping:
    """Counts the epochs without a new best; all ranks count alike, since their rows are equal.

    What it knows follows from the rows of the history, so that a resumed run looks at those again.

    Args:
        monitor: a column of the history; None for `val_loss`, else `loss`.
        mode: whether its lowest or its highest value is best; None for what its name says.
        patience: epochs without a new best after which training ends; None never ends it.
        section: of the config, "early_stopping.", for messages; empty for a call's arguments.
        place: where the column is named, in words, for messages; may be empty.
    """

    def __init__(
        self, monitor: str | None, mode: Mode | None, patience: int | None, section: str = "", place: str = ""
    ) -> None:
        self._monitor = monitor
        self._mode = mode
        self._patience = patience
        self._section, self._place = section, place
        self._lowest = float("inf")
        self._since = 0

    def improves(self, row: Row) -> bool:
        """Counts one more epoch; returns whether it is the best so far.

        Raises:
            UsageError: the history has no such column.
        """
        if self._monitor is None:
            self._monitor = next((name for name in ("val_loss", "loss") if name in row), "loss")
        check_monitor(self._monitor, row, f"{self._section}monitor", self._place)
        if self._mode is None:
            self._mode = mode_of(self._monitor)
        value = row[self._monitor] if self._mode == "min" else -row[self._monitor]
        if value < self._lowest:  # never true of NaN
            self._lowest, self._since = value, 0
            return True
        self._since += 1
        return False

    @property
    def over(self) -> bool:
        """Whether training no longer helps."""
        return self._patience is not None and self._since >= self._patience

    def ends(self, engine: Engine, epoch: int) -> None:
        """Ends an engine's training after an epoch where it no longer helps, and leaves word of why."""
        if not self.over:
            return
        engine.stopping = True
        better = "lower" if self._mode == "min" else "higher"
        engine.ended = (
            f"ended after epoch {epoch} of {engine.epochs}: no {better} {self._monitor} for {self._since} "
            f"epoch{'s' * (self._since != 1)} ({self._section}patience = {self._patience})"
        )


def stop_early(engine: Engine, stopping: EarlyStopping) -> None:
    """Lets an engine end when training no longer helps; what its history holds already counts."""

    def look(row: Row) -> None:
        stopping.improves(row)
        stopping.ends(engine, row["epoch"])

    for row in engine.history.rows:
        look(row)
    engine.after_epoch.append(look)


def check_early(engine: Engine, monitor: str | None, key: str, place: str = "") -> None:
    """Has the name of a watched column compared as soon as the columns are known, not first at an epoch's end.

    Those of training are known after the first optimizer step, those of validation after its first batch.

    Args:
        engine: it has not trained yet.
        monitor: the column; None for one that is there.
        key: what the column is given as.
        place: where it is given, in words; may be empty.

    Raises:
        UsageError: it is a value of validation, and there is no validation. The engine raises it of a column that
            there is not.
    """
    if monitor is None or monitor in NO_METRICS:
        return
    if engine.valid is None and monitor.startswith(VALID):
        raise _agreed(UsageError(f"{key} = {monitor!r} ({place}): there is no validation, and so no such column."))
    train: tuple[str, ...] = ()

    def compare(known: Iterable[str]) -> None:
        try:
            check_monitor(monitor, (*known, *NO_METRICS), key, place)
        except UsageError as error:
            raise _agreed(error) from None

    def look_at_step(_: Place) -> None:
        nonlocal train
        if train or engine.table is None:
            return
        train = tuple(engine.table.names or ())
        if not monitor.startswith(VALID):
            compare((*train, *(f"{VALID}{name}" for name in train if engine.valid is not None)))

    def look_at_validation(names: tuple[str, ...]) -> None:
        compare((*train, *(f"{VALID}{name}" for name in names)))

    engine.after_update.append(look_at_step)
    if monitor.startswith(VALID):
        engine.look_at_validation(look_at_validation)


def _agreed(error: UsageError) -> UsageError:
    error.agreed = True  # the columns are the same on every rank
    return error


class BestKeeper:
    """Looks at each row of the history; all ranks decide alike, since their rows are equal.

    Args:
        engine: what trains.
        monitor: a column of the history.
        mode: whether its lowest or its highest value is best; None for what its name says.
        patience: epochs without a new best after which training ends; None never ends it.
        path: where rank 0 keeps the best weights, or None.
    """

    def __init__(
        self, engine: Engine, monitor: str, mode: Mode | None, patience: int | None, path: Path | None
    ) -> None:
        self._engine = engine
        self._monitor = monitor
        self._stopping = EarlyStopping(monitor, mode, patience)
        self._path = path
        self._weights: dict[str, Any] | None = None

    def look(self, row: Row) -> None:
        """Keeps the weights after an epoch that is the best so far; ends training after too many that are not.

        Raises:
            UsageError: the history has no such column.
        """
        if self._stopping.improves(row):
            self._keep()
        self._stopping.ends(self._engine, row["epoch"])

    def _keep(self) -> None:
        module, world = self._engine.task.module, self._engine.world
        world.broadcast_(list(module.buffers()))  # without validation each rank has its own
        self._weights = copy.deepcopy(module.state_dict())
        if self._path is not None and world.is_main:
            save_state(module, self._path)

    def restore(self) -> None:
        """Puts the best epoch's weights back into the net."""
        if self._weights is None:
            logger.warning("no epoch had a %s that is a number; the weights are the last epoch's", self._monitor)
            return
        self._engine.task.module.load_state_dict(self._weights)


def save_state(module: nn.Module, path: Path) -> None:
    """Saves a net's state: as safetensors where the path ends so, else as torch.save does; whole or not at all.

    Raises:
        UsageError, CheckpointError: the extra state of a module is of a kind that the file cannot hold; it is named.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        if path.suffix == ".safetensors":
            with part.open("wb") as file:
                file.writelines(weights_file(module))
        else:
            torch.save(module.state_dict(), part)
            _check_loadable(module, part, path)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _check_loadable(module: nn.Module, part: Path, path: Path) -> None:
    """Looks whether what torch.save wrote is read without running code of it, as `load_state` reads it."""
    extra = [name for name, value in module.state_dict().items() if not isinstance(value, torch.Tensor)]
    if not extra:
        return
    try:
        torch.load(part, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise UsageError(
            f"{path}: the extra state of a module, {', '.join(extra[:3])}, can only be read by unpickling, which is "
            f"unsafe. Let ckpt_path end in .safetensors, which keeps it as JSON and tensors. torch says: "
            f"{str(error).splitlines()[0]}"
        ) from None


def load_state(module: nn.Module, path: Path) -> None:
    """Loads what `save_state` saved; no code in the file is run.

    Raises:
        UsageError: there is no such file.
        RuntimeError: the weights are another net's.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there are no weights of this name.")
    if path.suffix == ".safetensors":
        tensors, metadata = read_file(path)
        saved = tensors | extra_of(metadata)
    else:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(load_extra(module, saved))
