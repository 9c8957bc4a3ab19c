"""A net that is sharded over the ranks; it stays the user's own object, with its parameters cut.

::

    forward:   each part is gathered before it computes, and let go of after
    backward:  it is gathered again; its gradients are averaged over the ranks, and each rank keeps those of its part
    step:      each rank's optimizer steps on its part alone

Calls of the net are collectives, so that every rank must make them alike. A pass in which ranks take different numbers
of steps runs on the net gathered as a whole, once: validation does, unless it shall not.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adafactor, Optimizer, Rprop
from torch.optim.optimizer import register_optimizer_step_post_hook

from dtrain.distributed.consistency import word_in_terms_of_ranks
from dtrain.distributed.dtensor import cut_state, is_sharded
from dtrain.distributed.fsdp_settings import Sharding
from dtrain.errors import StepError, UsageError
from dtrain.model.fsdp_parts import parts_of
from dtrain.model.optimizers import optimizers_holding
from dtrain.model.precision import Precision, computing

if TYPE_CHECKING:
    from dtrain.data.partition import RankBatch
    from dtrain.distributed.world import World
    from dtrain.model.compile import Compilation

logger = logging.getLogger(__name__)

_WHOLE_ONLY = (LBFGS, Adafactor, Rprop)


class ShardedReplica:
    """One rank's part of the net; the same methods as `dtrain.model.ddp.Replica`.

    Args:
        net: the user's net, the same on all ranks; it is sharded in place, with rank 0's values, and stays so.
        world: several ranks.
        precision: in which its forward computes.
        sharding: how it is sharded.

    Attributes:
        sharded: True.
        averages: empty; the order of the gradients is that of the parameters.
        clock: None: nothing is compiled.

    Raises:
        UsageError: the net or an optimizer of its parameters is of a kind that cannot be sharded.
    """

    sharded = True
    clock = None

    def __init__(self, net: nn.Module, world: World, precision: Precision, sharding: Sharding) -> None:
        self.net = net
        self.averages: dict[str, Any] = {"way": None, "order": []}
        self._world = world
        try:
            self._reshards = _sharded(net, world, sharding)
        except UsageError as error:
            error.on_all_ranks = True  # the ranks' nets are alike
            raise
        self._lowered = contextlib.ExitStack()
        self._lowered.enter_context(computing(net, precision, world))
        self._leaves = list(self._found_leaves())
        self._validate_whole = sharding.validate_whole
        # A call without a backward leaves the net's own part gathered, with the weights from before the step.
        self._handle = register_optimizer_step_post_hook(lambda *_: self.apart())

    def leaves(self) -> list[Tensor]:
        """Returns the gathered parameters, at which gradients arrive before they are averaged."""
        return self._leaves

    def _found_leaves(self) -> Iterator[Tensor]:
        """torch makes one gathered parameter for each and keeps it, with no memory behind it most of the time."""
        for part in self._reshards:
            part.unshard()
            yield from (parameter for parameter in part.parameters() if not is_sharded(parameter))
            part.reshard()

    def resume(self, averages: dict[str, Any]) -> None:
        """Does nothing: there is one way."""

    def settle(self, *, strict: bool = False) -> None:
        """Does nothing: the ranks keep step anyway."""

    def compare(self) -> None:
        """Does nothing: of each weight there is one on all ranks."""

    def close(self) -> None:
        """Gives the net back its own forward; it stays sharded."""
        self._handle.remove()
        self._lowered.close()

    def averaging(self, rank_batch: RankBatch) -> AbstractContextManager[Any]:
        """Gradients are averaged after each backward, also within a group: else each rank would keep whole ones."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def training(self) -> Iterator[nn.Module]:
        """While inside, a train step runs; it begins with rank 0's buffers, as it does with DDP."""
        self._world.broadcast_(list(self.net.buffers()))
        try:
            yield self.net
        except (RuntimeError, ValueError) as error:
            word_in_terms_of_ranks(error)
            _word_in_terms_of_parts(error)
            raise

    def evaluating(self) -> AbstractContextManager[nn.Module]:
        """The net as it is."""
        return contextlib.nullcontext(self.net)

    def apart(self) -> None:
        """Lets go of whatever is gathered."""
        for part in self._reshards:
            part.reshard()

    @contextlib.contextmanager
    def validating(self) -> Iterator[None]:
        """While inside, validation runs: on the net gathered as a whole, without collectives; or part by part."""
        self.apart()
        if self._validate_whole:
            for part in self._reshards:
                part.unshard()
                part.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            self.apart()
            for part, reshards in self._reshards.items():
                part.set_reshard_after_forward(reshards, recurse=False)


def _sharded(net: nn.Module, world: World, sharding: Sharding) -> dict[Any, bool]:
    """Shards a net, with rank 0's values, and its optimizers; returns what `_shard` does."""
    check_net(net)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    optimizers = optimizers_of(names)
    parts = parts_of(net, sharding)
    world.broadcast_([*net.parameters(), *net.buffers()])
    reshards = _shard(net, parts, world, sharding)
    for optimizer in optimizers:
        _switch(optimizer, names, dict(net.named_parameters()))
    return reshards


def check_net(net: nn.Module) -> None:
    """Looks for what torch would complain of in its own words, or in the midst of training.

    Raises:
        UsageError: the net cannot be sharded; the parameter or module is named.
    """
    for name, parameter in net.named_parameters():
        what = None
        if parameter.is_meta:
            what = "has no values (device meta). Build the model with values"
        elif parameter.ndim == 0:
            what = "has no dimension to shard. Give it one, as in torch.zeros(1)"
        elif parameter.is_complex() or parameter.layout is not torch.strided:
            what = (
                f"is of type {parameter.dtype}, layout {parameter.layout}. Only real, strided parameters can be sharded"
            )
        if what is not None:
            raise UsageError(f"the model cannot be sharded: the parameter {name} {what}, or train without train.shard.")
    for name, module in net.named_modules():
        if getattr(module, "sparse", False) is True:
            raise UsageError(
                f"the model cannot be sharded: {name} ({type(module).__name__}) has sparse gradients. Make it with "
                "sparse=False, or train without train.shard."
            )


def _shard(net: nn.Module, parts: list[nn.Module], world: World, sharding: Sharding) -> dict[Any, bool]:
    """Shards a net in place; returns the parts, and whether each is let go of after its forward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    kinds = ", ".join(sorted({type(part).__name__ for part in parts}))
    # The backward begins with what is left for the net itself, so that to let go of it would only cost.
    reshards: dict[Any, bool] = dict.fromkeys(parts, sharding.reshard_after_forward) | {net: False}
    for part, reshard in reshards.items():
        kind = type(part).__name__
        try:
            fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError, AttributeError) as error:
            raise UsageError(
                f"the model cannot be sharded: torch's fully_shard refuses {kind}: {error}. Name other parts with "
                "train.shard_modules, or train without train.shard."
            ) from error
    logger.info("the net is sharded over %d ranks, in %d parts (%s) and the rest", world.size, len(parts), kinds)
    if not parts and world.is_main:
        logger.warning(
            "no module is sharded separately: each forward and backward gathers "
            "the whole model at once. Set its blocks "
            "with train.shard_modules, as in train.shard_modules=[Block]."
        )
    return reshards


def optimizers_of(names: dict[int, str]) -> list[Optimizer]:
    """Returns all optimizers that hold some of the net's parameters, also those that its step alone knows.

    Raises:
        UsageError: one is of a kind that cannot step on parts.
    """
    found = optimizers_holding(names)
    for optimizer in found:
        if isinstance(optimizer, _WHOLE_ONLY):
            raise UsageError(
                f"{type(optimizer).__name__} cannot step on a sharded model: torch's implementation does not support "
                "sharded parameters. Use another optimizer, such as AdamW, or train without train.shard."
            )
    return found


def _switch(optimizer: Optimizer, names: dict[int, str], sharded: dict[str, nn.Parameter]) -> None:
    """Puts the sharded parameters in the place of the whole ones, with what the optimizer knows of them."""
    for group in optimizer.param_groups:
        before = list(group["params"])
        group["params"] = [sharded[names[id(p)]] if id(p) in names else p for p in before]
        for old, new in zip(before, group["params"], strict=True):
            if new is not old and old in optimizer.state:  # Adagrad makes its sums before the first step
                optimizer.state[new] = cut_state(optimizer.state.pop(old), new)


_PARTS = (
    "the model is sharded (train.shard), and the train step uses a part of it, "
    "such as model.encoder(x) or its weights, "
    "outside of model(x), where each rank has only its own shard. Do this in the model's forward, and call model(x)."
)


def check_values(values: Iterable[Any]) -> None:
    """Looks at what a train step returned.

    Raises:
        StepError: a value was computed from a rank's piece of the weights.
    """
    if any(is_sharded(value) for value in values):
        raise StepError(_PARTS)


def _word_in_terms_of_parts(error: Exception) -> None:
    """Words torch's complaints of a step that looks into the parts of a net.

    Raises:
        StepError: if the error is such.
    """
    if "mixed torch.Tensor and DTensor" in str(error) or "already been lazily initialized" in str(error):
        raise StepError(f"{_PARTS} torch says: {str(error).splitlines()[0]}") from None


def refuse_compiling(how: Compilation | None) -> None:
    """Looks whether the net is to be compiled, which was not tried with its parts gathered and let go of.

    Raises:
        UsageError: it is.
    """
    if how is not None:
        raise UsageError(
            "the model is sharded (train.shard), and torch.compile is asked for (train.compile, or dynamo_backend in "
            "Accelerate's settings): this is not supported yet. Use only one of the two.",
            on_all_ranks=True,
        )


def refuse_averaging(way: str) -> None:
    """Looks whether DDP is to average the gradients, which of a sharded net FSDP does.

    Raises:
        UsageError: it is.
    """
    if way == "ddp":
        raise UsageError(
            "train.average = ddp: the model is sharded (train.shard). Use only one of the two.", on_all_ranks=True
        )


def refuse_others(others: Iterable[tuple[str, Any]]) -> None:
    """Looks at the other objects with a state.

    Raises:
        UsageError: one is a net of its own, such as torch's AveragedModel, whose weights are whole.
    """
    for name, other in others:
        if isinstance(other, nn.Module) and any(True for _ in other.parameters()):
            raise UsageError(
                f"the model is sharded (train.shard), and {name} ({type(other).__name__}) is a separate model with "
                "unsharded weights. For averaged weights use train.ema_decay; or train without train.shard."
            )
