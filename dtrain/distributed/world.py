"""The world: this rank's facts, verified, and the few collectives that dtrain needs.

Everything works unlaunched too: a world of one rank does no communication.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_nccl_timeout
from torch.distributed.distributed_c10d import _set_pg_timeout, default_pg_timeout

from dtrain.distributed.forks import make_forks_safe
from dtrain.distributed.fsdp_settings import Sharding, launched_sharding
from dtrain.distributed.handshake import rank_info
from dtrain.distributed.quiet import import_accelerate
from dtrain.distributed.rendezvous import rendezvous, time_limit
from dtrain.distributed.store import OpenStore
from dtrain.errors import WorldError
from dtrain.launch.env.inherited import joined, mark_rank
from dtrain.launch.env.job import HANG
from dtrain.launch.env.rank_env import RankFacts, read_rank_facts
from dtrain.launch.env.socket_paths import shorten_socket_paths
from dtrain.launch.monitor.hang_watch import outlasting
from dtrain.wording import counted

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs
    from torch._C._distributed_c10d import Store


_PIECE_BYTES = 1 << 26  # at once, of all ranks together, so that no device needs room for more
_PACK = 1 << 22  # numbers


@dataclass(frozen=True)
class World:
    """The ranks that train together, as seen from one of them.

    Attributes:
        rank: 0 to size - 1.
        size: number of ranks.
        local_rank: 0 to local_size - 1 on this machine.
        local_size: number of ranks on this machine.
        device: where this rank computes.
        accelerator: Accelerate's view of the same world.
        sharding: how the nets are sharded, where Accelerate's settings ask for it.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    accelerator: Accelerator
    sharding: Sharding | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is global rank 0, the one that prints and writes."""
        return self.rank == 0

    @property
    def sum_dtype(self) -> torch.dtype:
        """float64, or float32 on a device that has no float64 (MPS)."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def all_reduce(self, numbers: list[float]) -> list[float]:
        """Sums a list of numbers, of equal length on all ranks, over the ranks; one collective."""
        if self.size == 1:
            return numbers
        packed = torch.tensor(numbers, dtype=self.sum_dtype, device=self.device)
        dist.all_reduce(packed)
        return [float(number) for number in packed.tolist()]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks in place, without waiting for the device, and returns it."""
        if self.size > 1:
            summed = tensor.contiguous()  # itself, where it is no view; see `broadcast_`
            dist.all_reduce(summed)
            if summed is not tensor:
                tensor.copy_(summed)
        return tensor

    def gather_json(self, value: Any) -> list[Any]:
        """Returns every rank's value on every rank, in rank order.

        Args:
            value: what JSON can hold; lists and dicts come back as such. No pickle is involved.
        """
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([data.numel()], device=self.device))
        longest = max(int(length) for length in lengths)
        room = [torch.zeros(longest, dtype=torch.uint8, device=self.device) for _ in range(self.size)]
        dist.all_gather(room, torch.nn.functional.pad(data, (0, longest - data.numel())))
        return [
            json.loads(part[: int(length)].cpu().numpy().tobytes()) for part, length in zip(room, lengths, strict=True)
        ]

    def gather_tensors(self, tensor: Tensor | None, onto: torch.device | None = None) -> list[Tensor | None]:
        """Returns every rank's tensor on every rank, in rank order; shapes and types may differ.

        Args:
            tensor: this rank's, or None where it has none.
            onto: where all of them come together, by default this rank's device; on the way there, that has room for a
                piece of them at a time.
        """
        if self.size == 1:
            return [tensor if tensor is None or onto is None else tensor.to(onto)]
        mine = None if tensor is None else tensor.detach().contiguous()
        told = self.gather_json(None if mine is None else [str(mine.dtype).removeprefix("torch."), list(mine.shape)])
        # As bytes: not every backend moves every type, and a rank without a tensor need not know the type.
        data = torch.zeros(0, dtype=torch.uint8)
        if mine is not None and mine.numel():
            data = mine.flatten().view(torch.uint8)
        sizes = [0 if one is None else math.prod(one[1]) * _dtype(one[0]).itemsize for one in told]
        gathered = self._gather_bytes(data, sizes, onto or self.device)
        return [
            None if one is None else part.view(_dtype(one[0])).reshape(one[1])
            for part, one in zip(gathered, told, strict=True)
        ]

    def _gather_bytes(self, mine: Tensor, sizes: list[int], onto: torch.device) -> list[Tensor]:
        gathered = [torch.empty(size, dtype=torch.uint8, device=onto) for size in sizes]
        longest, step = max(sizes), max(1, _PIECE_BYTES // self.size)
        for start in range(0, longest, step):
            length = min(step, longest - start)
            piece = mine[start : start + length].to(self.device)
            room = [torch.empty(length, dtype=torch.uint8, device=self.device) for _ in sizes]
            dist.all_gather(room, torch.nn.functional.pad(piece, (0, length - piece.numel())))
            for whole, part in zip(gathered, room, strict=True):
                there = whole[start : start + length]
                there.copy_(part[: there.numel()])
        return gathered

    def broadcast_(self, tensors: list[Tensor]) -> None:
        """Overwrites tensors, in place, with rank 0's, in one collective a type where they are small.

        Args:
            tensors: of the same shapes and types on all ranks, on any device; they may be views, or sparse with as
                many values on each rank.
        """
        for packed in _packs([part for one in tensors for part in _strided(one)]) if self.size > 1 else ():
            # A copy: gloo writes to as many numbers as a view has, one after the other, and NCCL takes no view.
            moved = torch.cat([tensor.detach().reshape(-1).to(self.device) for tensor in packed])
            dist.broadcast(moved, src=0)
            parts = torch.split(moved, [tensor.numel() for tensor in packed])
            for tensor, part in zip(packed, parts, strict=True):
                tensor.detach().copy_(part.view(tensor.shape))

    def share_bytes(self, data: bytes) -> bytes:
        """Returns rank 0's bytes on every rank.

        Args:
            data: on rank 0; on the others it does not matter.
        """
        if self.size == 1:
            return data
        length = torch.tensor([len(data)], device=self.device)
        dist.broadcast(length, src=0)
        received = bytearray(data if self.is_main else int(length))
        for start in range(0, len(received), _PIECE_BYTES):
            piece = torch.frombuffer(received, dtype=torch.uint8, offset=start)[:_PIECE_BYTES]
            moved = piece.to(self.device)
            dist.broadcast(moved, src=0)
            piece.copy_(moved)
        return bytes(received)

    def close(self) -> None:
        """Leaves the process group together with all other ranks; call it where all of them do."""
        if self.size > 1:
            dist.barrier()  # a rank that left earlier would cut the others' last collective off
            dist.destroy_process_group()


def _strided(tensor: Tensor) -> list[Tensor]:
    """Returns what a tensor's numbers lie in: itself, or the parts of a sparse one."""
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    by_rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    pointers = (
        (tensor.crow_indices(), tensor.col_indices()) if by_rows else (tensor.ccol_indices(), tensor.row_indices())
    )
    return [*pointers, tensor.values()]


def _packs(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        pack = kinds.setdefault(tensor.dtype, [])
        pack.append(tensor)
        if sum(one.numel() for one in pack) > _PACK:
            yield kinds.pop(tensor.dtype)
    yield from kinds.values()


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def bring_up(
    *,
    cpu: bool = False,
    asked: int | None = None,
    facts: RankFacts | None = None,
    claims: Mapping[str, str] | None = None,
) -> World:
    """Brings up the world that the launcher announced and checks that it came up as asked.

    Args:
        cpu: compute on the CPU also where there is an accelerator.
        asked: the number of ranks that the user asked for, where known.
        facts: this rank's facts, by default read from the environment.
        claims: what must be the same on all ranks besides the program itself, such as the config: value by name.

    Raises:
        WorldError: the ranks are not the ones asked for, or not of one job, or some did not come in time; both
            sides and the remedy are named.
    """
    facts = read_rank_facts() if facts is None else facts
    shorten_socket_paths()
    if facts.launched:
        mark_rank()
    if asked is not None and asked != facts.size:
        raise WorldError(
            f"-n {asked} asks for {counted(asked, 'rank')}, but the launcher started {facts.size} "
            f"(WORLD_SIZE={facts.size}). Pass this number to the launcher, or run `dtrain train -n {asked}` without it."
        )
    cpu = computes_on_cpu(cpu)
    if not cpu and not facts.local_unknown:
        _refuse_shared_gpus(facts)
    opened = None
    if facts.size > 1 and not dist.is_initialized():
        opened, facts = rendezvous(facts, rank_info(facts, cpu=cpu, claims=claims or {}))
        _take_place(facts, cpu)
    world = _join(facts, cpu, opened)
    _verify(world, facts)
    if facts.launched:
        joined()
    if opened is not None:
        _set_pg_timeout(step_limit(world.device))
    return world


def _take_place(facts: RankFacts, cpu: bool) -> None:
    """Tells Accelerate this rank's place on its host, where the ranks had to meet to know it."""
    if facts.local_unknown:
        os.environ |= {"LOCAL_RANK": str(facts.local_rank), "LOCAL_WORLD_SIZE": str(facts.local_size)}
        if not cpu:
            _refuse_shared_gpus(facts)


def step_limit(device: torch.device) -> timedelta:
    """How long ranks wait for one another from the first step on.

    torch's own limit (10 minutes on GPUs) would end a rank that may be late, or a hang before it is told which rank
    it is. Where a supervisor watches, which tells that, torch's comes after it.
    """
    own = default_pg_nccl_timeout if device.type == "cuda" else None
    usual, watched = own or default_pg_timeout, os.environ.get(HANG)
    return max(usual, timedelta(seconds=outlasting(float(watched)))) if watched else usual


def computes_on_cpu(cpu: bool) -> bool:
    """Whether ranks compute on the CPU: they shall (`cpu`, ACCELERATE_USE_CPU), or there is nothing else."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return cpu or asked or not torch.accelerator.is_available()


def _refuse_shared_gpus(facts: RankFacts) -> None:
    count = torch.accelerator.device_count()
    if count == 1 and "SLURM_LOCALID" in os.environ:
        return  # with srun's --gpus-per-task each rank sees its own alone; two that share one are found as they meet
    if facts.local_size > count:
        raise WorldError(
            f"{facts.local_size} ranks were started on this machine, which has {count} "
            f"{torch.accelerator.current_accelerator()} devices: use -n {count}, or add --cpu."
        )


def _join(facts: RankFacts, cpu: bool, opened: OpenStore | None) -> World:
    """Lets Accelerate bring the process group up.

    On a CPU machine `cpu=True` must be said: a plain `Accelerator()` there makes every process its own
    world of size 1, all of them rank 0, in silence.

    Args:
        facts: this rank's facts.
        cpu: whether it computes on the CPU.
        opened: the store, where the process group is made here; its first collectives then have the short time limit.
    """
    import_accelerate()
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    handlers = None
    if opened is not None:
        handlers = [InitProcessGroupKwargs(timeout=time_limit())]
        if opened.for_group is not None:
            handlers = [_over(opened.for_group, facts)]

    _refuse_precision(cpu)
    sharding = launched_sharding()
    with warnings.catch_warnings(), _without("ACCELERATE_USE_FSDP"):
        warnings.filterwarnings("ignore", message=".*OMP_NUM_THREADS.*")
        accelerator = Accelerator(cpu=cpu, step_scheduler_with_optimizer=False, kwargs_handlers=handlers)
    make_forks_safe()
    atexit.register(_leave_group)  # one rank alone has a group, too, where torchrun has started it on a GPU
    return World(
        rank=accelerator.process_index,
        size=accelerator.num_processes,
        local_rank=facts.local_rank,
        local_size=facts.local_size,
        device=at if (at := accelerator.device).type == "cpu" else torch.empty(0, device=at).device,  # cuda:0
        accelerator=accelerator,
        sharding=sharding,
    )


def _over(store: Store, facts: RankFacts) -> InitProcessGroupKwargs:
    """Returns what has Accelerate make the process group over a store of ours, instead of one at MASTER_PORT."""
    from accelerate.utils import InitProcessGroupKwargs

    arguments = {"timeout": time_limit(), "store": store, "rank": facts.rank, "world_size": facts.size}
    handler = InitProcessGroupKwargs()
    handler.to_kwargs = lambda: arguments  # it has no field for a store, and Accelerate takes no subclass
    return handler


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Hides a variable: Accelerate shards on GPUs alone, and in its own way; here dtrain does, on CPU ranks too."""
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


def _refuse_precision(cpu: bool) -> None:
    """What Accelerate's settings may say of precision; asked before Accelerate is, whose words lead elsewhere."""
    said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if said not in ("no", "bf16", "fp16"):
        raise WorldError(
            f"mixed precision {said!r} (from Accelerate's settings) is not supported: use bf16, fp16 or no."
        )
    if said == "fp16" and cpu:
        raise WorldError(
            "mixed precision 'fp16' (from Accelerate's settings) needs a GPU: use bf16 or no. To try it on a CPU, give "
            "train.precision=fp16."
        )


def _leave_group() -> None:
    """Before the interpreter is torn down: gloo's threads may else ask for its lock then and abort; NCCL would warn."""
    failed = hasattr(sys, "last_value")  # then leaving could wait for what the others never send
    if dist.is_initialized() and not (failed and dist.get_world_size() > 1):
        dist.destroy_process_group()
    elif dist.is_initialized() and dist.get_backend() == "nccl":
        dist.distributed_c10d._abort_process_group()


def _verify(world: World, facts: RankFacts) -> None:
    """Compares, on every rank, the announced world with the one that came up."""
    joined = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if (world.rank, world.size, joined) != (facts.rank, facts.size, facts.size):
        raise WorldError(
            f"the launcher announced rank {facts.rank} of {facts.size}, but rank {world.rank} of {world.size} "
            f"started, in a process group of {joined}. Start it with `dtrain train -n {facts.size}`."
        )
    seen = world.gather_json([world.rank, world.device.type])
    if [rank for rank, _ in seen] != list(range(world.size)):
        raise WorldError(f"the ranks that started are {[r for r, _ in seen]}, not 0 to {world.size - 1}.")
    kinds = sorted({kind for _, kind in seen})
    if len(kinds) > 1:
        raise WorldError(
            f"the ranks compute on different devices ({', '.join(f'{r}: {k}' for r, k in seen)}): "
            "give all the same, or add --cpu on every node."
        )
