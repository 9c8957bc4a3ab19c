"""The Keras style: `compile`, `fit`, `evaluate` and `predict` for a net, over the same engine as the other styles."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from dtrain.api.clean_errors import clean_in_notebooks
from dtrain.api.fit_forms import FitPlan, given_to_fit, in_turn, read_fit, shown
from dtrain.api.in_run import CallRun, call_run, run_of_call, train_in_run
from dtrain.api.keeping import Keeping
from dtrain.api.keras_steps import KerasSteps, checked_metrics, counts_epochs
from dtrain.api.spawn.call import call_on_ranks, starts_ranks
from dtrain.callbacks.early_stopping import load_state
from dtrain.callbacks.progress import fed, progress_of
from dtrain.config.calls import KERAS
from dtrain.data.batches import BatchFunctions
from dtrain.data.device_data import DataOnDevice
from dtrain.data.loader_group import Combine
from dtrain.data.partition import BatchMode
from dtrain.data.rank_shards import DataSharding
from dtrain.distributed.fsdp_settings import refuse_sharding
from dtrain.distributed.world import World, bring_up
from dtrain.engine.arguments import check_whole
from dtrain.engine.call_hooks import call_hooks
from dtrain.engine.callback import Callbacks, EngineCallback
from dtrain.engine.hooks import check_callbacks, hooks_of, states_of
from dtrain.engine.loop import Engine
from dtrain.engine.monitored import check_plateau
from dtrain.engine.options import RunOptions
from dtrain.engine.predict import evaluate_task, predict
from dtrain.engine.schedules import check_total_steps
from dtrain.engine.synced_metrics import is_torchmetric
from dtrain.engine.train_step import Task
from dtrain.errors import UsageError
from dtrain.launch.terminal.guarded import put
from dtrain.model.compile import Compile
from dtrain.model.gradients.averaging import Way
from dtrain.model.precision import Precision
from dtrain.trainer.messages import say_banner

if TYPE_CHECKING:
    import pandas as pd


class KerasModel(nn.Module):
    """A net with its loss, metrics and optimizer.

    A batch is (features, labels). Where a loss is not a mean over samples (class weights, `ignore_index`), write the
    steps yourself for `dtrain.train_model`.

    Args:
        net: the net; it is trained in place.
        loss_fn: (predictions, labels) -> the mean loss over the samples of a batch.
        metrics_dict: column -> a function (predictions, labels) -> the mean over a batch, or a torchmetrics metric,
            which is computed once an epoch, over all samples of all ranks. Mind that torchmetrics guesses from the
            range of each batch whether it got logits or probabilities: probabilities are safe.
        optimizer: by default Adam with a learning rate of 3e-4.
        lr_scheduler: a torch learning-rate scheduler, which counts optimizer steps; ReduceLROnPlateau counts epochs and
            watches the `monitor` of `fit`.
    """

    def __init__(
        self,
        net: nn.Module,
        loss_fn: Callable[..., Any] | None = None,
        metrics_dict: Mapping[str, Any] | None = None,
        optimizer: Optimizer | None = None,
        lr_scheduler: Any = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.loss_fn = loss_fn
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.metrics_dict = checked_metrics(metrics_dict)
        self._cpu = False
        self._options = RunOptions(same_draws=False)  # of `evaluate` and `predict`: those of `fit`
        self._batches = BatchFunctions()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the net."""
        return self.net(*args, **kwargs)

    def compile(  # Keras' own name; for torch's, torch.compile(model.net)
        self,
        loss_func: Callable[..., Any] | None = None,
        optimizer: Optimizer | None = None,
        metrics_dict: Mapping[str, Any] | None = None,
        lr_scheduler: Any = None,
    ) -> None:
        """Sets what training needs; what is left out stays as it was.

        Args:
            loss_func: the class's `loss_fn`.
            optimizer, metrics_dict, lr_scheduler: as for the class.

        Raises:
            UsageError: a metric is neither a function nor a single torchmetrics metric.
        """
        self.loss_fn = loss_func if loss_func is not None else self.loss_fn
        self.optimizer = optimizer if optimizer is not None else self.optimizer
        self.lr_scheduler = lr_scheduler if lr_scheduler is not None else self.lr_scheduler
        if metrics_dict is not None:
            self.metrics_dict = checked_metrics(metrics_dict)

    def summary(
        self,
        input_shape: Sequence[int] | None = None,
        input_dtype: torch.dtype = torch.float32,
        input_data: Any = None,
    ) -> None:
        """Prints the net's layers, shapes and numbers of parameters, for one sample; on rank 0 alone.

        Args:
            input_shape: a sample's shape, without the batch dimension, such as (1, 28, 28).
            input_dtype: a sample's type.
            input_data: in place of a shape: a batch, as a loader yields it.

        Raises:
            UsageError: neither was given.
        """
        from dtrain.engine.summary import data_summary, shape_summary
        from dtrain.launch.env.rank_env import read_rank_facts

        if input_shape is None and input_data is None:
            raise UsageError(
                "summary needs a sample's shape, summary(input_shape=(1, 28, 28)), or a batch: input_data=."
            )
        if read_rank_facts().rank != 0:
            return
        given = input_data is not None
        text = data_summary(self.net, input_data) if given else shape_summary(self.net, input_shape or (), input_dtype)
        print(text)  # noqa: T201

    @clean_in_notebooks
    def fit(  # noqa: PLR0913 - keyword-only
        self,
        *args: Any,
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
        callbacks: Any = None,
        verbose: bool | EngineCallback = True,
        plot: bool | None = None,
        quiet: bool | None = None,
        cpu: bool = False,
        world: World | None = None,
        num_processes: int | None = None,
        run: str | Path | None = None,
        config: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> pd.DataFrame:
        """Trains the net, in either of two calling forms::

            fit(epochs, dl_train, dl_val=None, log_step_freq=10)
            fit(train_data, val_data=None, epochs=10, ckpt_path="checkpoint", patience=5,
                monitor="val_loss", mode=None)

        The second form stops after `patience` epochs in which `monitor`, a column, did not reach a new best (`mode`
        says which end is best, "min" or "max"; with None, the lowest of a loss or an error, else the highest),
        restores the weights of the best epoch, and keeps them at `ckpt_path`: as safetensors where it ends so, else as
        torch.save does. The first form does so where it is told to. The data for validation may be a mapping of names
        to loaders, with the columns val_NAME_loss and so on; "val_loss" then stands for the first one's loss. So may
        those for training, which then take turns: `combine="alternate"`.

        Args:
            args: see above.
            batch: "per_rank": the loaders' batch size is each rank's; "global": it is the whole world's.
            combine: as in `dtrain.train_model`; a step takes features and labels, so loaders can only take turns.
            batch_size, split_batch: as in `dtrain.train_model`; `evaluate` and `predict` then use them, too.
            data_sharding, same_draws, accumulation, average, sync_batchnorm, clip_norm, clip_value, data_on_device,
                prefetch_to_device, cuda_graph, epoch_steps: as in `dtrain.train_model`.
            fetch_batches, precision, compile: as in `dtrain.train_model`; `evaluate` and `predict` then do so, too.
            ema_decay: of an exponential moving average of the weights (above 0, below 1), with which is validated, and
                which the net has in the end; of the best epoch, where its weights are kept.
            swa_from: the share of the optimizer steps (above 0, below 1) after which the weights of all further ones
                are averaged equally (SWA), in place of `ema_decay`.
            seed: the order of the samples and each rank's random stream are derived from it.
            callbacks: `dtrain.Callback` objects, in a list; see docs/callbacks.md.
            verbose: whether rank 0 shows progress; or what is to show it, as in `dtrain.train_model`.
            plot: whether a notebook shows curves, as it does by default; quiet: True is `verbose=False`.
            cpu: compute on the CPU also where there is an accelerator.
            world: ranks that were brought up before, by default brought up here.
            num_processes: start this many ranks on this machine for the call, from a notebook, a prompt or a script
                that is no rank itself; with 1, as without, it trains in this process.
            run, config: as in `dtrain.train_model`.
            kwargs: see above.

        Returns:
            the history on every rank, a row an epoch: epoch, loss and the metrics, val_loss and val_ metrics, lr,
            seconds, samples_per_second.

        Raises:
            UsageError: an argument is wrong, or there is no loss.
            StepError, DataError, RankError, StopRequested: as in `dtrain.train_model`.
        """  # fmt: skip
        verbose = shown(verbose, plot, quiet)
        given = given_to_fit(locals())
        plan, options = read_fit(args, kwargs), RunOptions.of(given)
        check_whole(epoch_steps=1 if epoch_steps is None else epoch_steps)
        plan = replace(plan, train_data=in_turn(plan.train_data, combine))
        objects = check_callbacks(callbacks, "callbacks")
        hooks = hooks_of({}, objects, "callbacks")
        self._cpu, self._options = cpu, replace(options, same_draws=False)
        self._batches = BatchFunctions(batch_size, split_batch)
        task = self._task(plan.train_data, plan.val_data)  # tells what is missing; makes the default optimizer
        task.monitor, task.hooks, task.others = plan.monitor, hooks, dict(states_of(objects))
        how = run_of_call(run, config, lambda: self._run_of(run, task, plan, options, given))
        if num_processes is not None and starts_ranks(num_processes, world):
            arguments = {**given, "model": self, **vars(plan), "run": how, "config": None}
            del arguments["world"], arguments["num_processes"]
            with fed(verbose, log_step_freq=plan.log_step_freq) as (arguments["verbose"], meanwhile):
                return call_on_ranks(_fit, arguments, num_processes, cpu=cpu, meanwhile=meanwhile)
        world = world if world is not None else bring_up(cpu=cpu)
        refuse_sharding(world.sharding, world.size, "KerasModel.fit")
        keeping = Keeping(plan)
        if how is not None:
            engine = train_in_run(how, task, world, verbose=verbose, ready=keeping.ready, begun=keeping.begun)
            keeping.restore()
            return engine.history.dataframe()
        engine = Engine(
            task,
            world,
            epochs=plan.epochs,
            epoch_steps=epoch_steps,
            options=options,
            callbacks=Callbacks(progress_of(verbose, is_main=world.is_main, log_step_freq=plan.log_step_freq)),
        )
        call_hooks(engine)
        keeping.ready(engine)
        keeping.begun(engine)
        check_plateau(engine, "monitor", "the argument of fit", plan.mode)
        check_total_steps(engine)
        say_banner(engine, verbose=verbose)
        history = engine.fit()
        if engine.ended is not None and verbose is True and world.is_main:
            put(f"{engine.ended}\n", sys.stdout)
        if engine.average is not None:
            engine.average.settle()
        keeping.restore()
        return history.dataframe()

    def _run_of(self, run: Any, task: Task, plan: FitPlan, options: RunOptions, given: Mapping[str, Any]) -> CallRun:
        """Returns the run of a `fit` that keeps one."""
        own = {f"train.{name}": (getattr(plan, name), name) for name in ("epochs", "log_step_freq")}
        own["train.epoch_steps"] = (given["epoch_steps"], "epoch_steps")
        if self.lr_scheduler is not None:
            own |= {
                "scheduler.interval": (task.interval, "lr_scheduler"),
                "scheduler.monitor": (plan.monitor, "monitor"),
            }
        roots = {name: given[name] for name in ("batch_size", "split_batch", "callbacks")}
        return call_run(
            KERAS,
            run,
            task,
            options=options,
            own=own,
            roots={
                "loss_fn": self.loss_fn,
                "metrics_dict": self.metrics_dict,
                "net": self.net,
                "optimizer": self.optimizer,
                "lr_scheduler": self.lr_scheduler,
                "train_data": plan.train_data,
                "val_data": plan.val_data,
                **roots,
            },
            loaders={"train_data": plan.train_data, "val_data": plan.val_data},
            config=given["config"],
        )

    @clean_in_notebooks
    def evaluate(  # noqa: PLR0913 - keyword-only
        self,
        dl_val: Any,
        *,
        batch: BatchMode = "per_rank",
        batch_size: Callable[[Any], int] | None = None,
        split_batch: Callable[[Any, list[int]], Any] | None = None,
        seed: int = 42,
        world: World | None = None,
    ) -> dict[str, float]:
        """Returns the loss and metrics over all samples of a loader, on every rank: {"val_loss": ..., "val_acc": ...}.

        Args:
            dl_val: the loader, or a mapping of names to several: {"val_NAME_loss": ...}.
            batch: whose batch size the loader's is.
            batch_size, split_batch: as in `fit`, whose they are by default.
            seed: for loaders that draw random numbers.
            world: ranks that were brought up before.

        Raises:
            UsageError: there is no loss, or the ranks did not come up as launched.
            DataError: the loader yields nothing.
        """
        world = world if world is not None else bring_up(cpu=self._cpu)
        self._use(batch_size, split_batch)
        result = evaluate_task(self._task(None, dl_val), world, replace(self._options, batch=batch, seed=seed))
        return {f"val_{name}": mean for name, mean in result.means.items()}

    @clean_in_notebooks
    def predict(  # noqa: PLR0913 - keyword-only
        self,
        dl: Any,
        *,
        batch: BatchMode = "per_rank",
        batch_size: Callable[[Any], int] | None = None,
        split_batch: Callable[[Any, list[int]], Any] | None = None,
        seed: int = 42,
        world: World | None = None,
    ) -> Any:
        """Returns the predictions for all samples of a loader, in the data's order, on the CPU, on every rank.

        Args:
            dl: the loader; of a batch that is a tuple or list, the first part are the features.
            batch: whose batch size the loader's is.
            batch_size, split_batch: as in `fit`, whose they are by default.
            seed: for loaders that draw random numbers.
            world: ranks that were brought up before.

        Returns:
            what the net returns, for all samples: a tensor of shape (samples, ...), or tensors nested as there.

        Raises:
            StepError: the net returns something else than a row per sample.
            DataError: the loader yields nothing.
        """
        world = world if world is not None else bring_up(cpu=self._cpu)
        self._use(batch_size, split_batch)
        return predict(self.net, dl, world, replace(self._options, batch=batch, seed=seed), batches=self._batches)

    def load_ckpt(self, ckpt_path: str | Path) -> None:
        """Loads weights that `fit` kept.

        Args:
            ckpt_path: where; safetensors where it ends so, else as torch.save writes a `state_dict`. No code in the
                file is run.

        Raises:
            UsageError: there is no such file.
            RuntimeError: the weights are another net's.
        """
        load_state(self.net, Path(ckpt_path))

    def _use(self, batch_size: Callable[[Any], int] | None, split_batch: Callable[..., Any] | None) -> None:
        known = self._batches
        self._batches = BatchFunctions(batch_size or known.batch_size, split_batch or known.split_batch)

    def _task(self, train_data: Any, val_data: Any) -> Task:
        """The engine's view of this model, with fresh copies of the metrics."""
        if self.loss_fn is None:
            raise UsageError("no loss: pass KerasModel(net, loss_fn=...) or compile(loss_func=...).")
        if train_data is not None and self.optimizer is None:
            self.optimizer = torch.optim.Adam(self.net.parameters(), lr=3e-4)
        steps = KerasSteps(self.loss_fn, self.metrics_dict)
        metrics = {name: copy.deepcopy(metric) for name, metric in self.metrics_dict.items() if is_torchmetric(metric)}
        return Task(
            module=self.net,
            train_step=steps.step,
            dl_train=train_data,
            valid_step=steps.step,
            dl_valid=val_data,
            optimizer=self.optimizer,
            scheduler=self.lr_scheduler,
            interval="epoch" if counts_epochs(self.lr_scheduler) else "step",
            metrics=metrics,
            batches=self._batches,
        )


def _fit(model: KerasModel, **how: Any) -> pd.DataFrame:
    return model.fit(**how)
