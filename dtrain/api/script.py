"""The script style: helpers for a loop that is written out by hand, each usable on its own.

::

    net, dl_train, dl_valid = dtrain.prepare(net, dl_train, dl_valid)
    history = dtrain.History("history.csv")
    for epoch in range(1, epochs + 1):
        net.train()
        train = dtrain.Meter()
        for features, labels in dl_train:
            ...                                  # zero_grad, net(features), backward, step: as ever
            train.add(loss=loss, accuracy=accuracy)
        net.eval()
        valid = dtrain.Meter()
        for features, labels in dl_valid:
            ...
            valid.add(loss=loss, accuracy=accuracy)
        row = {"epoch": epoch, **train.means(), **valid.means("val_")}
        history.append(row)
        dtrain.save_weights(net, "checkpoints", row)
        dtrain.print_main(row)

It runs as it is without a launcher, as one rank, and with `dtrain launch -n N SCRIPT.py` on N.
Every rank runs the whole script; none may skip a loop, a `means()` or a `save_weights()`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, Subset, TensorDataset

from dtrain.api.prepared import PROCESS, PreparedLoader
from dtrain.data.batches import BatchFunctions
from dtrain.data.loader import is_own
from dtrain.data.partition import BatchMode
from dtrain.data.rank_shards import DataSharding, check_data_sharding
from dtrain.distributed.consistency import check_optimizers, check_same_task
from dtrain.distributed.fsdp_settings import refuse_sharding
from dtrain.distributed.seeding import derive, seed_everything
from dtrain.distributed.world import World
from dtrain.engine.metrics import MeanTable, Value
from dtrain.engine.step_contract import StepValues
from dtrain.errors import AgreedError, Failure, UsageError
from dtrain.launch.monitor.describe import describe
from dtrain.model.attributes import check_materialized
from dtrain.model.gradients.averaging import Way, check_way
from dtrain.model.optimizers import place_states
from dtrain.model.untracked_batchnorm import warn_of_parts
from dtrain.wording import number

_COMPARED_ROWS = 64


def prepare(  # noqa: PLR0913 - keyword-only after what is prepared
    model: nn.Module,
    *others: Any,
    batch: BatchMode = "per_rank",
    batch_size: Callable[[Any], int] | None = None,
    split_batch: Callable[[Any, list[int]], Any] | None = None,
    data_sharding: DataSharding = "auto",
    same_draws: bool | None = None,
    seed: int = 42,
    average: Way = "auto",
    fetch_batches: bool = True,
    cpu: bool = False,
) -> tuple[Any, ...]:
    """Makes a net and its loaders fit for the ranks that this process is one of.

    The net is moved to the rank's device, and with it what optimizers keep of its parameters. It comes back as the same
    object: not wrapped, its attributes, its type and the names in its `state_dict()` as they are. In a training pass
    (see `dtrain.api.prepared`) its calls go through DistributedDataParallel. Each pass over a loader that comes back
    draws a new order, the same one on any number of ranks, and deals each sample to one rank.

    Args:
        model: the net.
        others: its loaders (DataLoader or any iterable of batches), each of which comes back prepared; and its
            optimizers, which are checked and come back as they are. Make optimizers from `model.parameters()`.
        batch: "per_rank": the loaders' batch size is each rank's; "global": it is the whole world's.
        batch_size, split_batch: as in `dtrain.train_model`.
        data_sharding: who shards loaders without indices (streams), as in `dtrain.train_model`.
        same_draws: whether dropout and other random numbers in loops over the loaders are those that one rank draws for
            the same global batch; by default, with batch "global". Not in a loop within another one's body.
        seed: the order of the samples and each rank's random stream are derived from it.
        average: how several ranks average their gradients, as in `dtrain.train_model`; for all nets of the process.
        fetch_batches: whether whole batches are fetched at once where that gives the same; see `dtrain.data.fetch`.
        cpu: compute on the CPU also where there is an accelerator.

    Returns:
        the net and the others, in the order of the arguments.

    Raises:
        UsageError: an argument is none of these, or the ranks' nets or data differ.
        WorldError: the ranks did not come up as launched.
        StepError: an optimizer has none of the model's parameters, or others' besides on several ranks.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"the first argument of prepare is a {type(model).__name__}: pass the model (an nn.Module).")
    if same_draws not in (None, True, False):
        raise UsageError(f"same_draws = {same_draws!r}: should be True, False or None.")
    if batch not in ("per_rank", "global"):
        raise UsageError(f"batch = {batch!r}: should be 'per_rank' or 'global'.")
    check_data_sharding(data_sharding)
    check_way(average)
    for position, other in enumerate(others, start=2):
        _check_other(other, position)
    check_materialized(model)
    world = PROCESS.joined(cpu=cpu)
    refuse_sharding(world.sharding, world.size, "dtrain.prepare")
    loaders = {f"argument {n}'s": o for n, o in enumerate(others, start=2) if not isinstance(o, Optimizer)}
    how: dict[str, Any] = {"batch": batch, "functions": BatchFunctions(batch_size, split_batch), "seed": seed}
    how |= {"fetch_batches": fetch_batches, "same_draws": same_draws, "sharding": data_sharding}
    own = [n for n, o in loaders.items() if is_own(o, n, world.rank, world.size, data_sharding)]
    check_same_task(world, model, loaders, own)
    _check_same_data(world, {name: loader for name, loader in loaders.items() if name not in own})
    optimizers = [other for other in others if isinstance(other, Optimizer)]
    check_optimizers(optimizers, model, world.size)
    replica = PROCESS.replica_of(model, average)
    warn_of_parts(model, world, "Track running statistics, or use functions or Keras with sync_batchnorm=True.")
    place_states(model, optimizers)
    seed_everything(derive(seed, "rank", world.rank))
    return (
        model,
        *(
            other if isinstance(other, Optimizer) else PreparedLoader(other, replica, PROCESS, **how)
            for other in others
        ),
    )


def _check_other(other: Any, position: int) -> None:
    what = f"argument {position} of prepare is "
    if isinstance(other, nn.Module):
        raise UsageError(f"{what}a second model. Call prepare once per model, each with its own loaders.")
    if isinstance(other, PreparedLoader) or type(other).__module__.startswith("accelerate."):
        raise UsageError(f"{what}already prepared ({type(other).__name__}). Pass your own loader or optimizer.")
    if isinstance(other, Dataset):
        raise UsageError(
            f"{what}a dataset ({type(other).__name__}), which yields single samples. "
            "Wrap it: DataLoader(dataset, batch_size=32)."
        )
    if not isinstance(other, Optimizer) and not hasattr(other, "__iter__"):
        raise UsageError(
            f"{what}a {type(other).__name__}: pass loaders and optimizers only. A learning-rate scheduler needs "
            "no preparation: it counts steps or epochs, which are the same on every rank."
        )


def _check_same_data(world: World, loaders: dict[str, Any]) -> None:
    """Finds data that each rank has drawn for itself, as by random_split without a seed.

    Raises:
        UsageError: they differ; every rank raises it.
    """
    told = world.gather_json([_mark(getattr(loader, "dataset", None)) for loader in loaders.values()])
    for index, name in enumerate(loaders):
        if len({marks[index] for marks in told}) > 1:
            raise UsageError(
                f"{name} samples are not the same on all ranks. If they are drawn at random, as by random_split, "
                "call torch.manual_seed(...) before that, with the same seed on every rank.",
                on_all_ranks=True,
            )


def _mark(dataset: Any) -> int:
    """A number that differs where the kinds of data differ that scripts draw by themselves; 0 for others."""
    if isinstance(dataset, Subset):
        return zlib.crc32(repr(list(dataset.indices)).encode()) ^ _mark(dataset.dataset)
    if isinstance(dataset, TensorDataset):
        rows = [tensor[:_COMPARED_ROWS].detach().cpu().double().numpy() for tensor in dataset.tensors]
        return zlib.crc32(b"".join(np.ascontiguousarray(part).tobytes() for part in rows))
    return 0


class Meter:
    """Exact means over the samples of all ranks: sums and counts are kept, and divided once.

    Make a new one for each pass. `str(meter)` shows the means so far, for a line of progress.

    Attributes:
        table: the sums.
    """

    def __init__(self) -> None:
        self.table = MeanTable("metered")
        self._values_of = StepValues(None, "metered")

    def add(self, *, count: int | None = None, **values: Value) -> None:
        """Adds one batch.

        Args:
            count: its number of samples. Inside a loop over a prepared loader it is known and best left
                out: there, a filler batch, which only keeps the ranks together, adds nothing.
            values: name -> the mean over the batch's samples: a float or a tensor with one element; or
                `dtrain.Mean(total, count)` where the number of samples is not the right weight.

        Raises:
            UsageError: there is no count, or it is no number of samples.
            StepError: a value is no number, or the names are not those of the batches before.
        """
        if not values:
            raise UsageError("meter.add() got no value: write, for example, meter.add(loss=loss).")
        if count is None:
            share = PROCESS.rank_batch()
            if share is None:
                raise UsageError(
                    "meter.add() outside of a loop over a prepared loader cannot know the number of samples: write "
                    "meter.add(count=len(features), ...), or loop over a loader returned by dtrain.prepare."
                )
            count = share.count
        elif isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise UsageError(f"meter.add(count={count!r}): should be a number of samples.")
        if PROCESS.run is not None:
            PROCESS.run.metered(self, adds=True)
        self.table.add(self._values_of(values), count)

    def running(self) -> dict[str, float]:
        """Returns this rank's means so far, without the other ranks'; empty before the first sample."""
        return self.table.running()

    def __str__(self) -> str:
        return ", ".join(f"{name}: {number(mean)}" for name, mean in self.running().items())

    def means(self, prefix: str = "") -> dict[str, float]:
        """Adds up over the ranks and returns the means, the same on every rank.

        Every rank must call it, also one that had no sample; what is added later counts from there on.

        Args:
            prefix: goes before each name, such as "val_".

        Raises:
            DataError: no rank had a sample.
            StepError: the ranks added values of different names.
        """
        if PROCESS.run is not None:
            PROCESS.run.metered(self, adds=False)
        result, _ = self.table.reduce(PROCESS.joined(cpu=False), 0.0)
        return {prefix + name: mean for name, mean in result.means.items()}


def save_weights(model: nn.Module, folder: str | Path, row: dict[str, Any]) -> Path:
    """Saves an epoch's weights as `folder/epoch-N/model.safetensors`; rank 0 writes, all wait until it is on disk.

    Kept are the last epoch and the best one (lowest `val_loss`, else `loss`). Every rank must call it.

    Args:
        model: the net.
        folder: where the epochs' folders go; each run needs one of its own.
        row: the epoch's row of the history, with `epoch` in it; it is kept beside the weights.

    Returns:
        the epoch's folder.

    Raises:
        UsageError: the row has no `epoch`.
        AgreedError: rank 0 could not write, or the folder holds epochs of another run, or this one or a later one of
            this process's; every rank raises it.
    """
    if "epoch" not in row:
        raise UsageError(f"save_weights: the row ({', '.join(row) or 'empty'}) has no epoch: add 'epoch': epoch to it.")
    world = PROCESS.joined(cpu=False)
    final = Path(folder) / f"epoch-{row['epoch']}"
    failure = _attempt(model, Path(folder), final, row) if world.is_main else None
    told = world.gather_json(None if failure is None else asdict(failure))[0]
    if told is not None:
        raise AgreedError([Failure(**told)])
    return final


def _attempt(model: nn.Module, folder: Path, final: Path, row: dict[str, Any]) -> Failure | None:
    """Writes, and returns in words what hinders it: the other ranks must not wait for a write that failed."""
    from dtrain.checkpoint import save_epoch

    try:
        folder = folder.resolve()
        own = PROCESS.saved.get(folder)
        _check_folder(folder, final, own)
        own = PROCESS.saved.setdefault(folder, set())
        own.add(save_epoch(folder, model, row, own))
    except Exception as error:  # noqa: BLE001 - it is told to all ranks and raised there
        text, exit_code = describe(error)
        # The rank that raises it puts the prefix before it.
        return Failure(0, text.removeprefix("dtrain: error: "), exit_code, type(error).__name__)
    return None


def _check_folder(folder: Path, final: Path, own: set[Path] | None) -> None:
    """Refuses to mix two runs in one folder: the best epoch of one would put the other's out of the way.

    Raises:
        UsageError: there are epochs that this process has not saved, or this one or a later one that it has.
    """
    from dtrain.layout import checkpoint_place, checkpoints_in

    there, place = checkpoints_in(folder), checkpoint_place(final.name)
    foreign = [path.name for path in there if path not in (own or ())]
    if own is None and foreign:
        raise UsageError(
            f"save_weights: {final.parent} contains the weights of an earlier run ({', '.join(foreign)}), which are "
            "not overwritten. Use a separate folder for this run, or move them first."
        )
    if final.exists():
        raise UsageError(f"save_weights: {final} already exists and is not overwritten. Choose another folder.")
    later = [path.name for path, other in there.items() if path in (own or ()) and place and other[0] > place[0]]
    if later:
        raise UsageError(
            f"save_weights: {final.name} comes after {later[-1]} in {final.parent}: do the epochs start over? "
            "Use a separate folder for each run."
        )
