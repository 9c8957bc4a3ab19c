"""The weights of the best epoch: watched for, kept, restored; and an end to training that no longer helps."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dtrain.checkpoint.extra import extra_of, load_extra
from dtrain.checkpoint.tensors import read_file
from dtrain.checkpoint.weights import weights_file
from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.hooks import adds_columns
from dtrain.engine.loop import Engine
from dtrain.errors import UsageError
from dtrain.files import written_whole
from dtrain.rundir.columns import Mode, check_monitor, mode_of, watched
from dtrain.wording import number

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
        target: a value that is good enough, at which training ends; None for none.
        may_lack: whether the column need not be there in each epoch, since a hook adds it. An epoch without it counts
            as one without a new best, as one where it is NaN does: a resumed run cannot tell the two apart.
    """

    def __init__(  # noqa: PLR0913 - the section of the config
        self,
        monitor: str | None,
        mode: Mode | None,
        patience: int | None,
        section: str = "",
        place: str = "",
        *,
        target: float | None = None,
        may_lack: bool = False,
    ) -> None:
        self._may_lack = may_lack
        self._monitor = monitor
        self._mode = mode
        self._patience = patience
        self._target = target
        self._section, self._place = section, place
        self._lowest = float("inf")
        self._since = 0

    def improves(self, row: Mapping[str, Any]) -> bool:
        """Counts one more epoch; returns whether it is the best so far.

        Raises:
            UsageError: no such column in the history.
        """
        if self._monitor is None:
            self._monitor = next((name for name in watched(None) if name in row), "loss")
        if not check_monitor(self._monitor, row, f"{self._section}monitor", self._place, may_lack=self._may_lack):
            self._since += 1
            return False
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

    @property
    def _is_reached(self) -> bool:
        return self._target is not None and self._lowest <= (self._target if self._mode == "min" else -self._target)

    def ends(self, engine: Engine, epoch: int) -> None:
        """Ends an engine's training after an epoch where it no longer helps, and leaves word of why."""
        if self._is_reached:
            best = self._lowest if self._mode == "min" else -self._lowest
            engine.stop(
                f"stopped early after epoch {epoch} of {engine.epochs}: {self._monitor} = {number(best)} has reached "
                f"{self._section}target = {self._target}",
                f"{self._section}target",
            )
        if not self.over:
            return
        better = "lower" if self._mode == "min" else "higher"
        engine.stop(
            f"stopped early after epoch {epoch} of {engine.epochs}: no {better} {self._monitor} for "
            f"{self._since} epoch{'s' * (self._since != 1)} ({self._section}patience = {self._patience})",
            f"{self._section}patience",
        )


class StopEarly(EngineCallback):
    """Ends training when it no longer helps; what the engine's history holds already counts.

    Args:
        engine: it stands where training begins, or has ended.
        stopping: counts the epochs.

    Raises:
        UsageError: no such column in the history.
    """

    order = Order.EARLY_STOPPING

    def __init__(self, engine: Engine, stopping: EarlyStopping) -> None:
        self._engine, self._stopping = engine, stopping
        for row in engine.history.rows:
            self.on_epoch_end(row)

    def on_epoch_end(self, row: Mapping[str, Any]) -> None:
        """Counts one more epoch."""
        self._stopping.improves(row)
        self._stopping.ends(self._engine, row["epoch"])


class BestKeeper(EngineCallback):
    """Looks at each row of the history; all ranks decide alike, since their rows are equal.

    Args:
        engine: what trains.
        monitor: a column of the history.
        mode: whether its lowest or its highest value is best; None for what its name says.
        patience: epochs without a new best after which training ends; None never ends it.
        path: where rank 0 keeps the best weights, or None.
    """

    order = Order.EARLY_STOPPING

    def __init__(
        self, engine: Engine, monitor: str, mode: Mode | None, patience: int | None, path: Path | None
    ) -> None:
        self._engine = engine
        self._monitor = monitor
        self._stopping = EarlyStopping(monitor, mode, patience, may_lack=adds_columns(engine.task.hooks))
        self._path = path
        self._weights: dict[str, Any] | None = None

    def on_epoch_end(self, row: Mapping[str, Any]) -> None:
        """Keeps the weights after an epoch that is the best so far; ends training after too many that are not.

        Raises:
            UsageError: no such column in the history.
        """
        if self._stopping.improves(row):
            self._keep()
        self._stopping.ends(self._engine, row["epoch"])

    def _keep(self) -> None:
        module, world = self._engine.task.module, self._engine.world
        world.broadcast_(list(module.buffers()))  # without validation each rank has its own
        with self._engine.averaged():  # with which was validated
            self._weights = copy.deepcopy(module.state_dict())
            if self._path is not None and world.is_main:
                save_state(module, self._path)

    def take_up(self) -> None:
        """Counts the epochs of the engine's history, where a run is resumed; the weights come from its checkpoint."""
        for row in self._engine.history.rows:
            self._stopping.improves(row)
            self._stopping.ends(self._engine, row["epoch"])

    def state_dict(self) -> dict[str, Any]:
        """Returns the best epoch's weights, for a checkpoint."""
        return {"weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` returned."""
        self._weights = state["weights"]

    def restore(self) -> None:
        """Puts the best epoch's weights back into the net."""
        if self._weights is None:
            logger.warning("%s was not finite in any epoch; the weights are those of the last epoch", self._monitor)
            return
        self._engine.task.module.load_state_dict(self._weights)


def save_state(module: nn.Module, path: Path) -> None:
    """Saves a net's state: as safetensors where the path ends so, else as torch.save does; whole or not at all.

    Raises:
        UsageError, CheckpointError: the extra state of a module is of a kind that the file cannot hold; it is named.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        if path.suffix == ".safetensors":
            file.writelines(weights_file(module))
        else:
            torch.save(module.state_dict(), file)
            file.flush()
            _check_loadable(module, Path(file.name), path)


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
        raise UsageError(f"{path}: no such file of weights.")
    if path.suffix == ".safetensors":
        tensors, metadata = read_file(path)
        saved = tensors | extra_of(metadata)
    else:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(load_extra(module, saved))
