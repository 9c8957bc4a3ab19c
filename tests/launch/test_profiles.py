"""Each launch profile gives ranks the same environment under `dtrain launch` as under `accelerate launch`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers.commands import BIN, Dtrain

from dtrain.cli.launch_profile import read_profile
from dtrain.errors import UsageError
from dtrain.launch.options import LaunchOptions

PROFILES = Path(__file__).resolve().parents[2] / "launch"
# Where each process is, and what only one of the two launchers has.
OWN = re.compile(
    r"(GROUP_|LOCAL_|ROLE_|NODE_)?(RANK|WORLD_SIZE)|LOCAL_WORLD_SIZE|ROLE_NAME|MASTER_(ADDR|PORT)|OMP_NUM_THREADS"
    r"|TORCHELASTIC_.*|TORCH_NCCL_ASYNC_ERROR_HANDLING|DTRAIN_.*|GLOO_SOCKET_IFNAME|KMP_INIT_AT_FORK|LC_CTYPE|_|PWD|SHLVL"
)
SHOW = "import json, os, pathlib\npathlib.Path('env-' + os.environ.get('RANK', '0')).write_text(json.dumps(dict(os.environ)))"


def shown(dtrain: Dtrain, rank: int = 0) -> dict[str, str]:
    values = json.loads((dtrain.folder / f"env-{rank}").read_text())
    return {name: value for name, value in values.items() if not OWN.fullmatch(name)}


CHANGED = {
    "bf16": ("mixed_precision: 'no'", "mixed_precision: bf16"),
    "dynamo": (
        "mixed_precision: 'no'",
        "mixed_precision: 'no'\ndynamo_config:\n  dynamo_backend: INDUCTOR\n  dynamo_mode: default\ngpu_ids: '2,3'",
    ),
    "fsdp": ("num_processes: 8", "num_processes: 2"),
}
OF = {"bf16": "cpu", "fsdp": "fsdp"}


@pytest.mark.parametrize("change", [None, *CHANGED])
def test_ranks_get_what_accelerate_launch_gives_them(dtrain: Dtrain, change: str | None) -> None:
    (dtrain.folder / "show.py").write_text(SHOW)
    text = (PROFILES / f"{OF.get(change or '', 'multi_cpu')}.yaml").read_text()
    (dtrain.folder / "p.yaml").write_text(text.replace(*CHANGED[change]) if change else text)
    done = dtrain("launch", "--profile", "p.yaml", "show.py")
    assert done.code == 0, done.text
    assert len(list(dtrain.folder.glob("env-*"))) == (1 if change == "bf16" else 2)
    ours = shown(dtrain)
    done = dtrain.run(BIN / "accelerate", "launch", "--config_file", "p.yaml", "--main_process_port", "0", "show.py")
    assert done.code == 0, done.text
    assert ours == shown(dtrain)


@pytest.mark.parametrize("name", sorted(path.stem for path in PROFILES.glob("*.yaml")))
def test_each_profile_is_read_and_the_command_line_comes_first(name: str) -> None:
    asked = read_profile(PROFILES / f"{name}.yaml")
    assert asked.environment["ACCELERATE_MIXED_PRECISION"] == "no"
    places = {"cpu": (1, 1), "single_gpu": (1, 1), "multi_cpu": (2, 1), "multi_gpu": (8, 1), "multi_node": (8, 2)}
    places["fsdp"] = (8, 1)
    assert (asked.ranks, asked.nodes) == places[name]
    above = LaunchOptions(ranks=3, environment={"ACCELERATE_MIXED_PRECISION": "bf16"}).over(asked)
    assert (above.ranks, above.nodes, above.rdzv) == (3, asked.nodes, asked.rdzv)
    assert above.environment == asked.environment | {"ACCELERATE_MIXED_PRECISION": "bf16"}


def test_a_bundled_profile_of_several_nodes_says_where_they_meet(dtrain: Dtrain) -> None:
    done = dtrain("launch", "--profile", "launch/multi_node.yaml", "--node-rank", 1, "--dry-run", "train")
    assert done.code == 0, done.text
    assert "node 1 (this one): ranks 8 to 15" in done.out
    assert "MASTER_ADDR=127.0.0.1" in done.out
    assert "ACCELERATE_MIXED_PRECISION=no" in done.out


REFUSED = {
    ("MULTI_GPU", "FSDP"): "FSDP of version 1 .* is not supported: set fsdp_version: 2, as in launch/fsdp.yaml",
    ("MULTI_GPU", "FSDP\nfsdp_config: {fsdp_version: 2, fsdp_offload_params: true}"): "fsdp_offload_params: true",
    (
        "MULTI_GPU",
        "DEEPSPEED",
    ): "distributed_type: DEEPSPEED is not supported by dtrain launch.*FSDP2 profile.*launch.fsdp.yaml",
    ("MULTI_GPU", "MEGATRON_LM"): "distributed_type: MEGATRON_LM is not supported by dtrain launch",
    ("MULTI_GPU", "NONSENSE"): "Accelerate rejects it",
    (
        "num_machines: 1",
        "num_machines: 3\nmain_process_ip: a\nmain_process_port: 1",
    ): "num_processes: 8 is not divisible",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, change: tuple[str, str]) -> None:
    path = tmp_path / "p.yaml"
    path.write_text((PROFILES / "multi_gpu.yaml").read_text().replace(*change))
    with pytest.raises(UsageError, match=REFUSED[change]) as caught:
        read_profile(path)
    assert f"--profile {path}" in str(caught.value)
