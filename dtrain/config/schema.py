"""The schema of a run's config. One place for every key, its type, its bounds and its default."""

from __future__ import annotations

import functools
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# The sections whose keys are the parameters of the recipe's own functions.
BUILDER_SECTIONS = {
    "model": "build_model",
    "data": "build_dataloaders",
    "optimizer": "build_optimizer",
    "scheduler": "build_scheduler",
    "step": "train_step",  # and valid_step: those with a default
}


_LONGEST_NAME = 255  # bytes; of most file systems


def _run_name(name: str) -> str:
    """A run's name is one folder's name: no separators, no control characters."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise ValueError("should be a plain folder name, without '/', '\\' or control characters")
    if len(name.encode(errors="surrogateescape")) > _LONGEST_NAME:
        raise ValueError(f"should be a folder name of at most {_LONGEST_NAME} bytes")
    return name


def _as_list(value: Any) -> Any:
    """A single word stands for a list of it."""
    return [value] if isinstance(value, str) else value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TrainConfig(_Section):
    """Length of training, batches, precision, optimization and checks."""

    epochs: int = Field(3, ge=1, description="number of epochs")
    max_steps: int | None = Field(
        None, ge=1, description="stop after this many optimizer steps; train.epochs then defaults to what that takes"
    )
    epoch_steps: int | None = Field(
        None,
        ge=1,
        description="make an epoch of this many optimizer steps, which continues in the training data where the "
        "last one ended; default: an epoch is a pass over the data",
    )
    limit_batches: int | None = Field(None, ge=1, description="use only this many batches of each loader per epoch")
    overfit_batches: int | None = Field(
        None,
        ge=1,
        description="train on the same first N batches in every epoch, to see whether the model can learn them",
    )
    deterministic: bool = Field(False, description="use deterministic algorithms, or raise an error; slower")
    channels_last: bool = Field(False, description="use the channels_last memory format")
    log_step_freq: int = Field(10, ge=1, description="steps between lines of plain output")
    seed: int = Field(42, ge=0, lt=2**32, description="random seed of weights, sample order and dropout")
    init_from: str | None = Field(
        None,
        min_length=1,
        description="start with the weights of another run (its best), a checkpoint, or a .safetensors or .pt file; "
        "as --from",
    )
    init_partial: bool = Field(
        False, description="with init_from: leave out what does not match by name and shape, with a warning"
    )
    init_rename: dict[str, str] = Field(
        {},
        description="with init_from: prefixes of the source's names and what replaces them, such as {encoder.: body.}",
    )
    batch: Literal["per_rank", "global"] = Field(
        "per_rank", description="whether the loader's batch size is per rank or global"
    )
    combine: Literal["min", "max_cycle", "alternate"] | None = Field(
        None,
        description="how several training loaders make steps: a batch of each until the shortest ends (min) or the "
        "longest, others beginning anew (max_cycle), or one loader's batch in turn (alternate)",
    )
    data_sharding: Literal["auto", "loader", "dtrain"] = Field(
        "auto",
        description="who shards a loader without indices (a stream) over the ranks: the loader itself, dtrain, which "
        "has every rank read all of it, or as the loader says (auto; docs/recipes.md#streams)",
    )
    same_draws: bool | None = Field(
        None,
        description="draw dropout masks and other random numbers of steps as one rank "
        "would; by default, with batch=global",
    )
    accumulation: int = Field(1, ge=1, description="micro-batches per optimizer step (gradient accumulation)")
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="mixed precision of the forward pass; default: Accelerate's setting"
    )
    compile: Literal[False, True, "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = Field(
        None, description="torch.compile, or the mode to use; default: Accelerate's setting"
    )
    cuda_graph: bool = Field(
        False,
        description="experimental: capture each train step in a CUDA graph and replay it, on one CUDA GPU "
        "(docs/speed.md#one-graph-per-step-traincuda_graph)",
    )
    activation_checkpointing: list[str] = Field(
        [], description="name patterns of modules to recompute in the backward pass, to save memory"
    )
    clip_norm: float | None = Field(
        None, gt=0, description="maximum gradient norm (2-norm over an optimizer's parameters)"
    )
    clip_value: float | None = Field(None, gt=0, description="maximum absolute value of a gradient element")
    shard: Literal["fsdp"] | None = Field(
        None,
        description="fsdp: shard weights, gradients and optimizer state over the ranks (docs/sharding.md)",
    )
    shard_modules: list[str] | None = Field(
        None, description="classes or name patterns of the modules to shard one by one; default: the repeated blocks"
    )
    reshard_after_forward: bool | None = Field(
        None, description="with sharding: free gathered parameters between forward and backward; default: true"
    )
    gather_for_validation: bool | None = Field(
        None, description="with sharding: gather the whole model for validation; default: true"
    )
    fetch_batches: bool = Field(True, description="fetch whole batches at once where the result is identical")
    data_on_device: Literal["auto", True, False] = Field(
        "auto",
        description="keep the data of a TensorDataset on the GPU and take batches by index there; auto: where they fit "
        "into a tenth of its free memory (docs/speed.md#on-a-gpu)",
    )
    prefetch_to_device: bool = Field(True, description="copy other batches to a CUDA GPU while it computes")
    average: Literal["auto", "ddp", "step"] = Field(
        "auto",
        description="how gradients are averaged over ranks: by DDP, after each backward pass "
        "(step), or chosen from the first steps (auto)",
    )
    sync_batchnorm: bool = Field(False, description="synchronize BatchNorm statistics over all ranks")
    nan: Literal["stop", "skip", "ignore"] = Field(
        "stop", description="when a train loss is NaN or infinite: stop the run, skip the batch, or ignore it"
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of an exponential moving average of the weights, which is used for validation and saved",
    )
    swa_from: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the optimizer steps after which the weights of all further steps are averaged equally "
        "(SWA, stochastic weight averaging), for validation and saving",
    )
    val_every_steps: int | None = Field(None, ge=1, description="also validate within epochs, every N optimizer steps")
    schedule: Literal["constant", "linear", "cosine"] | None = Field(
        None, description="learning rate schedule over the optimizer steps, instead of build_scheduler"
    )
    warmup_steps: int | None = Field(None, ge=0, description="with schedule: optimizer steps of linear warm-up")
    warmup_epochs: float | None = Field(None, ge=0, description="with schedule: warm-up in epochs")
    warmup_fraction: float | None = Field(
        None, ge=0, le=1, description="with schedule: warm-up as a fraction of the run"
    )
    min_lr_ratio: float = Field(
        0.0,
        ge=0,
        le=1,
        description="with schedule: final learning rate of linear and cosine, as a fraction of the initial one",
    )
    profile: int | None = Field(
        None, ge=1, description="optimizer steps to record with torch.profiler, in the run's profile/"
    )
    profile_ranks: Literal["main", "all"] = Field("main", description="with profile: record rank 0 only, or all ranks")
    log_norms: int | None = Field(
        None, ge=1, description="log the norms of each gradient and weight to norms.csv every N optimizer steps"
    )
    hang_seconds: float = Field(
        600.0, ge=0, description="seconds without progress before a rank counts as hung; 0 disables"
    )
    stop_seconds: float = Field(
        600.0, ge=0, description="seconds that ranks may take to stop on request, checkpoint included"
    )

    @model_validator(mode="after")
    def _check_init(self) -> TrainConfig:
        given = [name for name in ("init_partial", "init_rename") if getattr(self, name)]
        if given and self.init_from is None:
            raise ValueError(f"{given[0]} needs train.init_from: a run or a file of weights")
        return self

    @model_validator(mode="after")
    def _check_averages(self) -> TrainConfig:
        if self.ema_decay is not None and self.swa_from is not None:
            raise ValueError("ema_decay and swa_from both average the weights: set only one of them")
        return self

    @model_validator(mode="after")
    def _check_batches(self) -> TrainConfig:
        if self.limit_batches is not None and self.overfit_batches is not None:
            raise ValueError("limit_batches and overfit_batches both limit the batches: set only one of them")
        for name in ("limit_batches", "overfit_batches"):
            if self.epoch_steps is not None and getattr(self, name) is not None:
                raise ValueError(f"epoch_steps and {name} both say how long an epoch is: set only one of them")
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> TrainConfig:
        given = [
            name for name in ("warmup_steps", "warmup_epochs", "warmup_fraction") if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: set only one of them")
        if given and self.schedule is None:
            raise ValueError(f"{given[0]} needs train.schedule: constant, linear or cosine")
        return self


class CheckpointConfig(_Section):
    """When checkpoints are saved, and which are kept. The end of the last epoch is always saved."""

    every_epochs: int = Field(1, ge=0, description="epochs between checkpoints; 0 disables per-epoch checkpoints")
    every_steps: int | None = Field(None, ge=1, description="optimizer steps between checkpoints")
    every_minutes: float | None = Field(None, gt=0, description="minutes between checkpoints")
    keep_last: int = Field(2, ge=1, description="number of latest checkpoints to keep")
    keep_best: int = Field(1, ge=0, description="number of best epochs to keep")
    monitor: str | None = Field(
        None,
        description="column that decides which epoch is best; default: val_loss, or loss without validation; with "
        "several validation loaders, the first one's loss",
    )
    mode: Literal["min", "max"] | None = Field(
        None, description="whether lower (min) or higher (max) is better; default: min for losses and errors, else max"
    )
    weights: Literal["all", "trained"] = Field(
        "all", description="trained: without the parameters that are frozen, which build_model makes again"
    )
    pretrained: bool = Field(
        False, description="also write each epoch's model with its save_pretrained() (Hugging Face), in pretrained/"
    )
    asynchronous: bool = Field(True, description="write checkpoints in a background thread, from a copy in memory")
    on_error: Literal["stop", "warn"] = Field(
        "stop", description="whether a failed write (a full disk) stops the run or is a warning"
    )
    change_ranks: bool = Field(False, description="allow a resume with another number of ranks with batch=per_rank")
    accept: Annotated[list[Literal["code", "data"]], BeforeValidator(_as_list)] = Field(
        [], description="code, data: resume although they differ from the checkpoint's; applies to this command only"
    )
    check_data: bool = Field(True, description="compare samples of the data when a run is resumed")


class EarlyStoppingConfig(_Section):
    """Stops training when the monitored column no longer improves, or is good enough."""

    patience: int | None = Field(None, ge=1, description="epochs without improvement after which training stops")
    target: float | None = Field(None, description="value of the monitored column at which training stops")
    monitor: str | None = Field(None, description="column to monitor; default: as checkpoint.monitor's")
    mode: Literal["min", "max"] | None = Field(
        None, description="whether lower (min) or higher (max) is better; default: min for losses and errors, else max"
    )


class ParametersConfig(_Section):
    """Which parameters are trained, and how. A pattern is matched against the full name, such as `layers.0.*`; `norms`
    and `biases` are special."""

    freeze: list[str] = Field([], description="patterns of parameters to freeze")
    no_decay: list[str] = Field([], description="patterns of parameters without weight decay, such as [norms, biases]")
    groups: list[dict[str, Any]] = Field(
        [], description="optimizer options per pattern: [{match: PATTERN, lr: 0.001}]; the first match wins"
    )


class RunFolderConfig(_Section):
    """Where the run's folder is: DIR/NAME."""

    dir: str = Field("runs", min_length=1, description="parent folder of all runs")
    name: Annotated[str, AfterValidator(_run_name)] | None = Field(
        None, description="name of the run's folder; default: the recipe's name and the time"
    )


class WandbConfig(_Section):
    """Weights & Biases; used if a project is set."""

    project: str = Field(min_length=1, description="project name")
    mode: Literal["online", "offline", "disabled"] = Field(
        "online", description="offline: sync later with `dtrain sync`"
    )
    entity: str | None = Field(None, description="team or user; default: your account's")
    wait_seconds: float = Field(10.0, gt=0, description="seconds that the end of training waits for the server")


class MlflowConfig(_Section):
    """MLflow; used if an experiment or a uri is set."""

    uri: str | None = Field(None, description="tracking server or store; default: MLflow's own")
    experiment: str = Field("dtrain", min_length=1, description="experiment name")


class TrackioConfig(_Section):
    """trackio; used if a project is set."""

    project: str = Field(min_length=1, description="project name")


class TrackConfig(_Section):
    """Experiment trackers; several can be used at once."""

    wandb: WandbConfig | None = Field(None, description="Weights & Biases")
    tensorboard: bool = Field(False, description="TensorBoard, in the run's folder")
    mlflow: MlflowConfig | None = Field(None, description="MLflow")
    trackio: TrackioConfig | None = Field(None, description="trackio")
    every_seconds: float = Field(
        1.0, ge=0, description="minimum seconds between values within an epoch; 0: per-epoch values only"
    )
    artifacts: Literal[False, "best", "last"] = Field(
        False, description="weights to upload to W&B and MLflow at the end"
    )


class RunConfig(_Section):
    """A whole run. The builders' sections take the parameters of their functions."""

    recipe: str = Field("dtrain.recipes.digits", min_length=1, description="a .py file or a module")
    model: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    optimizer: dict[str, Any] = Field(default_factory=dict)
    scheduler: dict[str, Any] = Field(default_factory=dict)
    step: dict[str, Any] = Field(default_factory=dict)
    train: TrainConfig = TrainConfig()
    parameters: ParametersConfig = ParametersConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    run: RunFolderConfig = RunFolderConfig()
    track: TrackConfig = TrackConfig()
    defaults: list[str] = Field([], description="written by dtrain: which values above are defaults of the recipe")


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Returns the section class behind a field's annotation (`X` or `X | None`), if it is one."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


@functools.cache  # each key of a command line asks
def leaves(section: type[BaseModel] = RunConfig, prefix: str = "") -> MappingProxyType[str, Any]:
    """Returns every key of the schema, dotted, with its annotation; builders' keys are not among them."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            found |= leaves(inner, f"{prefix}{name}.")
        elif prefix or name not in BUILDER_SECTIONS:
            found[prefix + name] = field.annotation
    return MappingProxyType(found)
