"""Records what a few train steps do on each rank, for a comparison with other ranks or another number of them."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dtrain.batches import first_rows, tensor_bytes
from dtrain.bounds import Limits
from dtrain.building import configured_engine, load_task
from dtrain.config import Settings
from dtrain.dealing import Share
from dtrain.engine import Engine
from dtrain.fsdp.tensors import whole_tensor
from dtrain.metrics import Mean, Observed, Value
from dtrain.run import agree
from dtrain.world import World


class Trace:
    """One rank's record.

    Args:
        folder: where it is written: `rank-R.json`, and on rank 0 the gradients and weights of each optimizer
            step as `step-S.safetensors`.
        world: the ranks.
        net: the net that is trained.
    """

    def __init__(self, folder: Path, world: World, net: nn.Module) -> None:
        self._folder = folder
        self._rank = world.rank
        self._net = net
        self._steps: list[dict[str, Any]] = []
        self._optimizer_steps = 0
        self._gradients: dict[str, Tensor] = {}
        self._initial = zlib.crc32(b"".join(tensor_bytes(p) for p in net.parameters()))
        self._batchnorm = any(
            isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
            for module in net.modules()
        )
        self._dropout = any(getattr(module, "p", 0) for module in net.modules() if "Dropout" in type(module).__name__)

    def watch(self, engine: Engine) -> Any:
        """Follows an engine's train steps; returns handles to remove at the end."""
        learn = engine.learner.learn
        self._batchnorm &= not engine.sync_batchnorm

        def followed(share: Share) -> dict[str, Value]:
            values = learn(share)
            self._note(share, values)
            return values

        engine.learner.learn = followed  # type: ignore[method-assign]
        return [
            register_optimizer_step_pre_hook(lambda *_: self._keep_gradients()),
            register_optimizer_step_post_hook(lambda *_: self._keep_weights()),
        ]

    def write(self, history: list[dict[str, Any]]) -> None:
        """Writes the record."""
        record = {
            "initial": self._initial,
            "steps": self._steps,
            "history": history,
            "batchnorm": self._batchnorm,
            "dropout": self._dropout,
        }
        (self._folder / f"rank-{self._rank}.json").write_text(json.dumps(record), encoding="utf-8")

    def _note(self, share: Share, values: dict[str, Value]) -> None:
        numbers = {}
        for name, value in values.items():
            if isinstance(value, Observed):
                continue  # compared as the epoch's value, in the history
            total, count = (value.total, value.count) if isinstance(value, Mean) else (value * share.count, share.count)
            numbers[name] = [_number(total), _number(count)] if share.count else [0.0, 0.0]
        rows = [zlib.crc32(tensor_bytes(row)) for row in first_rows(share.batch)] if share.count else []
        self._steps.append({"rows": rows, "values": numbers})

    def _keep_gradients(self) -> None:
        self._gradients = {
            f"gradient/{name}": whole_tensor(p.grad).cpu().clone()
            for name, p in self._net.named_parameters()
            if p.grad is not None
        }

    def _keep_weights(self) -> None:
        self._optimizer_steps += 1
        weights = {f"weight/{name}": whole_tensor(p).cpu().clone() for name, p in self._net.named_parameters()}
        if self._rank != 0:
            return
        from safetensors.torch import save_file

        save_file(self._gradients | weights, self._folder / f"step-{self._optimizer_steps}.safetensors")


def _number(value: float | Tensor) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def trace_run(settings: Settings, world: World, folder: Path, *, steps: int, merge: int) -> None:
    """Trains a recipe for a few steps and one validation, and records it.

    Args:
        settings: the recipe and its parameters.
        world: the ranks.
        folder: where the record goes.
        steps: optimizer steps.
        merge: how many of the loader's batches make one; the reference on one rank joins those that N ranks take.
    """
    task = agree(world, lambda: load_task(settings))
    train = settings.config.train
    share = world.size if train.batch == "per_rank" else 1
    batches = steps * train.accumulation * share * merge
    trace = Trace(folder, world, task.module)
    engine = configured_engine(
        task,
        world,
        settings,
        epochs=1,
        limits=Limits(train=batches, valid=batches, merge=merge),
    )
    handles = trace.watch(engine)
    try:
        history = engine.fit()
    finally:
        for handle in handles:
            handle.remove()
    trace.write(history.rows)
