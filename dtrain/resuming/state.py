"""Everything that a run goes on from: taken from an engine, and put back into one.

Three parts: the net's weights; what is the same on all ranks (optimizers, schedules, history, place); and what each
rank has of its own (random streams, sums of the epoch that runs).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.bounds import Start, Trained
from dtrain.engine import Engine
from dtrain.errors import CheckpointError, UsageError
from dtrain.fsdp.tensors import cut_like, cut_state
from dtrain.learning import Task
from dtrain.metrics import PassResult, add_up
from dtrain.optimizers import all_optimizers
from dtrain.seeding import derive, load_random_state, random_state, seed_everything

State = dict[str, Any]


# --- taken ----------------------------------------------------------------------------------------------


def run_state(engine: Engine) -> State:
    """Returns what is the same on all ranks besides the weights; as rank 0 has it."""
    task, place = engine.task, engine.place
    return {
        "epoch": place.epoch,
        "step": place.step if place.split == "train" else None,
        "updates": place.updates,
        "seconds": engine.watch.so_far,
        "aside": engine.watch.aside,
        "untimed": engine.watch.untimed,
        "rows": engine.history.rows,
        "validations": engine.validations.rows,
        "names": engine.names,
        "valid_names": None if engine.valid is None else engine.valid.names,
        "rate": engine.rates.rate,
        "averages": engine.learner.replica.averages,
        "optimizers": [_optimizer_state(optimizer, task) for optimizer in engine.learner.optimizers()],
        "scheduler": None if task.scheduler is None else _kept(task.scheduler),
        "others": {name: _kept(other) for name, other in task.others.items()},
        "buffers": _other_buffers(task.module),
        "trained weights": None if engine.average is None else engine.average.trained(),
    }


def rank_state(engine: Engine) -> State:
    """Returns what this rank has of its own."""
    within = engine.place.split == "train" and engine.table is not None
    return {
        "random": random_state(engine.world.device),
        "order": engine.order_state if within else [generator.get_state() for generator in engine.generators()],
        "table": engine.table.state() if within and engine.table is not None else None,
    }


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


def _optimizer_state(optimizer: Optimizer, task: Task) -> State:
    return {**_kept(optimizer), "holds": holds(optimizer, task.module), "own": optimizer is task.optimizer}


def holds(optimizer: Optimizer, module: nn.Module) -> list[list[str]]:
    """Returns the names of an optimizer's parameters, group by group; shapes, of those that are not the net's."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        [names.get(id(p), f"a parameter of shape {tuple(p.shape)}") for p in group["params"]]
        for group in optimizer.param_groups
    ]


def _other_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers that are not in the net's `state_dict()`, which training may have changed all the same."""
    kept = module.state_dict().keys()
    return {name: buffer.detach() for name, buffer in module.named_buffers() if name not in kept}


# --- put back -------------------------------------------------------------------------------------------


def restore(engine: Engine, weights: Mapping[str, Tensor], run: State, ranks: list[State]) -> None:
    """Puts a saved state into an engine that fits it (`dtrain.resuming.fitting`).

    Args:
        engine: it has not trained yet.
        weights: the net's.
        run: what `run_state` returned.
        ranks: what `rank_state` returned, of each rank that there was.
    """
    task = engine.task
    own = task.module.state_dict()
    cut = {name: cut_like(value, own[name]) if name in own else value for name, value in weights.items()}
    task.module.load_state_dict(cut, strict=False)
    if engine.average is not None:
        engine.average.take_up(run["trained weights"], run["updates"])
    buffers = dict(task.module.named_buffers())
    for name, value in run["buffers"].items():
        if name in buffers and buffers[name].shape == value.shape:
            buffers[name].copy_(value)
    optimizers = find_optimizers(run["optimizers"], task)
    for optimizer, saved in zip(optimizers, run["optimizers"], strict=True):
        load_optimizer(optimizer, saved["state"])
    engine.learner.knows(optimizers)
    if task.optimizer is None and optimizers:  # as at the end of the first epoch
        task.optimizer = optimizers[0]
    if task.scheduler is not None:
        task.scheduler.load_state_dict(run["scheduler"]["state"])
    for name, saved in run["others"].items():
        task.others[name].load_state_dict(saved["state"])
    engine.names, engine.rates.rate = run["names"], run["rate"]
    if engine.valid is not None:
        engine.valid.names = run["valid_names"]
    if "averages" in run:
        engine.learner.replica.resume(run["averages"])
    engine.place.updates = run["updates"]
    engine.start = _start(engine, run, ranks)
    engine.stopping = engine.spent and engine.start.skip == 0 and engine.start.trained is None


def _start(engine: Engine, run: State, ranks: list[State]) -> Start:
    world, within = engine.world, run["step"] is not None
    epoch, skip = (run["epoch"], run["step"]) if within else (run["epoch"] + 1, 0)
    trained = _trained(run.get("trained"))
    if trained is not None:
        within, skip = False, 0
    same = len(ranks) == world.size
    mine = ranks[world.rank] if same else ranks[0]
    for generator, state in zip(engine.generators(), mine["order"], strict=True):
        generator.set_state(state)
    table = mine["table"]
    if not same and within:
        table = add_up([rank["table"] for rank in ranks])
        table |= {} if world.is_main else {"samples": 0, "sums": {}}

    def randomness() -> None:
        if same:
            load_random_state(mine["random"], world.device)
        else:  # the streams are each rank's own; those of other ranks are nobody's
            seed_everything(derive(engine.seed, "rank", world.rank, "of", world.size, "from", epoch, skip))

    times = {name: run.get(name, 0) for name in ("seconds", "aside", "untimed") if within}
    return Start(epoch, skip, table, **times, randomness=randomness, trained=trained)


def _trained(saved: State | None) -> Trained | None:
    return None if saved is None else Trained(PassResult(**saved["result"]), saved["steps"])


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
    return [task.optimizer if one["own"] and task.optimizer is not None else _found(one, task) for one in saved]


def _found(saved: State, task: Task) -> Optimizer:
    alike = [
        thing
        for thing in all_optimizers()
        if type(thing).__qualname__ == saved["kind"] and holds(thing, task.module) == saved["holds"]
    ]
    if len(alike) != 1:
        names = [name for group in saved["holds"] for name in group]
        raise CheckpointError(
            f"the checkpoint has the state of an optimizer {saved['kind']} of {', '.join(names[:3])}"
            f"{', ...' * (len(names) > 3)}, and the recipe has {len(alike) or 'none'} of this kind. "
            "Make one, before training begins: as model.optimizer, or when the recipe is imported."
        )
    found: Optimizer = alike[0]
    return found


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
