"""The weights that a run begins with (`train.init_from`, `--from`): read once, and kept in the run's folder.

They are put into the net just after it is built, so that all that is made of it afterwards, by the recipe too, has
them; and a run that is resumed is built with the same ones again. So it needs their source no more, which may have
gone or changed by then.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.checkpoint.extra import extra_metadata, extra_of
from dtrain.checkpoint.fitted import Fit, Wanted, log_of, put_into
from dtrain.checkpoint.folder import Pieces, verify, write_checkpoint
from dtrain.checkpoint.outside import OutsideWeights, read_outside
from dtrain.checkpoint.tensors import pieces, read_file, read_tensors
from dtrain.checkpoint.weights import INITIAL_NAME, WEIGHTS
from dtrain.config import Settings
from dtrain.distributed.world import World
from dtrain.errors import CheckpointError, UsageError
from dtrain.layout import INITIAL
from dtrain.trainer.agreed import agree


@dataclass
class InitialWeights:
    """What a net begins with.

    Attributes:
        source: the values by the source's names.
        how: how they are put into the net.
        kept: where they come from the run's own folder, what was written down of them; None where not.
        fit: what was taken; once it was.
    """

    source: OutsideWeights
    how: Wanted
    kept: dict[str, Any] | None = None
    fit: Fit | None = None

    def __call__(self, module: nn.Module) -> None:
        """Puts them into a net that was just built.

        Raises:
            UsageError: they do not match; of a run's own, all that was taken must be taken again.
        """
        fit = put_into(module, self.source, self.how)
        if self.kept is not None and (len(fit.values) != len(self.source.values) or fit.total != self.kept["total"]):
            raise UsageError(
                f"{self.source.where}: the weights that the run began with do not match the model any longer: "
                f"{'; '.join(fit.left)}. Restore the recipe, or choose another run.name."
            )
        self.fit = fit

    def words(self) -> str:
        """Returns, in words, what was taken and what was not."""
        if self.kept is not None or self.fit is None:
            return f"weights from {self.source.where}"
        return log_of(self.fit, self.source.where)

    def keep(self, run: Path) -> None:
        """Keeps what was taken in a run's folder, which is owned; where it is there already, nothing is done.

        Raises:
            OSError: it could not be written.
        """
        if self.fit is None or (run / INITIAL / INITIAL_NAME).exists():
            return
        facts = self.kept or {"from": self.source.where, "not_taken": self.fit.left, "total": self.fit.total}
        facts = {name: facts[name] for name in ("from", "not_taken", "total")}
        write_checkpoint(run / INITIAL, INITIAL_NAME, {WEIGHTS: _file(self.fit.values)}, facts)


def initial_weights(settings: Settings) -> InitialWeights | None:
    """Reads what a config says that nets begin with; None where it says nothing.

    Raises:
        UsageError: it cannot be read.
    """
    train = settings.config.train
    if train.init_from is None:
        return None
    try:
        return InitialWeights(read_outside(Path(train.init_from).expanduser()), _wanted(settings))
    except UsageError as error:
        place = settings.place_of("train.init_from")
        raise UsageError(f"train.init_from = {train.init_from} ({place}): {error}") from None


def _wanted(settings: Settings) -> Wanted:
    train = settings.config.train
    return Wanted(train.init_partial, train.init_rename, "train.init_partial=true", "train.init_rename={OLD.: NEW.}")


def initial_of_run(settings: Settings, resume: str, world: World) -> InitialWeights | None:
    """Returns what a run begins with, on every rank: rank 0 reads it, from the run's folder where that has it.

    Args:
        settings: the run's.
        resume: as for `train_run`.
        world: the ranks.

    Raises:
        AgreedError: it cannot be read; every rank raises it.
    """
    if settings.config.train.init_from is None:
        return None
    found = agree(world, lambda: _kept(settings, resume) or initial_weights(settings) if world.is_main else None)
    if world.size == 1:
        return found
    packed = agree(world, lambda: b"" if found is None else _packed(found))
    tensors, metadata = read_tensors(world.share_bytes(packed))
    told = json.loads(metadata[_TOLD])
    how = _wanted(settings) if told["kept"] is None else _AS_KEPT
    return InitialWeights(OutsideWeights(told["where"], tensors | extra_of(metadata)), how, told["kept"])


_TOLD = "dtrain.initial"  # the metadata's key
_AS_KEPT = Wanted(partial=True)  # what was left out then is left out again


def _packed(found: InitialWeights) -> bytes:
    told = json.dumps({"where": found.source.where, "kept": found.kept})
    return b"".join(_file(found.source.values, {_TOLD: told}))


def _file(values: dict[str, Any], more: dict[str, str] | None = None) -> Pieces:
    """Returns a safetensors file of values, in pieces."""
    tensors = {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format).contiguous()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    return pieces(tensors, extra_metadata(values) | (more or {}))


def _kept(settings: Settings, resume: str) -> InitialWeights | None:
    """Returns what the run, or the one whose checkpoint a new one begins from, began with; None where it has nothing.

    Raises:
        UsageError: it is damaged.
    """
    run, named = settings.config.run, Path(resume).expanduser()
    folders = [named, named.parent.parent] if resume not in ("auto", "never") else []
    if resume == "auto" and run.name is not None:
        folders = [Path(run.dir).expanduser() / run.name]
    there = (one / INITIAL / INITIAL_NAME for one in folders)
    return next((_read_kept(path) for path in there if path.is_dir()), None)


def base_of_run(run: Path, settings: Settings) -> InitialWeights | None:
    """Returns what a run began with where its checkpoints lack a part of that; else None.

    Args:
        run: the run's folder.
        settings: its config.

    Raises:
        UsageError: it is damaged.
    """
    path, config = run / INITIAL / INITIAL_NAME, settings.config
    needed = config.train.init_from is not None and config.checkpoint.weights == "trained"
    return _read_kept(path) if needed and path.is_dir() else None


def _read_kept(path: Path) -> InitialWeights:
    try:
        facts = verify(path)
        tensors, metadata = read_file(path / WEIGHTS)
        return InitialWeights(OutsideWeights(str(path), tensors | extra_of(metadata)), _AS_KEPT, facts)
    except (OSError, CheckpointError) as error:
        raise UsageError(
            f"the weights that the run began with cannot be read: {error}. Choose another run.name."
        ) from None
