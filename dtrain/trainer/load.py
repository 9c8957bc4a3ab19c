"""`dtrain.load`: a run's net with its saved weights, in one call."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from dtrain.checkpoint.chosen import checkpoints_of, choose_checkpoint
from dtrain.checkpoint.fitted import Wanted, log_of, put_into
from dtrain.checkpoint.folder import MANIFEST
from dtrain.checkpoint.outside import read_outside
from dtrain.checkpoint.restored import restore_net
from dtrain.config.calls import is_call
from dtrain.config.saved import load_run_settings
from dtrain.config.settings import Settings
from dtrain.distributed.seeding import load_random_state, random_state, seed_everything
from dtrain.errors import RecipeError, UsageError
from dtrain.layout import CHECKPOINTS, CONFIG, checkpoint_place, checkpoints_in
from dtrain.recipe.loader import build_net, load_recipe
from dtrain.trainer.initial import base_of_run

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")


def load(
    run: str | Path,
    weights: str = "best",
    *,
    model: nn.Module | None = None,
    recipe: str | Path | None = None,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Returns a run's net with its saved weights, in eval mode: `net = dtrain.load("runs/first")`.

    The weights are those that validation had, so averaged ones where the run has `train.ema_decay`. The net is built
    by the run's recipe with the run's config, and nothing else of the recipe is: neither data nor optimizer. Random
    streams are left as they are. Every call returns a net of its own.

    Args:
        run: a run's folder, one of its checkpoints (`runs/first/checkpoints/epoch-3`, which stands for its name), or
            a folder that `save_weights` has filled.
        weights: "best", by the run's `checkpoint.monitor` and `checkpoint.mode`; "last"; or a checkpoint's name, such
            as "epoch-3".
        model: a net to load into, where the recipe is not to build one; it is changed in place and returned.
        recipe: where the recipe is now, if it was moved since.
        device: where the net is put; by default a built net stays on the CPU, and a given one where it is.

    Raises:
        UsageError: there is no such run, checkpoint or device; the weights are damaged, or do not match the net: the
            first parameter that differs is named.
        RecipeError: the recipe is gone, or cannot be built.
    """
    folder, which = _meant(Path(run).expanduser(), weights)
    target = None if device is None else _device(device)
    if model is not None and not isinstance(model, nn.Module):
        raise UsageError(f"model = {model!r}: should be a torch.nn.Module, to load the weights into.")
    settings = _settings(folder, recipe, needed=model is None)
    saved = choose_checkpoint(folder, which, None if settings is None else settings.config.checkpoint)
    net = model
    if net is None:
        assert settings is not None  # noqa: S101 - for the type checker
        net = built_net(settings, folder)
    restore_net(net, saved.path)
    return net.eval() if target is None else net.to(target).eval()


def load_weights(
    model: nn.Module, source: str | Path, *, partial: bool = False, rename: Mapping[str, str] | None = None
) -> list[str]:
    """Begins with the weights of another run or of a file: puts them into a net, before it is trained.

    As `dtrain train --from RUN` does; in a script, or before `train_model` and `KerasModel.fit`.

    Args:
        model: the net itself, before `prepare`; it is changed in place, or left as it is where they do not match.
        source: a run's folder (its best epoch), a checkpoint's, or a file: .safetensors, or .pt, .pth, .bin or .ckpt
            with a state dict. Nothing in it can run code.
        partial: whether weights that do not match, by name and shape, are left out; a warning names them.
        rename: prefix of the source's names -> what stands in its place in the net's. The prefixes of
            DistributedDataParallel and torch.compile (`module.`, `_orig_mod.`) are taken off by themselves.

    Returns:
        in words, what was left out: nothing, without `partial`.

    Raises:
        UsageError: the source cannot be read; something does not match, and `partial` is not set; or nothing does.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model = {model!r}: should be a torch.nn.Module, to load the weights into.")
    found = read_outside(Path(source).expanduser())
    fit = put_into(model, found, Wanted(partial, dict(rename or {})))
    if fit.left:
        logger.warning("%s", log_of(fit, found.where))
    return fit.left


def _meant(path: Path, weights: str) -> tuple[Path, str]:
    """Returns the run and the checkpoint that a path and a word stand for."""
    if not path.is_dir():
        there = sorted(one.parent.name for one in path.parent.glob(f"*/{CONFIG}"))
        known = f" Runs in {path.parent}: {', '.join(there[-5:])}." if there else ""
        raise UsageError(f"{path}: no such run.{known or ' Use the folder that `dtrain train` printed as `run:`.'}")
    if checkpoint_place(path.name) is None or not (path / MANIFEST).exists():
        return path, weights
    if weights not in ("best", path.name):
        raise UsageError(f"{path} is one checkpoint, and weights = {weights!r} another. Name the run's folder instead.")
    above = path.absolute().parent
    return above.parent if above.name == CHECKPOINTS else above, path.name


def _settings(folder: Path, recipe: str | Path | None, *, needed: bool) -> Settings | None:
    """Returns the run's config; None where there is none, and none is needed."""
    if not (folder / CONFIG).exists() and checkpoints_in(checkpoints_of(folder)):
        if not needed:
            return None
        raise UsageError(
            f"{folder} has checkpoints but no {CONFIG} that says how the model is built. Pass it: "
            f"dtrain.load({str(folder)!r}, model=net)."
        )
    return load_run_settings(folder, [] if recipe is None else [f"recipe={recipe}"])


def built_net(settings: Settings, folder: Path) -> nn.Module:
    """Builds the net as a run does, seeded, and leaves the process's random streams as they are."""
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    device = torch.device("cuda") if cuda else _CPU
    before = random_state(device)
    try:
        seed_everything(settings.config.train.seed)
        recipe = load_recipe(settings.config.recipe, settings.base)
        return build_net(recipe, settings, base_of_run(folder, settings))
    except RecipeError as error:
        if is_call(settings.config.recipe):
            raise RecipeError(
                f"{folder / CONFIG}: a run of {settings.config.recipe} has no build_model. Pass the model: "
                f"dtrain.load({str(folder)!r}, model=net)."
            ) from None
        raise RecipeError(
            f"{folder / CONFIG}: {error} If the recipe was moved, say where it is now: dtrain.load({str(folder)!r}, "
            "recipe=PATH); or pass a model: model=net."
        ) from None
    finally:
        load_random_state(before, device)


def _device(device: str | torch.device) -> torch.device:
    """Looks whether a device is there.

    Raises:
        UsageError: it is not.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device = {str(device)!r}: {str(error).splitlines()[0]} Use device='cpu', say.") from None
    return found
