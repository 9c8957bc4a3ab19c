"""The function style: `train_model`, with the tutorial's five arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from dtrain.api.clean_errors import clean_in_notebooks
from dtrain.api.in_run import CallRun, call_run, run_of_call, train_in_run
from dtrain.api.spawn.call import call_on_ranks, starts_ranks
from dtrain.callbacks.progress import fed, progress_of
from dtrain.config.calls import TRAIN_MODEL
from dtrain.data.batches import BatchFunctions
from dtrain.data.device_data import DataOnDevice
from dtrain.data.loader_group import Combine, grouped
from dtrain.data.partition import BatchMode
from dtrain.data.rank_shards import DataSharding
from dtrain.distributed.fsdp_settings import refuse_sharding
from dtrain.distributed.world import World, bring_up
from dtrain.engine.arguments import check_switch, check_whole
from dtrain.engine.call_hooks import call_hooks
from dtrain.engine.callback import Callbacks, EngineCallback
from dtrain.engine.hooks import check_callbacks, hooks_of, states_of
from dtrain.engine.loop import Engine
from dtrain.engine.monitored import check_plateau
from dtrain.engine.options import RunOptions
from dtrain.engine.schedules import check_total_steps
from dtrain.engine.step_contract import Step
from dtrain.engine.synced_metrics import check_metrics
from dtrain.engine.train_step import Interval, Task
from dtrain.errors import UsageError
from dtrain.model.compile import Compile
from dtrain.model.gradients.averaging import Way
from dtrain.model.precision import Precision
from dtrain.trainer.messages import say_banner

if TYPE_CHECKING:
    import pandas as pd


def tutorial_train_step(model: Any, features: Any, labels: Any) -> tuple[Any, Any]:
    """The tutorial's train step, for a net that carries loss_func, metric_func and optimizer."""
    model.train()
    model.optimizer.zero_grad()
    predictions = model(features)
    loss = model.loss_func(predictions, labels)
    metric = model.metric_func(predictions, labels)
    loss.backward()
    model.optimizer.step()
    return loss.detach(), metric


def tutorial_valid_step(model: Any, features: Any, labels: Any) -> tuple[Any, Any]:
    """The tutorial's valid step, for a net that carries loss_func and metric_func."""
    predictions = model(features)
    return model.loss_func(predictions, labels), model.metric_func(predictions, labels)


@clean_in_notebooks
def train_model(  # noqa: PLR0913 - the tutorial's five; the rest are keyword-only
    model: nn.Module,
    epochs: int,
    dl_train: Any,
    dl_valid: Any = None,
    log_step_freq: int = 10,
    *,
    train_step: Step | None = None,
    valid_step: Step | None = None,
    optimizer: Optimizer | None = None,
    scheduler: Any = None,
    scheduler_interval: Interval = "epoch",
    scheduler_monitor: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    batch: BatchMode = "per_rank",
    combine: Combine | None = None,
    batch_size: Callable[[Any], int] | None = None,
    split_batch: Callable[[Any, list[int]], Any] | None = None,
    data_sharding: DataSharding = "auto",
    same_draws: bool | None = None,
    accumulation: int = 1,
    average: Way = "auto",
    sync_batchnorm: bool = False,
    fetch_batches: bool = True,
    data_on_device: DataOnDevice = "auto",
    prefetch_to_device: bool = True,
    precision: Precision | None = None,
    compile: Compile | None = None,
    cuda_graph: bool = False,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    ema_decay: float | None = None,
    swa_from: float | None = None,
    epoch_steps: int | None = None,
    seed: int = 42,
    valid_together: bool = False,
    callbacks: Any = None,
    verbose: bool | EngineCallback = True,
    cpu: bool = False,
    world: World | None = None,
    num_processes: int | None = None,
    run: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Trains a net with its steps, on as many ranks as the process was started as.

    Args:
        model: the net; it is changed in place. Without `train_step` it must carry the tutorial's attributes
            `loss_func`, `metric_func` and `optimizer`; `metric_name` names the metric.
        epochs: passes over the training data, at least 1.
        dl_train: loader of training batches: a DataLoader or any iterable of batches; or a mapping of names to several,
            with `combine`.
        dl_valid: loader of validation batches, or None; or a mapping of names to several, with the columns
            val_NAME_loss and so on.
        log_step_freq: train steps between two lines of plain output.
        train_step: `train_step(model, *batch) -> (loss, metric)` or a mapping; see `dtrain.engine.step_contract`.
        valid_step: the same for validation, without learning.
        optimizer: by default `model.optimizer`.
        scheduler: a torch learning-rate scheduler.
        scheduler_interval: whether the scheduler counts epochs or optimizer steps.
        scheduler_monitor: the column of the history that ReduceLROnPlateau watches; by default val_loss, without
            validation loss, with several validation loaders the first one's loss.
        metrics: name -> torchmetrics metric, computed once an epoch over all samples of all ranks; a step's value
            of that name is what it is updated with: `{"loss": loss, "auroc": (predictions, labels)}`.
        batch: "per_rank": the loaders' batch size is each rank's; "global": it is the whole world's.
        combine: with several training loaders, how their batches make steps: "min" (a batch of each, as a mapping,
            until the shortest loader ends), "max_cycle" (until the longest one ends, others beginning anew) or
            "alternate" (the loaders take turns); see docs/steps-and-recipes.md#several-training-loaders.
        batch_size: batch -> its number of samples, where a loader has no indices and it is not known by the batch.
        split_batch: (batch, sizes) -> a list of batches of so many samples each; for `batch="global"` on several ranks.
        data_sharding: who shards a loader without indices (a stream) over the ranks: the "loader" itself, each rank's
            part of it having batches of its own; "dtrain", which has every rank read all of it; or "auto", as the
            loader says (`set_rank`, `sharded_by_rank`, known libraries; see docs/recipes.md#streams).
        same_draws: whether dropout and other random numbers of steps are those that one rank draws for the same global
            batch; by default, with batch "global".
        accumulation: micro-batches that make one optimizer step.
        average: how several ranks average their gradients: by DistributedDataParallel ("ddp"), after each backward
            pass ("step"), which is right for any step, or as the first steps show ("auto").
        sync_batchnorm: whether BatchNorm takes its statistics, in training, over all ranks instead of each one's.
        fetch_batches: whether whole batches are fetched at once where that gives the same; see `dtrain.data.fetch`.
        data_on_device: whether the data of a `TensorDataset` (or a Subset of one) are kept on a CUDA GPU, where batches
            are then taken by index: the same batches, without a copy for each. "auto": where they fit into a tenth of
            its free memory; True: or an error that says why not; see docs/speed.md#on-a-gpu.
        prefetch_to_device: whether other batches are copied to a CUDA GPU on a stream of their own, beside the steps.
        precision: of the net's forward: "fp32", or mixed with "bf16" or "fp16" (for steps that return the loss with
            its graph); by default that of Accelerate's settings. The weights stay as they are.
        cuda_graph: experimental: whether each train step is captured in a CUDA graph and replayed, on one CUDA GPU, for
            steps that return the loss; what cannot be captured is an error. See
            docs/speed.md#one-graph-per-step-traincuda_graph.
        compile: whether the net's forward is compiled by torch.compile, or in which of its modes ("reduce-overhead",
            "max-autotune", "max-autotune-no-cudagraphs"); by default as Accelerate's settings say.
        clip_norm: the largest 2-norm of all gradients of an optimizer together, which are those of the whole batch.
        clip_value: the largest magnitude of each number of a gradient.
        ema_decay: of an exponential moving average of the weights (above 0, below 1), with which is validated, and
            which the net has in the end.
        swa_from: the share of the optimizer steps (above 0, below 1) after which the weights of all further steps are
            averaged equally (SWA), in place of `ema_decay`.
        epoch_steps: optimizer steps of an epoch, the next of which goes on with `dl_train` where this one has ended; by
            default an epoch is a pass over it.
        seed: the order of the samples and each rank's random stream are derived from it.
        valid_together: whether every rank takes part in every step of validation, as `dtrain.gather` in it needs.
        callbacks: `dtrain.Callback` objects, in a list; see docs/callbacks.md.
        verbose: whether rank 0 shows progress: in a notebook as a table and curves, on a terminal as bars, else as
            lines; or what is to show it, a `dtrain.engine.callback.EngineCallback`.
        cpu: compute on the CPU also where there is an accelerator.
        world: ranks that were brought up before, by default brought up here.
        num_processes: start this many ranks on this machine for the call, from a notebook, a prompt or a script
            that is no rank itself; with 1, as without, it trains in this process.
        run: a folder that keeps the run, such as "runs/first": config, history, checkpoints. The same call again
            resumes it, and returns the history of a complete one; see docs/checkpoints.md.
        config: with `run`, further keys of a run's config: `{"checkpoint.every_steps": 100}`; see docs/configs.md.

    Returns:
        `dfhistory` on every rank, a row an epoch: epoch, loss, METRIC, val_loss, val_METRIC, lr, seconds,
        samples_per_second. The means are over all samples of all ranks.

    Raises:
        UsageError: an argument is wrong, the ranks did not come up as launched, or `run` has another run.
        StepError: a step breaks the step contract.
        StopRequested: with `run`, training was asked to stop, and is saved.
        DataError: a loader yields nothing.
        RankError: a rank that was started for the call failed; its report says how, also where the cause is one of
            the above.
    """
    arguments = dict(locals())
    check_whole(epochs=epochs, log_step_freq=log_step_freq)
    check_whole(epoch_steps=1 if epoch_steps is None else epoch_steps)
    options = RunOptions.of(arguments)
    dl_train = grouped(dl_train, combine, where="train_model")
    objects = check_callbacks(callbacks, "callbacks")
    check_switch(valid_together=valid_together)
    task = Task(
        module=model,
        train_step=train_step or _tutorials(tutorial_train_step, model),
        dl_train=dl_train,
        valid_step=valid_step or (_tutorials(tutorial_valid_step, model) if dl_valid is not None else None),
        dl_valid=dl_valid,
        optimizer=optimizer,
        scheduler=scheduler,
        interval=scheduler_interval,
        monitor=scheduler_monitor,
        metrics=check_metrics(metrics, "metrics"),
        batches=BatchFunctions(batch_size, split_batch),
        others=states_of(objects),
        hooks=hooks_of({}, objects, "callbacks"),
        valid_together=valid_together,
    )
    how = run_of_call(run, config, lambda: _run_of(arguments["run"], task, options, arguments))
    if num_processes is not None and starts_ranks(num_processes, world):
        arguments["run"] = how
        del arguments["world"], arguments["num_processes"]
        with fed(verbose, log_step_freq=log_step_freq) as (arguments["verbose"], meanwhile):
            return call_on_ranks(train_model, arguments, num_processes, cpu=cpu, meanwhile=meanwhile)
    world = world if world is not None else bring_up(cpu=cpu)
    refuse_sharding(world.sharding, world.size, "train_model")
    if how is not None:
        return train_in_run(how, task, world, verbose=verbose).history.dataframe()
    engine = Engine(
        task,
        world,
        epochs=epochs,
        epoch_steps=epoch_steps,
        options=options,
        callbacks=Callbacks(progress_of(verbose, is_main=world.is_main, log_step_freq=log_step_freq)),
    )
    call_hooks(engine)
    check_plateau(engine, "scheduler_monitor", "the argument of train_model")
    check_total_steps(engine)
    say_banner(engine, verbose=verbose)
    history = engine.fit()
    if engine.average is not None:
        engine.average.settle()
    return history.dataframe()


def _run_of(run: str | Path | CallRun, task: Task, options: RunOptions, arguments: Mapping[str, Any]) -> CallRun:
    """Returns the run of a call, of which all arguments are known."""
    own = {f"train.{name}": (arguments[name], name) for name in ("epochs", "epoch_steps", "log_step_freq")}
    if task.scheduler is not None:
        own["scheduler.interval"] = (task.interval, "scheduler_interval")
        own["scheduler.monitor"] = (task.monitor, "scheduler_monitor")
    objects = ("scheduler", "metrics", "batch_size", "split_batch", "callbacks", "optimizer")
    return call_run(
        TRAIN_MODEL,
        run,
        task,
        options=options,
        own=own,
        roots={
            "train_step": task.train_step,
            "valid_step": task.valid_step,
            "model": task.module,
            "dl_train": task.dl_train,
            "dl_valid": task.dl_valid,
            **{name: arguments[name] for name in objects},
        },
        loaders={"dl_train": task.dl_train, "dl_valid": task.dl_valid},
        config=arguments["config"],
    )


def _tutorials(step: Step, model: nn.Module) -> Step:
    """Returns a default step where the net carries what it needs."""
    needed = ("loss_func", "metric_func") + (("optimizer",) if step is tutorial_train_step else ())
    missing = [name for name in needed if getattr(model, name, None) is None]
    if missing:
        split = "train" if step is tutorial_train_step else "valid"
        raise UsageError(
            f"no {split}_step was given, and the default one needs model.{', model.'.join(missing)}, which the model "
            f"lacks. Pass {split}_step=..., or set them on the model."
        )
    return step
