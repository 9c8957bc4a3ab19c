"""What a bench tries, from what it has found: each candidate is one change of the config or the recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dtrain.tools.bench.advice import MUCH

_WORKERS = (2, 4, 8)
BATCH_NOTE = "not the same training: half as many optimizer steps an epoch"
_BF16_NOTE = "not the same numbers: compare the losses"


@dataclass(frozen=True)
class Candidate:
    """One change.

    Attributes:
        name: in a word: "num_workers=0".
        change: what the user would write.
        train: keys of the config's section `train`.
        loader: arguments of the DataLoader: num_workers, pin_memory or batch_size.
        fused: whether the optimizer is made with fused=True.
        note: what it means for the results; empty where they are the same.
    """

    name: str
    change: str
    train: Mapping[str, Any] = field(default_factory=dict)
    loader: Mapping[str, Any] = field(default_factory=dict)
    fused: bool = False
    note: str = ""


@dataclass(frozen=True)
class Facts:
    """What decides on the candidates.

    Attributes:
        cuda: whether the device is a CUDA GPU.
        bf16: whether the device computes in bf16 by itself.
        data: the share of a step that is spent waiting for data.
        cores: that each rank has.
        train: the config's section.
        precision: in which the net computes.
        workers: of the loader; None where it cannot be made anew with another number.
        whole: whether whole batches can be fetched at once from the dataset.
        pinned: whether the loader pins its batches.
        batch: the loader's batch size; None where there cannot be one twice as large.
        on_device: whether the data are kept on the device.
        could_be: whether they could be.
        optimizer: the class of one that takes fused=True and is not; "" for none.
        images: whether batches have parts of four dimensions, and the net convolutions.
        keys: argument of the DataLoader or the optimizer -> the config's key that sets it.
        compile: whether torch.compile is to be tried.
    """

    cuda: bool = False
    bf16: bool = False
    data: float = 0.0
    cores: int = 1
    train: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    workers: int | None = None
    whole: bool = False
    pinned: bool = False
    batch: int | None = None
    on_device: bool = False
    could_be: bool = False
    optimizer: str = ""
    images: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    compile: bool = False


def candidates(facts: Facts) -> list[Candidate]:
    """Returns what applies, the most promising first; what takes long comes last."""
    return [*_of_workers(facts), *_of_device(facts), *_of_compute(facts), *_of_batch(facts), *_compiled(facts)]


def _of_workers(facts: Facts) -> Iterator[Candidate]:
    if facts.workers is None:
        return
    dominate = facts.data > MUCH
    counts = [0] if facts.workers and (dominate or facts.whole) else []
    if dominate and not (facts.whole and facts.workers == 0):
        most = max(facts.cores, 2)
        counts += [n for n in sorted({*_WORKERS, 2 * facts.workers}) if n <= most and n not in (0, facts.workers)]
    for number in counts:
        yield Candidate(f"num_workers={number}", _written(facts, "num_workers", number), loader={"num_workers": number})


def _of_device(facts: Facts) -> Iterator[Candidate]:
    if facts.whole and facts.train.get("fetch_batches") is False:
        yield _key("fetch_batches", True)
    if not facts.cuda:
        return
    yield _key("cuda_graph", True)
    if facts.could_be and not facts.on_device:
        yield _key("data_on_device", True)
    if facts.on_device:
        return  # there are no copies
    if facts.train.get("prefetch_to_device") is False:
        yield _key("prefetch_to_device", True)
    if facts.workers is not None and not facts.pinned:
        yield Candidate("pin_memory=True", _written(facts, "pin_memory", True), loader={"pin_memory": True})


def _of_compute(facts: Facts) -> Iterator[Candidate]:
    if facts.optimizer:
        written = f"{facts.optimizer}(..., fused=True)"
        if "fused" in facts.keys:
            written = f"{facts.keys['fused']}=true"
        yield Candidate("fused=True", written, fused=True)
    if facts.bf16 and facts.precision == "fp32":
        yield Candidate("precision=bf16", "train.precision=bf16", train={"precision": "bf16"}, note=_BF16_NOTE)
    if facts.images and not facts.train.get("channels_last"):
        yield _key("channels_last", True)


def _of_batch(facts: Facts) -> Iterator[Candidate]:
    if facts.batch is not None:
        size = 2 * facts.batch
        change = _written(facts, "batch_size", size)
        yield Candidate(f"batch_size={size}", change, loader={"batch_size": size}, note=BATCH_NOTE)


def _compiled(facts: Facts) -> Iterator[Candidate]:
    if facts.compile and not facts.train.get("compile"):
        yield _key("compile", True)


def _key(name: str, value: bool) -> Candidate:
    words = f"{name}={str(value).lower()}"
    return Candidate(words, f"train.{words}", train={name: value})


def _written(facts: Facts, argument: str, value: Any) -> str:
    if argument in facts.keys:
        return f"{facts.keys[argument]}={str(value).lower()}"
    return f"DataLoader(..., {argument}={value})"
