"""What a run or a step with `train.cuda_graph` cannot have: refused, with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.data.partition import RankBatch
from dtrain.distributed.world import World
from dtrain.engine.cuda_graphs import Graphs, graphs_of
from dtrain.engine.graph_optimizer import OFF
from dtrain.engine.metrics import Mean, Observed, Value
from dtrain.engine.options import RunOptions
from dtrain.engine.step_contract import Kind
from dtrain.engine.step_trace import place_of, refusal
from dtrain.engine.train_step import Learner
from dtrain.errors import UsageError


def graphs_for(options: RunOptions, world: World, learner: Learner, module: nn.Module) -> Graphs | None:
    """Returns the graphs of a run's device; None where the run asks for none.

    Args:
        options: the run's.
        world: the ranks.
        learner: takes the steps.
        module: the net.

    Raises:
        UsageError: it asks for them, and cannot have them.
    """
    if not options.cuda_graph:
        return None
    graphs = graphs_of(world.device)
    if graphs is None:
        raise UsageError(
            f"train.cuda_graph=true needs a CUDA GPU, and this rank computes on {world.device.type}. Set "
            "train.cuda_graph=false.",
            on_all_ranks=True,
        )
    what = _unsupported(world, learner, module)
    if what:
        raise UsageError(f"train.cuda_graph {what}, {OFF}", on_all_ranks=True)
    return graphs


def _unsupported(world: World, learner: Learner, module: nn.Module) -> str:
    if world.size > 1:
        return (
            f"is for one rank, and there are {world.size}: what the ranks send each other is not captured yet. Start "
            "one rank (-n 1)"
        )
    if learner.scaler is not None:
        return "cannot have fp16, whose loss scale the CPU reads at each step. Use train.precision=bf16"
    if learner.replica.clock is not None:
        return "and train.compile exclude each other. Set train.compile=false"
    if learner.finite.skips:
        return "cannot have train.nan=skip, for which the CPU reads each loss. Use train.nan=stop or ignore"
    return _unsupported_part(module)


def _unsupported_part(module: nn.Module) -> str:
    for name, part in module.named_modules():
        if type(part).__name__ == "OptimizedModule" or part._compiled_call_impl is not None:
            return f"cannot have {name or 'a model'} compiled by torch.compile. Remove torch.compile"
        if isinstance(part, nn.RNNBase) and part.dropout > 0:
            return (
                f"cannot have the dropout within {name or 'the model'} ({type(part).__name__}), whose random numbers a "
                "graph would repeat. Set its dropout=0 and put nn.Dropout between layers"
            )
    return ""


def check_values(values: dict[str, Value], rank_batch: RankBatch, device: torch.device) -> None:
    """Whether what a step returns has its values on the device, where a graph writes new ones.

    Raises:
        StepError: it has not.
    """
    if isinstance(values["loss"], Mean) and not (rank_batch.first and rank_batch.last):
        raise refusal(
            "",
            "returns its loss as dtrain.Mean, with train.accumulation: its count is that of several graphs",
            "Return the mean of the batch, set train.accumulation=1, ",
        )
    for name, value in values.items():
        if not all(isinstance(part, Tensor) and part.device == device for part in _parts(value)):
            raise refusal(
                "",
                f"returns {name!r} as a Python number, or with one, or as a tensor of another device than {device}; a "
                "graph would return that of one step for all",
                "Return a tensor that is computed on the device, or leave it out, ",
            )


def _parts(value: Value) -> tuple[Any, ...]:
    if isinstance(value, Mean):
        return value.total, value.count
    return (*value.arguments, *value.keywords.values()) if isinstance(value, Observed) else (value,)


@contextmanager
def reworded() -> Iterator[None]:
    """While inside, what torch or CUDA say of an operation that no graph can have gets the user's line, and advice.

    Raises:
        StepError: they said something of it.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not any(word in text for word in ("synchroniz", "captur", "CUDA graph", "cudaErrorStreamCapture")):
            raise
        place, trace = "", error.__traceback__
        while trace is not None:
            if place_of(trace.tb_frame).startswith(f"{trace.tb_frame.f_code.co_filename}:"):
                place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
            trace = trace.tb_next
        raise refusal(
            place,
            "does something that a CUDA graph cannot have, such as waiting for the device (.item(), .cpu(), print() of "
            f"a tensor, a copy from the CPU): {text.splitlines()[0]}",
            "Keep what it does on the device, ",
        ) from error


def refuse_imperative(kind: Kind) -> None:
    """Refuses a step that calls its optimizer itself, once it has shown that it does.

    Raises:
        UsageError: it does.
    """
    if kind == "imperative":
        raise UsageError(
            "train.cuda_graph: the train step calls backward() and optimizer.step() itself. Return the loss with its "
            "graph and leave zero_grad(), backward() and step() to dtrain, or set train.cuda_graph=false."
        )
