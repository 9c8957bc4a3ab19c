"""What is monitored where a recipe has several validation loaders and the config names no column."""

from __future__ import annotations

from typing import Any

from dtrain.config import Settings
from dtrain.engine.valid_loaders import first_loss

PLACE = "default with several validation loaders: the first one's"


def name_monitors(settings: Settings, dl_valid: Any) -> None:
    """Has the config name the first loader's loss, since there is no `val_loss`; does nothing for a sole loader.

    So the run's config.yaml says what was monitored, to `dtrain evaluate`, the plots and a run that is resumed.

    Raises:
        UsageError: a name of several loaders makes no good column name.
    """
    column = first_loss(dl_valid)
    if column is None:
        return
    config, early = settings.config, settings.config.early_stopping
    if config.checkpoint.monitor is None:
        config = _with(settings, "checkpoint", column)
    if early.monitor is None and (early.patience is not None or early.target is not None):
        config = _with(settings, "early_stopping", column)
    settings.config = config


def _with(settings: Settings, section: str, column: str) -> Any:
    own = getattr(settings.config, section).model_copy(update={"monitor": column})
    settings.config = settings.config.model_copy(update={section: own})
    settings.places[f"{section}.monitor"] = PLACE
    return settings.config
