"""What the columns of a history are: which are metrics, which belong together, and which end of one is best."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from dtrain.errors import UsageError, nearest

Mode = Literal["min", "max"]

EPOCH, LR, SECONDS, RATE = "epoch", "lr", "seconds", "samples_per_second"
MEMORY = "gpu_memory_mib"  # at most, by torch's tensors; on a GPU
NO_METRICS = (EPOCH, LR, SECONDS, RATE, MEMORY)
OWN = "dtrain."  # begins the names of what dtrain notes in a tracker for itself
TIMES = (SECONDS, RATE, MEMORY)  # which may be another one each time
VALID = "val_"

# Words of a name that say that less is better; of any other metric, more is.
_LESS = {
    *("loss", "losses", "error", "err", "mse", "rmse", "mae", "mape", "nll", "ce", "bce", "kl", "perplexity", "ppl"),
    *("wer", "cer", "fid", "brier", "ece", "deviation", "distance", "divergence", "regret", "cost", "energy"),
}
# And words that say that more is.
_MORE = {
    *("accuracy", "acc", "auc", "auroc", "auprc", "ap", "map", "f1", "precision", "recall", "iou", "miou", "dice"),
    *(
        "bleu",
        "rouge",
        "meteor",
        "score",
        "psnr",
        "ssim",
        "kappa",
        "mcc",
        "r2",
        "ndcg",
        "mrr",
        "reward",
        "top1",
        "top5",
    ),
    *("sensitivity", "specificity", "jaccard", "likelihood", "correct", "hits", "hit", "success", "win", "elo"),
}


def metrics_of(names: Iterable[str]) -> list[str]:
    """Returns the columns that are metrics, as they come."""
    return [name for name in names if name not in NO_METRICS]


def validated(names: Iterable[str]) -> list[str]:
    """Returns the columns that are values of validation, as they come."""
    return [name for name in names if name.startswith(VALID)]


def base_of(name: str) -> str:
    """Returns what a column is called without its split: "loss" for both loss and val_loss."""
    return name.removeprefix(VALID)


def paired(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns the metrics' columns by what they are called without their split, training first."""
    found: dict[str, list[str]] = {}
    for name in metrics_of(names):
        found.setdefault(base_of(name), []).append(name)
    return {base: sorted(columns, key=lambda name: name != base) for base, columns in found.items()}


def watched(monitor: str | None) -> tuple[str, ...]:
    """Returns the columns of which the first that there is says what is best.

    Args:
        monitor: the one that somebody asked for; None for `val_loss`, else `loss`.
    """
    return (f"{VALID}loss", "loss") if monitor is None else (monitor,)


def monitored(names: Iterable[str]) -> str | None:
    """Returns the column that says which epoch is best, where nobody says otherwise; None without metrics."""
    metrics = metrics_of(names)
    usual = [name for name in watched(None) if name in metrics]
    return next(iter([*usual, *(name for name in metrics if name.startswith(VALID)), *metrics]), None)


def mode_of(name: str) -> Mode:
    """Returns which end of a metric is best, by the words of its name: of a loss or an error the lowest."""
    words = re.split(r"[^a-z]+", base_of(name).lower())
    return "min" if _LESS & set(words) else "max"


def sure_mode_of(name: str) -> Mode | None:
    """Returns the same where a word of the name says so; None where it is only taken for a metric of which more is."""
    words = set(re.split(r"[^a-z0-9]+", base_of(name).lower()))
    return mode_of(name) if words & (_LESS | _MORE) else None


def check_monitor(
    monitor: str | None, known: Iterable[str], key: str, place: str = "", *, may_lack: bool = False
) -> bool:
    """Compares the name of a column with those of the history.

    Args:
        monitor: the column; None for one that is there.
        known: the columns that there are.
        key: what the column is given as, "checkpoint.monitor", say.
        place: where it is given, in words; may be empty.
        may_lack: whether a hook may add it later, unless its name is much like one that is there.

    Returns:
        whether it is there.

    Raises:
        UsageError: no such column in the history.
    """
    columns = [name for name in known if name != EPOCH]
    if monitor is None or monitor in (EPOCH, *columns):
        return True
    meant = nearest(monitor, columns)
    if may_lack and not meant:
        return False
    later = " If after_epoch returns it later, return it in each epoch, as math.nan where there is none." * may_lack
    raise UsageError(
        f"{key} = {monitor!r}{place and f' ({place})'}: no such column in the history.{meant} It has "
        f"{', '.join(columns)}.{later}"
    )
