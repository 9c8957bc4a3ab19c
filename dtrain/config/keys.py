"""The keys of a config for people: their defaults, what they may be, and what other libraries call them."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

from dtrain.config.schema import BUILDER_SECTIONS, RunConfig, section_of
from dtrain.errors import nearest

_BOUNDS = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
_KINDS = {int: "whole number", float: "number", bool: "true, false", str: "text"}
_MOST_NAMED = 3


class Key(NamedTuple):
    """One key.

    Attributes:
        name: dotted.
        default: as it is written; empty for none.
        kind: what it may be, in words.
        words: what it does, in a sentence.
    """

    name: str
    default: str
    kind: str
    words: str


def keys_of(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[Key]:
    """Yields the keys of a section of the schema and of those below it; not the builders', which are the recipe's."""
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            yield from keys_of(inner, f"{prefix}{name}.")
        elif prefix or name not in BUILDER_SECTIONS:
            value = None if field.is_required() else field.get_default(call_default_factory=True)
            yield Key(prefix + name, "" if value is None else yaml_word(value), kind_of(field), field.description or "")


def yaml_word(value: Any) -> str:
    """Returns a plain value as a config has it: true, 0.5, text."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def kind_of(field: Any, mark: str = "") -> str:
    """Returns what a field's value may be, in words: "whole number of at least 1".

    Args:
        field: of a section.
        mark: put around words that are values themselves, as a page does.
    """
    union = get_origin(field.annotation) in (Union, types.UnionType)
    options = get_args(field.annotation) if union else (field.annotation,)
    said = ", ".join(_kind_of(option, mark) for option in options if option is not type(None))
    bounds = [f"{_BOUNDS[sign]} {number}" for sign, number in _bounds(field)]
    return " ".join([said, *([" and ".join(bounds)] if bounds else [])])


def _kind_of(option: Any, mark: str) -> str:
    if get_origin(option) is Literal:
        return ", ".join(f"{mark}{yaml_word(one)}{mark}" for one in get_args(option))
    if hasattr(option, "__metadata__"):
        option = get_args(option)[0]
    if get_origin(option) is list:
        inner = get_args(option)[0]
        if get_origin(inner) is Literal:
            return f"list of {_kind_of(inner, mark)}"
        return "list of texts" if inner is str else "list of mappings"
    return _KINDS.get(option, "mapping")


def _bounds(field: Any) -> list[tuple[str, float]]:
    found = [(sign, getattr(one, sign, None)) for one in field.metadata for sign in _BOUNDS]
    return [(sign, number) for sign, number in found if isinstance(number, (int, float))]


# What other libraries call it -> what it is here: a key of the config, or else words.
_ALIASES = {
    "train.epochs": "max_epochs num_epochs n_epochs nb_epochs num_train_epochs nepochs total_epochs epoch",
    "train.max_steps": "num_steps n_steps total_steps max_iters num_iterations iterations max_train_steps",
    "train.accumulation": "gradient_accumulation_steps accumulate_grad_batches grad_accum grad_accum_steps "
    "gradient_accumulation accumulation_steps accum_iter",
    "train.clip_norm": "gradient_clip_val max_grad_norm grad_clip clip_grad clip_grad_norm gradient_clip_norm",
    "train.precision": "mixed_precision amp autocast dtype",
    "train.seed": "random_seed manual_seed random_state rng_seed",
    "train.log_step_freq": "log_every log_interval log_every_n_steps logging_steps print_freq log_freq",
    "train.val_every_steps": "eval_steps val_check_interval eval_every val_every eval_interval",
    "train.limit_batches": "limit_train_batches steps_per_epoch_limit",
    "train.compile": "torch_compile",
    "train.ema_decay": "ema model_ema_decay",
    "train.schedule": "lr_scheduler lr_scheduler_type lr_schedule",
    "train.warmup_steps": "warmup num_warmup_steps",
    "train.warmup_fraction": "warmup_ratio",
    "train.sync_batchnorm": "sync_bn syncbn",
    "train.activation_checkpointing": "gradient_checkpointing",
    "checkpoint.every_steps": "save_steps save_every save_interval ckpt_interval",
    "checkpoint.keep_last": "save_total_limit save_top_k max_checkpoints",
    "checkpoint.monitor": "metric_for_best_model",
    "early_stopping.patience": "early_stopping_patience early_stop es_patience",
    "run.dir": "output_dir log_dir save_dir default_root_dir out_dir logdir outdir work_dir",
    "run.name": "experiment_name run_name exp_name experiment version",
    "track.wandb.project": "wandb use_wandb wandb_project",
    "track.tensorboard": "tensorboard use_tensorboard",
}
_WORDS = {
    "fp16": "Write precision=fp16.",
    "bf16": "Write precision=bf16.",
    "half": "Write precision=fp16, or bf16.",
    "learning_rate lr base_lr init_lr": "The learning rate is a parameter of the recipe: give build_optimizer one, as "
    "in build_optimizer(model, lr: float = 0.001), and set lr=0.001.",
    "batch_size bs train_batch_size per_device_train_batch_size batchsize": "The batch size is a parameter of the "
    "recipe: give build_dataloaders one, as in build_dataloaders(batch_size: int = 32), and set batch_size=32.",
    "num_workers workers": "It is a parameter of the recipe: give build_dataloaders one, num_workers: int = 0, and "
    "pass it to the DataLoader.",
    "weight_decay wd momentum": "It is a parameter of the recipe: give build_optimizer one, and set it here.",
    "gpus n_gpus num_gpus ngpus n_gpu devices num_devices nproc_per_node num_processes world_size ranks nproc":
    "Write -n N: one process (rank) for each GPU.",
    "nodes num_nodes nnodes n_nodes": "Use `dtrain launch --nodes N` on each node, or `dtrain submit --nodes N` with "
    "SLURM.",
    "device accelerator use_gpu use_cuda cuda gpu": "A GPU is used where there is one, and --cpu "
    "trains on the CPU. For certain GPUs, set CUDA_VISIBLE_DEVICES; for several, -n N.",
    "cpu no_cuda": "Write --cpu.",
    "strategy distributed_backend ddp distributed": "Write -n N for N ranks with DistributedDataParallel; "
    "train.shard=fsdp shards the model.",
    "fsdp": "Write train.shard=fsdp.",
    "resume_from_checkpoint resume_from ckpt_path checkpoint_path resume": "Write --resume RUN, or --from RUN "
    "for a new run with its weights.",
    "pretrained init_checkpoint": "Write --from RUN or --from FILE.",
    "fast_dev_run": "Write --fast-dev-run.",
    "max_time": "SLURM's time limit is kept: a run is saved before it, and resumed.",
    "verbose quiet silent": "Write --log-level error, or --log-format plain.",
}  # fmt: skip
_MEANT = {alias: f" Did you mean {key!r}?" for key, aliases in _ALIASES.items() for alias in aliases.split()}
_MEANT |= {alias: f" {words}" for aliases, words in _WORDS.items() for alias in aliases.split()}


def alias_of(key: str) -> str | None:
    """Returns the key that another library's name for it means; None for any other word."""
    name = key.rpartition(".")[2].replace("-", "_").lower()
    return next((known for known, aliases in _ALIASES.items() if name in aliases.split()), None)


def meant(key: str) -> str:
    """Returns a sentence on what another library's name for a key is called here, or nothing.

    Args:
        key: as it was typed, bare or dotted.
    """
    return _MEANT.get(key.rpartition(".")[2].replace("-", "_").lower(), "")


def suggestion(key: str, names: Iterable[str], *, near_first: bool = True) -> str:
    """Returns " Did you mean 'epochs'?", or the three nearest of the names, or nothing.

    Args:
        key: as it was typed.
        names: that there are.
        near_first: whether a name that differs in a letter or two counts before another library's.
    """
    names = list(names)
    last = key.rpartition(".")[2]
    typo = difflib.get_close_matches(last, names, n=1, cutoff=0.85) if near_first else []
    if not typo and (words := meant(key)):
        return words
    near = difflib.get_close_matches(last, names, n=_MOST_NAMED, cutoff=0.6)
    if len(near) < 2 or typo:
        return nearest(last, names)
    return f" Did you mean {', '.join(map(repr, near[:-1]))} or {near[-1]!r}?"
