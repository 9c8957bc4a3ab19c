"""What was measured, and what follows from it. Knows nothing of torch, so that the supervisor starts at once."""

from __future__ import annotations

from dataclasses import dataclass

_MUCH = 0.15  # of a step


@dataclass(frozen=True)
class Measured:
    """What one rank measured.

    Attributes:
        step_seconds: of a step, as in training, without the stopwatch.
        samples_per_second: of all ranks.
        parts: part of a step -> seconds, with the stopwatch.
        asked: how often a step asks a tensor for its number.
        device: the kind of device.
        workers: of the training loader; None where it is no DataLoader.
        by_batch: whether whole batches are fetched at once.
        steps: steps that were measured.
    """

    step_seconds: float
    samples_per_second: float
    parts: dict[str, float]
    asked: float
    device: str
    workers: int | None
    by_batch: bool
    steps: int


def shares_of(measured: Measured) -> dict[str, float]:
    """Returns part of a step -> its share of the measured time."""
    total = sum(measured.parts.values())
    return {name: seconds / total if total else 0.0 for name, seconds in measured.parts.items()}


def advice(measured: Measured) -> list[str]:
    """Returns what would make this recipe's steps faster, the most promising first."""
    shares = shares_of(measured)
    found = {
        shares["data"]: _about_data(measured),
        shares["metric function"]: _about_metric(measured),
        shares["transfer"]: _about_transfer(),
    }
    told = [text for share, text in sorted(found.items(), reverse=True) if share > _MUCH]
    if measured.device != "cpu" and measured.asked >= 1:
        told.append(
            f"a step asks a tensor for its number {measured.asked:.0f} times (.item(), float(), if tensor: ...), and "
            "each time waits for the GPU. Return the tensors themselves; dtrain adds them up on the device."
        )
    return told


def _about_data(measured: Measured) -> str:
    share = f"{100 * shares_of(measured)['data']:.0f} % of a step is waiting for data"
    if measured.workers is None:
        return (
            f"{share}, which the loader makes itself: prepare the batches ahead, or use a DataLoader with num_workers."
        )
    if measured.by_batch:
        return f"{share}, although whole batches are fetched at once: the net is small. A larger batch_size helps."
    ways = "a dataset with __getitems__ (or a TensorDataset without a collate_fn) is asked for whole batches"
    if measured.workers == 0:
        return f"{share}: num_workers=2 or more in the DataLoader makes batches beside the training; or {ways}."
    return f"{share}, with num_workers={measured.workers}: give it more, do less in __getitem__; or {ways}."


def _about_metric(measured: Measured) -> str:
    seconds = measured.parts["metric function"]
    return (
        f"model.metric_func takes {1e3 * seconds:.2f} ms a step, {100 * shares_of(measured)['metric function']:.0f} %: "
        "compute it with torch (scikit-learn's cost about a millisecond a call), or return what it needs to a "
        "torchmetrics object of build_metrics()."
    )


def _about_transfer() -> str:
    return (
        "much of a step is the transfer to the device: pin_memory=True in the DataLoader lets it run beside the step."
    )
