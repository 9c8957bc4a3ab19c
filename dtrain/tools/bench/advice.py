"""What was measured, and what follows from it. Knows nothing of torch, so that the supervisor starts at once."""

from __future__ import annotations

from dataclasses import dataclass

_MUCH = 0.15  # of a step


@dataclass(frozen=True)
class BenchResult:
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


def shares_of(measured: BenchResult) -> dict[str, float]:
    """Returns part of a step -> its share of the measured time."""
    total = sum(measured.parts.values())
    return {name: seconds / total if total else 0.0 for name, seconds in measured.parts.items()}


def advice(measured: BenchResult) -> list[str]:
    """Returns what would make this recipe's steps faster, the most promising first."""
    iter_batches = shares_of(measured)
    found = {
        iter_batches["data"]: _about_data(measured),
        iter_batches["metric function"]: _about_metric(measured),
        iter_batches["transfer"]: _about_transfer(),
    }
    told = [text for rank_batch, text in sorted(found.items(), reverse=True) if rank_batch > _MUCH]
    if measured.device != "cpu" and measured.asked >= 1:
        told.append(
            f"a step reads a tensor's value {measured.asked:.0f} times (.item(), float(), if tensor: ...) and waits "
            "for the GPU each time. Return the tensors; dtrain accumulates them on the device."
        )
    return told


def _about_data(measured: BenchResult) -> str:
    waiting = f"{100 * shares_of(measured)['data']:.0f} % of a step is spent waiting for data"
    if measured.workers is None:
        return f"{waiting}, in the main process: prepare batches in advance, or use a DataLoader with num_workers."
    if measured.by_batch:
        return f"{waiting}, although whole batches are fetched at once: the model is small. A larger batch_size helps."
    ways = "a dataset with __getitems__ (or a TensorDataset without a collate_fn) is read in whole batches"
    if measured.workers == 0:
        return f"{waiting}: use num_workers=2 or more in the DataLoader to load batches in parallel; or {ways}."
    return f"{waiting}, with num_workers={measured.workers}: use more workers, do less in __getitem__; or {ways}."


def _about_metric(measured: BenchResult) -> str:
    seconds = measured.parts["metric function"]
    return (
        f"model.metric_func takes {1e3 * seconds:.2f} ms a step, {100 * shares_of(measured)['metric function']:.0f} %: "
        "compute it with torch (scikit-learn's cost about a millisecond a call), or return what it needs to a "
        "torchmetrics object of build_metrics()."
    )


def _about_transfer() -> str:
    return "much of a step is the transfer to the device: pin_memory=True in the DataLoader overlaps it with the step."
