"""How sharding is asked for, and what is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dtrain.config import load_settings
from dtrain.config.schema import TrainConfig
from dtrain.distributed.fsdp_settings import Sharding, chosen_sharding, launched_sharding, refuse_sharding
from dtrain.distributed.world import bring_up
from dtrain.errors import UsageError, WorldError
from dtrain.model.fsdp_parts import parts_of
from dtrain.trainer.setup import configured_engine, load_task

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 4)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.tail = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))  # no blocks: they are single layers


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({}, None),
        ({"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}, None),
        (FSDP, Sharding(())),
        (FSDP | {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "false"}, Sharding((), None, False)),
        (FSDP | {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}, Sharding(None)),
        (
            FSDP | {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block, Other"},
            Sharding(("Block", "Other")),
        ),
        (FSDP | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "9"}, Sharding(least=9)),
    ],
)
def test_accelerates_settings_are_understood(said: dict[str, str], found: Sharding | None) -> None:
    assert launched_sharding(said) == found


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP of version 1 .* set fsdp_version: 2, as in launch/fsdp.yaml"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"^DeepSpeed .* is not supported.*FSDP2, launch/fsdp.yaml"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, r"^Megatron-LM .* is not supported.*FSDP2, launch/fsdp.yaml"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: true .* is not supported"),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing: true"),
        (FSDP | {"FSDP_IGNORED_MODULES": "blocks"}, "fsdp_ignored_modules"),
        (FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "full_shard .* is a word of FSDP version 1"),
    ],
)
def test_what_is_not_supported_is_refused_before_the_ranks_meet(
    said: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WorldError, match=told):
        launched_sharding(said)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(WorldError, match=told):
        bring_up(cpu=True)


def test_a_world_knows_that_it_was_launched_to_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    world = bring_up(cpu=True)
    assert world.sharding == Sharding(())
    refuse_sharding(world.sharding, 1, "train_model")  # one rank shards nothing
    with pytest.raises(UsageError, match=r"^train_model does not support FSDP.*launch/multi_gpu.yaml"):
        refuse_sharding(world.sharding, 2, "train_model")


def test_the_config_comes_before_the_profile() -> None:
    launched = Sharding(least=5, reshard_after_forward=False)
    assert chosen_sharding(TrainConfig(), None) is None
    assert chosen_sharding(TrainConfig(), launched) == launched
    assert chosen_sharding(TrainConfig(shard="fsdp"), None) == Sharding()
    own = TrainConfig(shard_modules=["Block"], reshard_after_forward=True, gather_for_validation=False)
    assert chosen_sharding(own, launched) == Sharding(("Block",), None, True, validate_whole=False)
    with pytest.raises(UsageError, match=r"train.shard_modules has no effect without train"):
        chosen_sharding(TrainConfig(shard_modules=["Block"]), None)


def test_the_parts_are_the_repeated_blocks_or_what_is_named_inner_ones_first() -> None:
    net = Net()

    def names(sharding: Sharding) -> list[str]:
        known = {id(module): name for name, module in net.named_modules()}
        return [known[id(module)] for module in parts_of(net, sharding)]

    blocks = ["blocks.2", "blocks.1", "blocks.0"]
    assert names(Sharding()) == blocks
    assert names(Sharding(())) == []
    assert names(Sharding(("Block", "tail"))) == ["tail", *blocks]
    assert names(Sharding(("blocks.1*",))) == ["blocks.1.linear", "blocks.1"]
    assert names(Sharding(least=30)) == ["tail"]
    net._no_split_modules = ["Sequential"]  # type: ignore[assignment]
    assert names(Sharding()) == ["tail"]
    with pytest.raises(
        UsageError, match=r"'Blok' is neither the class .* Did you mean 'Block'\? Its classes are Block, L"
    ):
        parts_of(net, Sharding(("Blok",)))
    assert parts_of(torch.nn.Linear(2, 2), Sharding()) == []


def test_a_name_of_no_part_is_refused_before_anything_is_set_up() -> None:
    """Also on one rank, which shards nothing."""
    settings = load_settings("digits", ["train.shard=fsdp", "train.shard_modules=[Conv3d]"], {})
    with pytest.raises(UsageError, match=r"'Conv3d' is neither the class .* Did you mean 'Conv2d'") as refused:
        configured_engine(load_task(settings), bring_up(cpu=True), settings, epochs=1)
    assert refused.value.on_all_ranks
