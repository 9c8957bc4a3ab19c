"""Launch profiles: an Accelerate config file, read with Accelerate's own code, as `dtrain launch` understands it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from dtrain.distributed.fsdp_settings import launched_sharding
from dtrain.errors import UsageError, WorldError
from dtrain.launch.options import LaunchOptions

# What a launcher says of ranks and places, which dtrain says itself; and threads, which are shared out by cores.
_PLACES = frozenset(
    {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"}
)
_UNSUPPORTED = {
    "use_deepspeed": "distributed_type: DEEPSPEED",
    "use_megatron_lm": "distributed_type: MEGATRON_LM",
    "tpu": "distributed_type: XLA",
    "mpirun_hostfile": "mpirun_hostfile",
    "use_parallelism_config": "parallelism_config",
}


def read_profile(path: Path) -> LaunchOptions:
    """Reads an Accelerate config file.

    Args:
        path: the YAML or JSON file.

    Returns:
        what it asks for; its environment is what `accelerate launch --config_file` would give each rank besides
        the rank's place and threads.

    Raises:
        UsageError: Accelerate refuses the file, or it asks for what dtrain does not support; the key is named.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about Accelerate's own launching
        arguments, config = _parsed(path)
        _refuse_unsupported(path, arguments, config)
        environment = _environment(path, arguments)
    nodes = int(arguments.num_machines or 1)
    several = nodes > 1
    address, port = arguments.main_process_ip, config.main_process_port
    return LaunchOptions(
        ranks=_ranks_of_a_node(path, int(arguments.num_processes or 1), nodes),
        nodes=nodes,
        node_rank=int(arguments.machine_rank or 0) if several else None,
        rdzv=f"{address}:{port}" if several and address and port else None,
        environment=environment,
    )


def _parsed(path: Path) -> tuple[Any, Any]:
    """Returns Accelerate's launch arguments with the file's values in them, and the file's own."""
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    try:
        config = load_config_from_file(str(path))
        words = ["--config_file", str(path), "script.py"]
        arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UsageError(f"--profile {path}: Accelerate rejects it: {error}.") from None
    return arguments, config


def _refuse_unsupported(path: Path, arguments: Any, config: Any) -> None:
    asked = [words for name, words in _UNSUPPORTED.items() if getattr(arguments, name, None)]
    where = getattr(config.compute_environment, "value", config.compute_environment)
    if where != "LOCAL_MACHINE":
        asked.append(f"compute_environment: {where}")
    if asked:
        raise UsageError(
            f"--profile {path}: {', '.join(asked)} is not supported by dtrain launch. Use an FSDP2 profile "
            "(launch/fsdp.yaml) or a plain one, such as launch/multi_gpu.yaml."
        )


def _environment(path: Path, arguments: Any) -> dict[str, str]:
    """Returns the variables that Accelerate's launcher sets for this file."""
    from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    # The port is dtrain's affair; 0 keeps Accelerate from looking whether the one it would take is free.
    arguments.main_process_port, arguments.main_process_ip = 0, arguments.main_process_ip or "127.0.0.1"
    try:
        made = (
            prepare_multi_gpu_env(arguments)
            if arguments.multi_gpu or arguments.use_fsdp
            else prepare_simple_launcher_cmd_env(arguments)[1]
        )
        launched_sharding(made)
    except WorldError as error:
        raise UsageError(f"--profile {path}: {error}") from None
    except (ValueError, RuntimeError, ImportError) as error:
        raise UsageError(f"--profile {path}: Accelerate rejects it: {error}.") from None
    return {name: value for name, value in made.items() if os.environ.get(name) != value and name not in _PLACES}


def _ranks_of_a_node(path: Path, processes: int, nodes: int) -> int:
    if processes % nodes:
        raise UsageError(
            f"--profile {path}: num_processes: {processes} is not divisible by num_machines: {nodes}. It is the total "
            "over all machines."
        )
    return processes // nodes
