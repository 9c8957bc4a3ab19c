"""Records what a few train steps do on each rank, for a comparison with other ranks or another number of them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from dtrain.config import Settings
from dtrain.data.fingerprints import row_shapes, tensor_bytes
from dtrain.data.loader import ShardedLoader
from dtrain.data.loader_group import mixes
from dtrain.data.partition import RankBatch
from dtrain.distributed.consistency import weights_checksum
from dtrain.distributed.dtensor import cut_like, whole_tensor
from dtrain.distributed.world import World
from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.loop import Engine
from dtrain.engine.metrics import Mean, Observed, Value
from dtrain.engine.options import RunOptions
from dtrain.engine.position import Limits
from dtrain.model.compile import wanted
from dtrain.trainer.agreed import agree
from dtrain.trainer.setup import configured_engine, load_task


class Trace(EngineCallback):
    """One rank's record.

    Args:
        folder: where it is written: `rank-R.json`, and on rank 0 the gradients and weights of each optimizer
            step as `step-S.safetensors`.
        world: the ranks.
        net: the net that is trained.
        like: the folder of a record whose weights the net gets after each optimizer step, so that each is compared by
            itself: what rounding makes of one, an optimizer such as Adam makes much more of in a few.
    """

    order = Order.RECORDS

    def __init__(self, folder: Path, world: World, net: nn.Module, like: Path | None = None) -> None:
        self._folder = folder
        self._rank = world.rank
        self._dtype = world.sum_dtype
        self._net = net
        self._like = like
        self._checksums: list[float] = []
        self._steps: list[dict[str, Any]] = []
        self._optimizer_steps = 0
        self._gradients: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._loader: ShardedLoader | None = None
        self._read: dict[str, Any] = {}
        self._initial = zlib.crc32(b"".join(tensor_bytes(p) for p in net.parameters()))
        self._batchnorm = any(
            isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
            for module in net.modules()
        )
        self._dropout = any(getattr(module, "p", 0) for module in net.modules() if "Dropout" in type(module).__name__)

    def on_train_start(self, engine: Engine) -> None:
        """From here on the optimizers' steps are followed."""
        self._loader = engine.train_loader
        self._batchnorm &= not engine.options.sync_batchnorm
        self._dropout &= engine.draws is None
        self._handles = [
            register_optimizer_step_pre_hook(lambda optimizer, *_: self._keep_gradients(optimizer)),
            register_optimizer_step_post_hook(lambda optimizer, *_: self._keep_weights(optimizer)),
        ]

    def close(self) -> None:
        """The optimizers are let go."""
        for handle in self._handles:
            handle.remove()

    def write(self, history: list[dict[str, Any]]) -> None:
        """Writes the record."""
        record = {
            "initial": self._initial,
            "steps": self._steps,
            "checksums": self._checksums,
            "history": history,
            "batchnorm": self._batchnorm,
            "dropout": self._dropout,
        }
        (self._folder / f"rank-{self._rank}.json").write_text(json.dumps(record), encoding="utf-8")

    def on_batch_start(self, batch: RankBatch) -> None:
        """Records a train step's rows, as they are before the step, which may change them."""
        if self._loader is not None:
            self._read = {
                "rows": self._loader.rows(batch),
                "indices": self._loader.index_rows(batch),
                "shapes": row_shapes(batch.batch) if batch.count else None,
            }

    def on_batch_end(self, batch: RankBatch, values: Mapping[str, Value]) -> None:
        """Records a train step's values, and how many optimizer steps were taken by its end."""
        numbers = {}
        for name, value in values.items():
            if isinstance(value, Observed):
                continue  # compared as the epoch's value, in the history
            total, count = (value.total, value.count) if isinstance(value, Mean) else (value * batch.count, batch.count)
            numbers[name] = [_number(total), _number(count)] if batch.count else [0.0, 0.0]
        self._steps.append({**self._read, "values": numbers, "taken": self._optimizer_steps})

    def _stepped(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        """The parameters that an optimizer steps; others may be in a graph whose backward pass is still to come."""
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return {name: parameter for name, parameter in self._net.named_parameters() if id(parameter) in own}

    def _keep_gradients(self, optimizer: Optimizer) -> None:
        self._gradients = {
            f"gradient/{name}": _packed(p.grad) for name, p in self._stepped(optimizer).items() if p.grad is not None
        }

    def _keep_weights(self, optimizer: Optimizer) -> None:
        from safetensors.torch import load_file, save_file

        self._optimizer_steps += 1
        file = f"step-{self._optimizer_steps}.safetensors"
        self._checksums.append(weights_checksum(self._net, self._dtype))
        own = self._stepped(optimizer)
        weights = {f"weight/{name}": _packed(p) for name, p in own.items()}
        if self._rank == 0:
            save_file(self._gradients | weights, self._folder / file)
        if self._like is not None and (self._like / file).exists():
            self._take(load_file(self._like / file), own)

    @torch.no_grad()
    def _take(self, tensors: dict[str, Tensor], own: dict[str, nn.Parameter]) -> None:
        for name, parameter in own.items():
            known = tensors.get(f"weight/{name}")
            if known is not None and parameter.dtype is torch.complex128:
                known = torch.view_as_complex(known)
            if known is not None and known.shape == parameter.shape:
                parameter.copy_(cut_like(known, parameter))


def _packed(tensor: Tensor) -> Tensor:
    """Returns a copy on the CPU whose numbers lie in the order of its dimensions, as safetensors wants them."""
    return _real(whole_tensor(tensor)).cpu().clone(memory_format=torch.contiguous_format)


def _real(tensor: Tensor) -> Tensor:
    """A complex128 tensor, which safetensors lacks, as its real view."""
    return torch.view_as_real(tensor.detach().resolve_conj()) if tensor.dtype is torch.complex128 else tensor


def _number(value: float | Tensor) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def trace_run(  # noqa: PLR0913 - what `check trace` is given
    settings: Settings, world: World, folder: Path, *, steps: int, merge: int, like: Path | None = None
) -> None:
    """Trains a recipe for a few steps and one validation, and records it.

    Args:
        settings: the recipe and its parameters.
        world: the ranks.
        folder: where the record goes.
        steps: optimizer steps.
        merge: how many of the loader's batches make one; the reference on one rank joins those that N ranks take.
        like: the folder of the record whose weights each optimizer step begins with.
    """
    task = agree(world, lambda: load_task(settings))
    train = settings.config.train
    rank_batch = world.size if train.batch == "per_rank" else 1
    batches = steps * train.accumulation * rank_batch * merge
    # What is compared are the same global batches, whatever their numbers of ranks draw in a run.
    always = train.same_draws is None and not wanted(train.compile, world) and not mixes(task.dl_train)
    options = replace(
        RunOptions.of(dict(train)), cuda_graph=False
    )  # which is for one rank, and hides the steps' values
    trace = Trace(folder, world, task.module, like)
    engine = configured_engine(
        task,
        world,
        settings,
        epochs=1,
        epoch_steps=None,
        options=replace(options, same_draws=True) if always else options,
        limits=Limits(train=batches, valid=batches, merge=merge),
    )
    engine.callbacks.add(trace)
    trace.write(engine.fit().rows)
