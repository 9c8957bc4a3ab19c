"""What is said of errors that a device makes hard to read: indices out of range, asserts on a GPU, memory that ran out.

An index that is out of range (a class label, a token) is told by torch without its value, and on a GPU not even at its
step: the kernel stops, and some later call finds that out. Here the value, what it should be, and the sample are looked
for: on the CPU in the call that failed; of a GPU, which answers nothing any more, in the samples of the last batches,
which are fetched again.
"""

from __future__ import annotations

import contextlib
import resource
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dtrain.data.loader_group import LoaderGroup, batch_size_of
from dtrain.data.partition import RankBatch
from dtrain.engine.callback import EngineCallback, Order
from dtrain.errors import StopRequested, add_remark, ran_out_of_memory, text_of
from dtrain.masking import hide

if TYPE_CHECKING:
    from dtrain.engine.loop import Engine

_GIB = 1 << 30
_SEARCH_SECONDS = 20.0  # after which no further batch is fetched again
_IGNORED = -100  # torch's ignore_index
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
_TORCHS = Path(nn.functional.__file__)
_ASSERT, _CUDA = "device-side assert", "CUDA error"


class Memory(NamedTuple):
    """Bytes of a GPU: at most in use by torch's tensors so far, and in all."""

    peak: int
    total: int


class ExplainErrors(EngineCallback):
    """Says more of such errors, in remarks below them.

    Args:
        engine: trains.
        memory: returns what is known of the GPU's; by default, of the rank's, None on the CPU.
    """

    order = Order.RECORDS

    def __init__(self, engine: Engine, memory: Callable[[], Memory | None] | None = None) -> None:
        self._engine = engine
        self._memory = memory or (lambda: _memory_of(engine.world.device))

    def on_exception(self, error: BaseException) -> None:
        """Something has ended training."""
        if isinstance(error, StopRequested):
            return
        for remark in self._remarks(error):
            add_remark(error, remark)

    def _remarks(self, error: BaseException) -> Iterator[str]:
        if ran_out_of_memory(error):
            yield from self._of_memory()
            return
        found = _in_call(error, self._engine.task.module)
        if found:
            yield found
        text = text_of(error) if isinstance(error, RuntimeError) else ""
        if _CUDA not in text:
            return
        place = self._engine.place
        yield (
            f"the GPU reports errors late: the cause is in {place.split} step {place.step} or one of the steps before "
            "it, and not always in the line that the traceback names"
        )
        if _ASSERT in text:
            yield "the assertion that failed is printed above (stderr), such as `index out of bounds`"
            likely = _likely(self._engine)
            if likely:
                yield likely
        yield f"run it again to see the line, slower: {_rerun()}"

    def _of_memory(self) -> Iterator[str]:
        engine, memory = self._engine, self._memory()
        if memory is not None:
            yield f"GPU memory: tensors took up to {memory.peak / _GIB:.2f} GiB of {memory.total / _GIB:.2f} GiB"
        elif engine.world.device.type == "cpu":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            yield f"memory: this rank took up to {peak / _GIB:.2f} GiB"
        kept = [loader.on_device for loader in _loaders(engine) if "(" in loader.on_device]
        if kept:
            yield f"the data of {' and '.join(kept)} are kept on the GPU: train.data_on_device=false frees that"
        yield _smaller(engine)


def explain_errors(engine: Engine) -> ExplainErrors:
    """Returns what explains an engine's errors."""
    return ExplainErrors(engine)


def _memory_of(device: torch.device) -> Memory | None:
    if device.type != "cuda":
        return None
    return Memory(torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory)


def _loaders(engine: Engine) -> list[Any]:
    return [engine.train_loader, *([] if engine.valid is None else [one.loader for one in engine.valid.parts])]


def _smaller(engine: Engine) -> str:
    """What takes less memory: the largest batch that may fit, and what keeps the global batch."""
    if engine.place.split == "valid":
        return "use a smaller batch_size in the validation loader: the results do not depend on it"
    batch, accumulation = _batch_size(engine.task.dl_train), engine.options.accumulation
    other = "train.precision=bf16, train.activation_checkpointing, or train.shard=fsdp on several GPUs take less memory"
    if batch is None:
        return f"use smaller batches, and train.accumulation to keep the global batch; {other}"
    if batch == 1:
        return f"a batch of 1 does not fit: {other}"
    size = next(size for size in range(batch // 2, 0, -1) if batch % size == 0)
    return (
        f"try batch_size={size} with train.accumulation={accumulation * batch // size}, which keeps the global batch "
        f"(now {batch} x {accumulation}); `dtrain find batch` finds the largest that fits, below {batch}; {other}"
    )


def _batch_size(loader: Any) -> int | None:
    return None if isinstance(loader, LoaderGroup) else batch_size_of(loader)


# --- indices out of range ---------------------------------------------------------------------------------------


def _in_call(error: BaseException, module: nn.Module) -> str:
    """Names the index that made one of torch's functions fail on the CPU; "" where it was none."""
    if not isinstance(error, (IndexError, RuntimeError)):
        return ""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    held = (value for frame in reversed(frames) for value in frame.f_locals.values())
    batch = next((value for value in held if isinstance(value, RankBatch)), None)  # that of the step that failed
    for frame in reversed(frames):
        if Path(frame.f_code.co_filename) == _TORCHS:
            with contextlib.suppress(Exception):  # what ended the run is told in any case
                found = _in_frame(frame, module, batch)
                if found:
                    return found
    return ""


def _in_frame(frame: FrameType, module: nn.Module, batch: RankBatch | None) -> str:
    name, known = frame.f_code.co_name, frame.f_locals
    if name in ("embedding", "embedding_bag"):
        indices, count = known["input"], known["weight"].shape[0]
        return _told("index", indices, (indices < 0) | (indices >= count), count, batch, _embedding(known, module))
    if name in ("cross_entropy", "nll_loss"):
        logits, labels, ignored = known["input"], known["target"], known["ignore_index"]
        if labels.is_floating_point():
            return ""
        count = logits.shape[1 if logits.ndim > 1 else 0]
        wrong = (labels != ignored) & ((labels < 0) | (labels >= count))
        return _told("label", labels, wrong, count, batch, f"{name} got scores of {count} classes")
    return ""


def _embedding(known: dict[str, Any], module: nn.Module) -> str:
    names = [name for name, weight in module.named_parameters() if weight is known["weight"]]
    return f"the embedding {names[0].removesuffix('.weight') if names else ''}".rstrip() + (
        f" has {known['weight'].shape[0]} rows"
    )


def _told(  # noqa: PLR0913, PLR0917 - called at few places with all of them
    what: str, values: Tensor, wrong: Tensor, count: int, batch: RankBatch | None, why: str
) -> str:
    if not values.is_cpu or not bool(wrong.any()):
        return ""
    place = int(wrong.reshape(-1).nonzero()[0])
    value = int(values.reshape(-1)[place])
    return f"the {what} {value}{_sample(values, place, batch)} is out of range: {why}, so it should be 0 to {count - 1}"


def _sample(values: Tensor, place: int, batch: RankBatch | None) -> str:
    """Names the sample of which a value is, where that is known."""
    if batch is None:
        return ""
    like = [part for part in _tensors(batch.batch) if part.shape[:1] == (batch.rows,) and _same(part, values)]
    shape = like[0].shape if like else values.shape
    if not shape or shape[0] != batch.rows:
        return ""
    row = place // max(1, shape[1:].numel())
    if batch.indices is None:
        return f" in row {row} of the batch"
    indices = batch.indices.tolist() if isinstance(batch.indices, Tensor) else list(batch.indices)
    return f" of the sample with index {indices[row]} in the dataset (row {row} of the batch)"


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same indices, in whatever shape."""
    return one.dtype in _WHOLE and one.numel() == other.numel() and torch.equal(one.reshape(-1), other.reshape(-1))


def _tensors(batch: Any) -> list[Tensor]:
    return [part for _, part in _named(batch, "batch")]


def _named(batch: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, dict):
        for key, part in batch.items():
            yield from _named(part, f"{name}[{key!r}]")
    elif isinstance(batch, (list, tuple)):
        for number, part in enumerate(batch):
            yield from _named(part, f"{name}[{number}]")


def _likely(engine: Engine) -> str:
    """Looks for an index that is out of range in the samples of the last batches, which are fetched again."""
    until = time.monotonic() + _SEARCH_SECONDS
    for split, step, loader, indices in reversed(engine.place.recent):
        if time.monotonic() > until:
            break
        with contextlib.suppress(Exception):  # the user's dataset, whose GPU is gone
            found = _in_samples(engine.task.module, loader, indices)
            if found:
                return f"likely cause, in {split} step {step}: {found}"
    return ""


def _in_samples(module: nn.Module, loader: Any, indices: Any) -> str:
    if indices is None or not isinstance(loader, DataLoader):
        return ""
    listed = indices.tolist() if isinstance(indices, Tensor) else list(indices)
    parts = list(_named(loader.collate_fn([loader.dataset[index] for index in listed]), "batch"))
    whole = [(name, part) for name, part in parts if part.dtype in _WHOLE and part.ndim > 0 and part.is_cpu]
    limits = list(_limits(module))
    for name, part in whole:
        last = len(parts) > 1 and name == parts[-1][0]
        kind = "label" if last or any(word in name.lower() for word in ("label", "target")) else "index"
        counts = [(count, words) for of, count, words in limits if of == kind]
        if not counts:
            continue
        count, words = max(counts)
        wrong = (part != _IGNORED) & ((part < 0) | (part >= count))
        rows = len(listed) if part.shape[0] == len(listed) else 0
        found = _told(kind, part, wrong, count, RankBatch(part, rows, rows, 1.0, indices=listed, rows=rows), words)
        if found:
            return f"{name}: {found}"
    return ""


def _limits(module: nn.Module) -> Iterator[tuple[str, int, str]]:
    """Yields how many indices the net's embeddings take, and how many classes its last layer seems to have."""
    last = None
    for name, part in module.named_modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
            yield "index", part.num_embeddings, f"the embedding {name} has {part.num_embeddings} rows"
        last = (name, part.out_features) if isinstance(part, nn.Linear) else last
    if last is not None and last[1] > 1:
        yield "label", last[1], f"the last layer, {last[0]}, has {last[1]} outputs"


def _rerun() -> str:
    """Returns the command that runs this process's again, each kernel on its own."""
    program = Path(sys.argv[0])
    if program.name.startswith(("ipykernel", "colab")):
        return 'os.environ["CUDA_LAUNCH_BLOCKING"] = "1" in the first cell of a restarted notebook'
    words = hide(sys.argv[1:])[0]
    begin = ["dtrain"] if program.stem == "dtrain" or program.parent.name == "dtrain" else ["python", str(program)]
    return f"CUDA_LAUNCH_BLOCKING=1 {shlex.join([*begin, *words])}"
