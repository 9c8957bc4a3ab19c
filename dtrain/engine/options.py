"""How a run computes: the options that a config, `train_model` and `KerasModel.fit` have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from dtrain.data.device_data import DataOnDevice, check_data_on_device
from dtrain.data.loader_group import Combine, check_combine
from dtrain.data.partition import BatchMode
from dtrain.data.rank_shards import DataSharding, check_data_sharding
from dtrain.engine.arguments import check_positive, check_share, check_switch, check_whole
from dtrain.errors import UsageError
from dtrain.model.clip import Limit
from dtrain.model.compile import Compile, check_compile
from dtrain.model.gradients.averaging import Way, check_way
from dtrain.model.precision import Precision, check_precision


@dataclass(frozen=True)
class RunOptions:
    """How a run computes. The names are those of a config's section `train`.

    Attributes:
        seed: the order of samples, and each rank's random stream, are derived from it.
        batch: whose batch size the loaders' is: "per_rank", or "global", the whole world's.
        combine: how the batches of several training loaders make steps; see `dtrain.data.loader_group`.
        data_sharding: who shards loaders without indices over the ranks: "loader", "dtrain", or "auto", as they say.
        same_draws: whether random numbers within steps are one process's; None: with batch "global".
        accumulation: micro-batches that make one optimizer step.
        average: how gradients are averaged over several ranks; see `dtrain.model.gradients.averaging`.
        sync_batchnorm: whether BatchNorm takes its statistics over all ranks while it trains.
        fetch_batches: whether whole batches are fetched at once where that gives the same; see `dtrain.data.fetch`.
        data_on_device: whether the data of a TensorDataset are kept on the GPU, where batches are taken by index; see
            `dtrain.data.device_data`.
        prefetch_to_device: whether batches are copied to a GPU beside the steps; see `dtrain.engine.device_copy`.
        precision: in which the net's forward computes; None for that of Accelerate's settings.
        cuda_graph: whether train steps are captured in CUDA graphs; see `dtrain.engine.captured_step`.
        compile: whether, or in which mode of torch.compile, the net is compiled; None for what Accelerate's say.
        clip_norm: the largest 2-norm of all gradients of an optimizer together; None for any.
        clip_value: the largest magnitude of each number of a gradient; None for any.
        ema_decay: of an average of the weights, with which is validated; None for no average.
        swa_from: the share of the run's optimizer steps after which the weights of all steps are averaged equally; None
            for no average.

    Raises:
        UsageError: a value is wrong; its name is that of the argument.
    """

    seed: int = 42
    batch: BatchMode = "per_rank"
    combine: Combine | None = None
    data_sharding: DataSharding = "auto"
    same_draws: bool | None = None
    accumulation: int = 1
    average: Way = "auto"
    sync_batchnorm: bool = False
    fetch_batches: bool = True
    data_on_device: DataOnDevice = "auto"
    prefetch_to_device: bool = True
    precision: Precision | None = None
    compile: Compile | None = None
    cuda_graph: bool = False
    clip_norm: float | None = None
    clip_value: float | None = None
    ema_decay: float | None = None
    swa_from: float | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise UsageError(f"seed = {self.seed!r}: should be a whole number of at least 0.")
        if self.batch not in get_args(BatchMode):
            raise UsageError(f"batch = {self.batch!r}: should be 'per_rank' or 'global'.")
        check_combine(self.combine)
        check_data_sharding(self.data_sharding)
        if self.same_draws not in (True, False, None):
            raise UsageError(f"same_draws = {self.same_draws!r}: should be True, False or None.")
        check_switch(sync_batchnorm=self.sync_batchnorm, fetch_batches=self.fetch_batches)
        check_switch(prefetch_to_device=self.prefetch_to_device, cuda_graph=self.cuda_graph)
        check_data_on_device(self.data_on_device)
        check_whole(accumulation=self.accumulation)
        check_way(self.average)
        check_precision(self.precision)
        check_compile(self.compile)
        check_positive(clip_norm=self.clip_norm, clip_value=self.clip_value)
        check_share(ema_decay=self.ema_decay, swa_from=self.swa_from)
        if self.ema_decay is not None and self.swa_from is not None:
            raise UsageError("ema_decay and swa_from both average the weights: set only one of them.")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> RunOptions:
        """Returns the options among a call's arguments, or the keys of a config's section; all of them are there."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    @property
    def clip(self) -> Limit:
        """How long a gradient may be."""
        return Limit(self.clip_norm, self.clip_value)
