"""Everything that a run goes on from: taken from an engine, and put back into one.

Three parts: the net's weights; what is the same on all ranks (optimizers, schedules, history, place); and what each
rank has of its own (random streams, sums of the epoch that runs).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.checkpoint.extra import extra_keys, load_extra
from dtrain.checkpoint.optimizer_roles import (
    REMEDY,
    distinguish,
    is_first,
    put_gradients_back,
    role_of,
    use_own,
    waiting_gradients,
)
from dtrain.checkpoint.sources import kept_state, load_datasets, load_kept, replay_epochs, validation_of
from dtrain.checkpoint.tensors import storable
from dtrain.checkpoint.trainable import beginning_of, changed_learning, held_at_first, holds, regroup, set_learning
from dtrain.distributed.dtensor import cut_like, cut_state
from dtrain.distributed.seeding import derive, load_random_state, random_state, seed_everything
from dtrain.engine.call_hooks import state_of_hooks
from dtrain.engine.loop import Engine
from dtrain.engine.metrics import PassResult, add_up
from dtrain.engine.position import FinishedPass, StartPosition
from dtrain.engine.random_draws import StepDraws
from dtrain.engine.train_step import Task
from dtrain.engine.valid_loaders import split_of
from dtrain.errors import CheckpointError, UsageError
from dtrain.model.optimizers import all_optimizers

State = dict[str, Any]


# --- taken ----------------------------------------------------------------------------------------------


def run_state(engine: Engine) -> State:
    """Returns what is the same on all ranks besides the weights; as rank 0 has it."""
    task, place = engine.task, engine.place
    return {
        "epoch": place.epoch,
        "step": place.step if place.split == "train" else None,
        "updates": place.updates,
        "data": engine.train_loader.position,
        "seconds": engine.watch.so_far,
        "aside": engine.watch.aside,
        "untimed": engine.watch.untimed,
        "rows": engine.history.rows,
        "validations": engine.validations.rows,
        "in eval mode": engine.modes.state(within=_is_within(engine)),
        "ended": [engine.ended, engine.epochs] if engine.stopping and not engine.ended_by else None,
        "names": engine.names,
        "valid_names": None if engine.valid is None else engine.valid.names,
        "rate": engine.rates.rate,
        "averaging": engine.learner.replica.averages,
        "optimizers": [_optimizer_state(one, engine) | role_of(one, engine) for one in engine.learner.optimizers()],
        "learns": changed_learning(engine),
        "gradients": waiting_gradients(engine),
        "scheduler": None if task.scheduler is None else _kept(task.scheduler),
        "others": {name: _kept(other) for name, other in task.others.items()},
        "buffers": other_buffers(task.module),
        "trained weights": None if engine.average is None else engine.average.trained(),
        "averages": {} if engine.average is None else engine.average.exact(),
        "averaged": None if engine.average is None else engine.average.taken,
    }


def rank_state(engine: Engine) -> State:
    """Returns what this rank has of its own."""
    within, hooks = _is_within(engine), state_of_hooks(engine)
    reading = within or engine.train_loader.position is not None  # a pass over the training data runs
    began = engine.train_loader.order_state if reading else {}
    return {
        "asks for an end": None if hooks is None else hooks.reason,
        "random": random_state(engine.world.device),
        "order": [began.get(id(generator), generator.get_state()) for generator in engine.generators()],
        "table": engine.table.state() if within and engine.table is not None else None,
        **kept_state(engine, within=reading),
        "draws": engine.draws.used if reading and engine.draws is not None else None,
        "rows": {split: draws.evidence.state() for split, draws in engine_draws(engine).items()},
    }


def _is_within(engine: Engine) -> bool:
    """Whether a train pass runs."""
    return engine.place.split == "train" and engine.table is not None


def engine_draws(engine: Engine) -> dict[str, StepDraws]:
    """Returns what leads the random numbers of the steps, by split."""
    found = {"train": engine.draws} | {split_of(part.name): part.draws for part in validation_of(engine)}
    return {split: draws for split, draws in found.items() if draws is not None}


def weights_state(engine: Engine) -> dict[str, Tensor]:
    """Returns the net's weights and buffers, where they are: those that validation has, averaged where that is so."""
    module, averaged = engine.task.module, {} if engine.average is None else engine.average.weights()
    first = {id(parameter): name for name, parameter in module.named_parameters()}  # of the names that tied ones have
    return {
        name: averaged.get(first.get(id(value), name), value.detach())
        for name, value in module.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    }


def _kept(thing: Any) -> State:
    return {"kind": type(thing).__qualname__, "state": thing.state_dict()}


def _optimizer_state(optimizer: Optimizer, engine: Engine) -> State:
    task = engine.task
    held = {"holds": holds(optimizer, task.module), "held": held_at_first(engine, optimizer)}
    return {**_kept(optimizer), **held, "own": optimizer is task.optimizer}


def other_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers that are not in the net's `state_dict()`, which training may have changed all the same.

    Sparse ones are left out: the recipe makes them.
    """
    kept = module.state_dict().keys()
    return {name: buffer.detach() for name, buffer in module.named_buffers() if name not in kept and storable(buffer)}


# --- put back -------------------------------------------------------------------------------------------


def restore(engine: Engine, weights: Mapping[str, Any], run: State, ranks: list[State]) -> None:
    """Puts a saved state into an engine that fits it (`dtrain.checkpoint.compat`).

    Args:
        engine: it has not trained yet.
        weights: the net's.
        run: what `run_state` returned.
        ranks: what `rank_state` returned, of each rank that there was.
    """
    task = engine.task
    beginning_of(engine)
    set_learning(task.module, run.get("learns", {}))
    own, extra = task.module.state_dict(), extra_keys(task.module)
    cut = {
        name: cut_like(value, own[name]) if name in own and name not in extra else value
        for name, value in load_extra(task.module, weights).items()
    }
    task.module.load_state_dict(cut, strict=False)
    if engine.average is not None and run["trained weights"] is not None:
        engine.average.take_up(run["trained weights"], run.get("averages", {}), run["updates"], run.get("averaged"))
    load_buffers(task.module, run["buffers"])
    optimizers = find_optimizers(run["optimizers"], task)
    for optimizer, saved in zip(optimizers, run["optimizers"], strict=True):
        regroup(optimizer, saved["holds"], task.module)
        load_optimizer(optimizer, saved["state"])
    engine.learner.knows(optimizers)
    use_own(task, optimizers, run["optimizers"])
    put_gradients_back(engine, run.get("gradients", {}))
    if task.optimizer is None and optimizers:  # as at the end of the first epoch
        task.optimizer = optimizers[0]
    if task.scheduler is not None:
        task.scheduler.load_state_dict(run["scheduler"]["state"])
    for name, saved in run["others"].items():
        task.others[name].load_state_dict(saved["state"])
    engine.names, engine.rates.rate = run["names"], run["rate"]
    if engine.valid is not None:
        engine.valid.names = run["valid_names"]
    if "in eval mode" in run:
        engine.modes.load(run["in eval mode"])
    if "averaging" in run:
        engine.learner.replica.resume(run["averaging"])
    engine.place.updates = run["updates"]
    engine.start = _start(engine, run, ranks)
    engine.stopping = engine.spent and engine.start.skip == 0 and engine.start.trained is None
    _resume_end(engine, run, ranks)


def _resume_end(engine: Engine, run: State, ranks: list[State]) -> None:
    """Ends training where a hook has ended it, or does so after the epoch in which one has asked for it."""
    hooks = state_of_hooks(engine)
    if hooks is not None and (run["step"] is not None or run.get("trained") is not None):
        hooks.reason = next((one["asks for an end"] for one in ranks if one.get("asks for an end")), None)
    ended, epochs = run.get("ended") or (None, 0)
    if ended is not None and epochs == engine.epochs:  # by a hook; with more epochs it is resumed
        engine.stop(ended)


@torch.no_grad()
def load_buffers(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Puts back the buffers that are not in the net's `state_dict()`; one may have come or changed its size since."""
    there = dict(module.named_buffers())
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    for name, value in saved.items():
        known = there.get(name)
        if known is not None and known.shape == value.shape and known.dtype == value.dtype:
            known.copy_(value)
            continue
        path, _, leaf = name.rpartition(".")
        module.get_submodule(path).register_buffer(
            leaf, value.to(device if known is None else known.device), persistent=False
        )


def _start(engine: Engine, run: State, ranks: list[State]) -> StartPosition:
    world, within = engine.world, run["step"] is not None
    epoch, skip = (run["epoch"], run["step"]) if within else (run["epoch"] + 1, 0)
    trained = _trained(run.get("trained"))
    if trained is not None:
        within, skip = False, 0
    same = len(ranks) == world.size
    mine = ranks[world.rank] if same else ranks[0]
    for generator, state in zip(engine.generators(), mine["order"], strict=True):
        generator.set_state(state)
    engine.train_loader.resume(run.get("data"))
    replay_epochs(engine, epoch, trained=trained is not None)
    load_kept(engine, mine if same else {**mine, "place": None})
    if engine.draws is not None:
        engine.draws.used = mine.get("draws")
    for split, draws in engine_draws(engine).items():
        draws.evidence.load(mine.get("rows", {}).get(split, ()))
    table = mine["table"]
    if not same and within:
        table = add_up([rank["table"] for rank in ranks])
        table |= {} if world.is_main else {"samples": 0, "sums": {}}

    def randomness() -> None:
        load_datasets(engine, mine)
        if same:
            load_random_state(mine["random"], world.device)
        else:  # the streams are each rank's own; those of other ranks are nobody's
            seed_everything(derive(engine.options.seed, "rank", world.rank, "of", world.size, "from", epoch, skip))

    times = {name: run.get(name, 0) for name in ("seconds", "aside", "untimed") if within}
    return StartPosition(epoch, skip, table, **times, randomness=randomness, trained=trained)


def _trained(saved: State | None) -> FinishedPass | None:
    return None if saved is None else FinishedPass(PassResult(**saved["result"]), saved["steps"])


def load_optimizer(optimizer: Optimizer, state: State) -> None:
    """Loads an optimizer's state as it was, to the last bit.

    torch gives a floating-point state its parameter's type, which would round one that was kept more exactly.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    held = dict(zip(numbers, parameters, strict=True))
    cut = {number: cut_state(kept, held[number]) if number in held else kept for number, kept in state["state"].items()}
    optimizer.load_state_dict({**state, "state": cut})
    for number, parameter in held.items():
        for name, saved in cut.get(number, {}).items():
            loaded = optimizer.state[parameter][name]
            if isinstance(saved, Tensor) and loaded.dtype != saved.dtype:
                optimizer.state[parameter][name] = saved.to(loaded.device)


def find_optimizers(saved: list[State], task: Task) -> list[Optimizer]:
    """Returns the optimizers that were saved, in that order: the task's own, and those that its step alone knows.

    Raises:
        CheckpointError: one is not to be found, or there are two of a kind that hold the same parameters.
    """
    return [task.optimizer if is_first(one, task) else _found(one, task) for one in saved]  # type: ignore[misc]


def _found(saved: State, task: Task) -> Optimizer:
    alike = [
        thing
        for thing in all_optimizers()
        if type(thing).__qualname__ == saved["kind"] and holds(thing, task.module) == at_first(saved)
    ]
    alike = distinguish(alike, saved, task)
    if len(alike) != 1:
        names = [name for group in at_first(saved) for name in group]
        raise CheckpointError(
            f"the checkpoint has the state of an optimizer ({saved['kind']}) of {', '.join(names[:3])}"
            f"{', ...' * (len(names) > 3)}, and the recipe has {len(alike) or 'none'} of this kind. {REMEDY}"
        )
    found: Optimizer = alike[0]
    return found


def at_first(saved: State) -> list[list[str]]:
    """Returns what a saved optimizer held at the beginning of the run."""
    held: list[list[str]] = saved["held"] if "held" in saved else saved["holds"]  # older ones lack the first
    return held


def check_order(engine: Engine, rank: State) -> None:
    """Compares the number of the loaders' own generators with the saved one.

    Raises:
        UsageError: they differ, so that the order of the samples would.
    """
    here, there = len(engine.generators()), len(rank["order"])
    if here != there:
        raise UsageError(
            f"the checkpoint was saved with {there} generators given to the loaders, and the recipe now gives {here}."
        )
