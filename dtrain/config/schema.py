"""The schema of a run's config. One place for every key, its type, its bounds and its default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

# The sections whose keys are the parameters of the recipe's own functions.
BUILDER_SECTIONS = {
    "model": "build_model",
    "data": "build_dataloaders",
    "optimizer": "build_optimizer",
    "scheduler": "build_scheduler",
}


_LONGEST_NAME = 255  # bytes; of most file systems


def _run_name(name: str) -> str:
    """A run's name is one folder's name: no separators, no control characters."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise ValueError("should be a plain folder name, without '/', '\\' or control characters")
    if len(name.encode(errors="surrogateescape")) > _LONGEST_NAME:
        raise ValueError(f"should be a folder's name, of at most {_LONGEST_NAME} bytes")
    return name


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TrainConfig(_Section):
    """How long and how training goes."""

    epochs: int = Field(3, ge=1, description="passes over the training data")
    max_steps: int | None = Field(
        None, ge=1, description="optimizer steps after which training ends; epochs follow where not given"
    )
    limit_batches: int | None = Field(None, ge=1, description="only so many batches of each loader, in each pass")
    overfit_batches: int | None = Field(
        None, ge=1, description="train on the same first so many batches in each epoch: whether the net can learn them"
    )
    deterministic: bool = Field(False, description="algorithms that give the same each time, or an error: slower")
    channels_last: bool = Field(False, description="images and convolution weights with their channels last in memory")
    log_step_freq: int = Field(10, ge=1, description="plain output: a line every so many steps")
    seed: int = Field(42, ge=0, lt=2**32, description="one seed for weights, order and dropout")
    batch: Literal["per_rank", "global"] = Field(
        "per_rank", description="whose batch size the loader's is: each rank's, or the whole world's"
    )
    same_draws: bool | None = Field(
        None,
        description="dropout and other random numbers of steps as one rank draws them; by default, with batch=global",
    )
    accumulation: int = Field(1, ge=1, description="micro-batches that make one optimizer step")
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="the net's forward in float32 or mixed precision; by default as Accelerate's settings say"
    )
    compile: Literal[False, True, "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = Field(
        None, description="the net compiled by torch.compile, or in which of its modes; by default as Accelerate says"
    )
    activation_checkpointing: list[str] = Field(
        [], description="patterns of the net's parts that are computed again in the backward, to save memory"
    )
    clip_norm: float | None = Field(None, gt=0, description="the largest 2-norm of an optimizer's gradients together")
    clip_value: float | None = Field(None, gt=0, description="the largest magnitude of each number of a gradient")
    shard: Literal["fsdp"] | None = Field(
        None,
        description="fsdp: each rank keeps a part of the weights, gradients and optimizer state (docs/sharding.md)",
    )
    shard_modules: list[str] | None = Field(
        None, description="classes or name patterns of the parts that are gathered alone; the repeated blocks"
    )
    reshard_after_forward: bool | None = Field(
        None, description="with sharding: let go of a part between forward and backward; by default, yes"
    )
    validate_whole: bool | None = Field(
        None, description="with sharding: gather the whole net for validation; by default, yes"
    )
    fetch_batches: bool = Field(True, description="fetch whole batches at once where that gives the same")
    average: Literal["auto", "ddp", "step"] = Field(
        "auto",
        description="gradients of several ranks: by DDP, after each backward pass, or found from the first steps",
    )
    sync_batchnorm: bool = Field(False, description="BatchNorm's statistics over all ranks, not each rank's")
    nan: Literal["stop", "skip", "ignore"] = Field(
        "stop", description="a train loss that is NaN or infinite stops the run, has its batch left out, or goes on"
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="an average of the weights, with which is validated and which is saved"
    )
    val_every_steps: int | None = Field(
        None, ge=1, description="validation within epochs too, after every so many optimizer steps"
    )
    schedule: Literal["constant", "linear", "cosine"] | None = Field(
        None, description="the learning rate over the run, by optimizer steps; in place of build_scheduler"
    )
    warmup_steps: int | None = Field(None, ge=0, description="with schedule: first so many optimizer steps of warm-up")
    warmup_epochs: float | None = Field(None, ge=0, description="or so many epochs")
    warmup_fraction: float | None = Field(None, ge=0, le=1, description="or so much of the run")
    floor: float = Field(0.0, ge=0, le=1, description="with schedule: what linear and cosine end at, as a factor")
    profile: int | None = Field(
        None, ge=1, description="optimizer steps that torch.profiler records, in the run's profile/"
    )
    profile_ranks: Literal["main", "all"] = Field("main", description="with profile: rank 0 alone, or each rank")
    log_norms: int | None = Field(
        None, ge=1, description="norms of each gradient and weight every so many optimizer steps, in norms.csv"
    )
    hang_seconds: float = Field(600.0, ge=0, description="ranks of -n N may stand still so long; 0 is for ever")
    stop_seconds: float = Field(
        600.0, ge=0, description="ranks of -n N may take so long to stop on request, their checkpoint included"
    )

    @model_validator(mode="after")
    def _check_batches(self) -> TrainConfig:
        if self.limit_batches is not None and self.overfit_batches is not None:
            raise ValueError("limit_batches and overfit_batches both say how many batches: give one of them")
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> TrainConfig:
        given = [
            name for name in ("warmup_steps", "warmup_epochs", "warmup_fraction") if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} say the same: give one of them")
        if given and self.schedule is None:
            raise ValueError(f"{given[0]} is for train.schedule, which is not given: constant, linear or cosine")
        return self


class CheckpointConfig(_Section):
    """When a run is saved, and which checkpoints stay. The last epoch's end is always saved."""

    every_epochs: int = Field(1, ge=0, description="save after every so many epochs; 0: not for their sake")
    every_steps: int | None = Field(None, ge=1, description="and after every so many optimizer steps")
    every_minutes: float | None = Field(None, gt=0, description="and so long after the last one")
    keep_last: int = Field(2, ge=1, description="so many of the last ones stay")
    keep_best: int = Field(1, ge=0, description="and so many of the best epochs")
    monitor: str | None = Field(None, description="the column that says what is best; val_loss, else loss")
    mode: Literal["min", "max"] | None = Field(
        None, description="which end of it is best; by default the lowest of a loss or an error, else the highest"
    )
    asynchronous: bool = Field(True, description="write beside the training, from a copy in memory")
    on_error: Literal["stop", "warn"] = Field("stop", description="a full disk ends the run, or is a warning")
    change_ranks: bool = Field(False, description="with batch=per_rank, resume with another number of ranks")


class EarlyStoppingConfig(_Section):
    """An end to training that no longer helps."""

    patience: int | None = Field(None, ge=1, description="epochs without a new best after which training ends")
    monitor: str | None = Field(None, description="the column that is watched; val_loss, else loss")
    mode: Literal["min", "max"] | None = Field(
        None, description="which end of it is best; by default the lowest of a loss or an error, else the highest"
    )


class ParametersConfig(_Section):
    """Which parameters learn, and how. A pattern is matched against the whole name: `layers.0.*`, `norms`, `biases`."""

    freeze: list[str] = Field([], description="patterns of parameters that keep their values")
    no_decay: list[str] = Field([], description="patterns of those without weight decay, such as [norms, biases]")
    groups: list[dict[str, Any]] = Field(
        [], description="options of the optimizer for some: [{match: PATTERN, lr: 0.001}]; the first match counts most"
    )


class RunFolderConfig(_Section):
    """Where the run's folder lies: DIR/NAME."""

    dir: str = Field("runs", min_length=1, description="folder of all runs")
    name: Annotated[str, AfterValidator(_run_name)] | None = Field(
        None, description="the run's folder; by default the recipe's name and the time"
    )


class WandbConfig(_Section):
    """Weights & Biases; used where a project is named."""

    project: str = Field(min_length=1, description="the project that the run is filed under")
    mode: Literal["online", "offline", "disabled"] = Field("online", description="offline: sync it later")
    entity: str | None = Field(None, description="the team; by default that of your account")
    wait_seconds: float = Field(10.0, gt=0, description="so long the end of training waits for the server")


class MlflowConfig(_Section):
    """MLflow; used where an experiment or a uri is named."""

    uri: str | None = Field(None, description="the tracking server or store; by default MLflow's own")
    experiment: str = Field("dtrain", min_length=1, description="what the run is filed under")


class TrackioConfig(_Section):
    """trackio; used where a project is named."""

    project: str = Field(min_length=1, description="the project that the run is filed under")


class TrackConfig(_Section):
    """Experiment trackers; several at once."""

    wandb: WandbConfig | None = Field(None, description="Weights & Biases")
    tensorboard: bool = Field(False, description="TensorBoard, in the run's folder")
    mlflow: MlflowConfig | None = Field(None, description="MLflow")
    trackio: TrackioConfig | None = Field(None, description="trackio")
    every_seconds: float = Field(1.0, ge=0, description="values within an epoch, so often at most; 0: of epochs alone")
    artifacts: Literal[False, "best", "last"] = Field(False, description="weights that W&B and MLflow get at the end")


class RunConfig(_Section):
    """A whole run. The builders' sections take whatever their functions take."""

    recipe: str = Field("dtrain.recipes.digits", min_length=1, description="a .py file or a module")
    model: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    optimizer: dict[str, Any] = Field(default_factory=dict)
    scheduler: dict[str, Any] = Field(default_factory=dict)
    train: TrainConfig = TrainConfig()
    parameters: ParametersConfig = ParametersConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    run: RunFolderConfig = RunFolderConfig()
    track: TrackConfig = TrackConfig()


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Returns the section class behind a field's annotation (`X` or `X | None`), if it is one."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def leaves(section: type[BaseModel] = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Returns every key of the schema, dotted, with its annotation; builders' keys are not among them."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            found |= leaves(inner, f"{prefix}{name}.")
        elif prefix or name not in BUILDER_SECTIONS:
            found[prefix + name] = field.annotation
    return found


def keys_with_defaults(section: type[BaseModel]) -> str:
    """Returns "epochs=3, seed=42, ..." for messages that list what is valid."""
    parts = []
    for name, field in section.model_fields.items():
        if section_of(field.annotation) is not None or field.default_factory is not None:
            parts.append(f"{name}.*" if name not in BUILDER_SECTIONS else f"{name}.* (of the recipe)")
        elif field.is_required():
            parts.append(f"{name} (needed)")
        else:
            parts.append(f"{name}={field.default}")
    return ", ".join(parts)
