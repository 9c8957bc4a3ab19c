"""Whether and how a net is sharded: asked for by Accelerate's settings (a profile), by the config, or by both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dtrain.errors import UsageError, WorldError

PROFILE = "launch/fsdp.yaml"
_REMEDY = f"Use a profile for fully sharded data parallelism (FSDP2, {PROFILE}), or a plain one (launch/multi_gpu.yaml)"
_OTHERS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}
_NOT_YET = {
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params: true", "parameters stay on the device that computes"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing: true", "use train.activation_checkpointing"),
    "FSDP_IGNORED_MODULES": ("fsdp_ignored_modules", "all parameters are sharded"),
}


@dataclass(frozen=True)
class Sharding:
    """How a net is sharded.

    Attributes:
        modules: class names, or patterns of module names (`layers.*`), of the parts that are gathered each by itself;
            None for the net's repeated blocks, empty for the net as a whole.
        least: parts with more parameters than this instead, None for the above.
        reshard_after_forward: whether a part that was gathered for the forward is let go of until the backward, which
            gathers it again.
        validate_whole: whether validation has the whole net on each rank; else it gathers part by part, too, with ranks
            in step.
    """

    modules: tuple[str, ...] | None = None
    least: int | None = None
    reshard_after_forward: bool = True
    validate_whole: bool = True


def launched_sharding(environment: Mapping[str, str] | None = None) -> Sharding | None:
    """Returns what Accelerate's settings ask for; None where they do not ask for sharding.

    Args:
        environment: what Accelerate's launcher sets, by default this process's.

    Raises:
        WorldError: they ask for what dtrain does not support; it is named, with the remedy.
    """
    said = os.environ if environment is None else environment
    for name, words in _OTHERS.items():
        if _true(said.get(name)):
            raise WorldError(f"{words} (from Accelerate's settings) is not supported. {_REMEDY}.")
    if not _true(said.get("ACCELERATE_USE_FSDP")):
        return None
    version = said.get("FSDP_VERSION", "1")
    if version != "2":
        raise WorldError(
            f"distributed_type FSDP of version {version} (from Accelerate's settings) is not supported: set "
            f"fsdp_version: 2, as in {PROFILE}."
        )
    for name, (key, instead) in _NOT_YET.items():
        value = said.get(name, "")
        if _true(value) or (name == "FSDP_IGNORED_MODULES" and value):
            raise WorldError(f"{key} (from Accelerate's settings) is not supported: {instead}. Leave it out.")
    reshard = said.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    if reshard not in ("true", "false"):
        raise WorldError(
            f"fsdp_reshard_after_forward: {reshard} (from Accelerate's settings) is a word of FSDP version 1: set it "
            "to true or false."
        )
    return replace(_parts(said), reshard_after_forward=reshard == "true")


def _parts(said: Mapping[str, str]) -> Sharding:
    policy = said.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP").upper()
    if policy == "SIZE_BASED_WRAP":
        return Sharding(least=int(said.get("FSDP_MIN_NUM_PARAMS", "0")))
    if policy == "TRANSFORMER_BASED_WRAP":
        names = said.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
        return Sharding(tuple(name.strip() for name in names.split(",") if name.strip()) or None)
    return Sharding(())


def _true(value: str | None) -> bool:
    return (value or "").lower() in ("1", "true", "yes")


def chosen_sharding(train: Any, launched: Sharding | None) -> Sharding | None:
    """Returns how a run shards: as Accelerate's settings say, with what the config says above them.

    Args:
        train: the config's section: its `shard`, `shard_modules`, `reshard_after_forward` and `gather_for_validation`.
        launched: what `launched_sharding` returned.

    Raises:
        UsageError: the config says how a net is sharded that is not.
    """
    if train.shard is None and launched is None:
        for name in ("shard_modules", "reshard_after_forward", "gather_for_validation"):
            if getattr(train, name) is not None:
                raise UsageError(
                    f"train.{name} has no effect without train.shard=fsdp. Set that, or remove this key.",
                    on_all_ranks=True,
                )
        return None
    found = launched or Sharding()
    if train.shard_modules is not None:
        found = replace(found, modules=tuple(train.shard_modules), least=None)
    if train.reshard_after_forward is not None:
        found = replace(found, reshard_after_forward=train.reshard_after_forward)
    if train.gather_for_validation is not None:
        found = replace(found, validate_whole=train.gather_for_validation)
    return found


def refuse_sharding(launched: Sharding | None, size: int, what: str) -> None:
    """For what works with a whole net alone.

    Args:
        launched: what Accelerate's settings ask for.
        size: the number of ranks; one shards nothing.
        what: who is asked, for the message.

    Raises:
        UsageError: the ranks were launched to shard.
    """
    if launched is not None and size > 1:
        raise UsageError(
            f"{what} does not support FSDP, and these ranks were launched for it (distributed_type: FSDP in "
            "Accelerate's settings). Train with `dtrain train`, or launch with a plain profile, such as "
            "launch/multi_gpu.yaml."
        )
