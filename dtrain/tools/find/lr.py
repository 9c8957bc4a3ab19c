"""A learning-rate range test on a recipe: the rate grows with each optimizer step, and the losses are noted."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dtrain.config import Settings
from dtrain.config.schema import leaves
from dtrain.data.partition import RankBatch
from dtrain.distributed.seeding import seed_everything
from dtrain.distributed.world import World
from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.hooks import IN_TRAINING
from dtrain.engine.loop import Engine
from dtrain.engine.metrics import Mean, Observed, Value
from dtrain.engine.position import TrainPosition
from dtrain.engine.train_step import Task
from dtrain.errors import StepError, StopRequested, UsageError
from dtrain.recipe.loader import Recipe, bind, load_recipe
from dtrain.tools.find.curve import Curve, growing
from dtrain.trainer.setup import configured_engine
from dtrain.trainer.train import agree

Tell = Callable[[Curve], None]
TIMES_AGAIN = 2
MORE = 4  # times the steps


@dataclass(frozen=True)
class RangeTestResult:
    """What a test came to.

    Attributes:
        curve: the losses.
        key: the config's key of the optimizer's rate; None where no builder of the recipe takes it.
        several: the rates of the optimizer's groups over that one, where there are several.
        anew: whether the recipe builds net and loaders, so that it can be tested again as it was.
    """

    curve: Curve
    key: str | None
    several: tuple[float, ...] = ()
    anew: bool = False


def find_clear_lr(
    settings: Settings, world: World, rates: list[float], tell: Tell | None = None, tell_again: Tell | None = None
) -> RangeTestResult:
    """As `find_lr`; once and twice again, with four times the steps each, while the losses scatter too much for them.

    It is not done again where the recipe's net is not built by a function: it would be the one that was tested.

    Args:
        settings: the recipe and its parameters.
        world: the ranks.
        rates: the learning rate of each optimizer step of the first test.
        tell: is told after each step.
        tell_again: is told of a test with which it does not end.

    Raises:
        Exception: as `find_lr`.
    """
    found = find_lr(settings, world, rates, tell)
    for _ in range(TIMES_AGAIN):
        if not (found.anew and found.curve.unclear):
            break
        if tell_again is not None:
            tell_again(found.curve)
        rates = growing(rates[0], rates[-1], MORE * len(rates))
        found = find_lr(settings, world, rates, tell)
    return found


def find_lr(settings: Settings, world: World, rates: list[float], tell: Tell | None = None) -> RangeTestResult:
    """Trains a recipe's net with a growing learning rate; the net is another one then, and nothing is kept.

    The recipe's schedule, validation, weight average and trackers are left out. A loader that ends goes around again.

    Args:
        settings: the recipe and its parameters.
        world: the ranks.
        rates: the learning rate of each optimizer step.
        tell: is told after each step.

    Raises:
        UsageError: there is no optimizer that dtrain knows, or it does not step.
        StepError: the train step returns no loss.
        AgreedError: some rank could not set up; every rank raises it.
    """
    recipe, task = agree(world, lambda: load_bound(settings))
    optimizer = task.optimizer
    if optimizer is None:
        raise UsageError(
            "find lr needs exactly one optimizer: define build_optimizer(model), or set model.optimizer. "
            f"{recipe.path} has none, or several.",
            on_all_ranks=True,
        )
    rate = own_rate(optimizer)
    ratios = agree(world, lambda: ratios_of(optimizer, rate))
    key = key_of_rate(recipe, settings, rate)
    task.dl_valid, task.valid_step, task.scheduler = None, None, None
    once = isinstance(task.dl_train, Iterator)
    short = shortened(settings, max_steps=len(rates))
    epochs = 1 if once else len(rates)
    how: dict[str, Any] = {"hooks": IN_TRAINING, "nan": "ignore", "epoch_steps": None}
    engine = configured_engine(task, world, short, epochs=epochs, **how)
    test = RangeTest(engine, optimizer, ratios, Curve(rates), tell)
    engine.callbacks.add(test)
    with contextlib.suppress(StopRequested):
        engine.fit()
    anew = {"model", "data"} <= recipe.builders.keys()
    return RangeTestResult(test.curve, key, tuple(ratios) if len(set(ratios)) > 1 else (), anew)


def load_bound(settings: Settings) -> tuple[Recipe, Task]:
    """Seeds, imports the recipe and builds its objects; returns both."""
    seed_everything(settings.config.train.seed)
    recipe = load_recipe(settings.config.recipe, settings.base)
    return recipe, bind(recipe, settings)


def shortened(settings: Settings, **train: Any) -> Settings:
    """Returns settings for a few steps: without what belongs to a whole run, and with other values of `train`."""
    left_out = {"schedule": None, "ema_decay": None, "val_every_steps": None}
    config = settings.config
    changed = config.train.model_copy(update=left_out | train)
    return replace(settings, config=config.model_copy(update={"train": changed}))


class RangeTest(EngineCallback):
    """Sets the rate before each optimizer step of an engine, whoever calls its `step()`, and notes the loss of each.

    Args:
        engine: it has not trained yet; `max_steps` ends it.
        optimizer: the task's.
        ratios: the rate of each of its groups over the curve's.
        curve: gets the losses.
        tell: is told after each step.
    """

    order = Order.RECORDS

    def __init__(
        self, engine: Engine, optimizer: Optimizer, ratios: list[float], curve: Curve, tell: Tell | None = None
    ) -> None:
        self.curve = curve
        self._engine = engine
        self._optimizer = optimizer
        self._ratios = ratios
        self._tell = tell
        self._stepped = False
        self._total = self._count = 0.0
        self._handle: RemovableHandle | None = None

    def on_train_start(self, engine: Engine) -> None:
        """From here on the optimizer steps with the curve's rates."""
        self._handle = self._optimizer.register_step_pre_hook(self._set_rate)

    def close(self) -> None:
        """The optimizer is let go."""
        if self._handle is not None:
            self._handle.remove()

    def _set_rate(self, *_: Any) -> None:
        self._stepped = True
        rate = self.curve.rates[min(self._engine.place.updates, len(self.curve.rates) - 1)]
        for group, ratio in zip(self._optimizer.param_groups, self._ratios, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * ratio)
            else:
                group["lr"] = rate * ratio

    def on_batch_end(self, batch: RankBatch, values: Mapping[str, Value]) -> None:
        """Adds a batch's loss.

        Raises:
            StepError: there is none.
        """
        loss = values.get("loss")
        if loss is None or isinstance(loss, Observed):
            raise StepError(f"find lr: the train step returns no value named loss; it returns {', '.join(values)}.")
        if batch.count:
            total, count = (
                (loss.total, loss.count) if isinstance(loss, Mean) else (_number(loss) * batch.count, batch.count)
            )
            self._total += _number(total)
            self._count += _number(count)

    def on_save_point(self, position: TrainPosition) -> None:
        """After an optimizer step: its loss, over all ranks and micro-batches.

        Raises:
            StopRequested: the test is over; all ranks find the same.
        """
        if position.split != "train":
            return
        if not self._stepped and self._engine.learner.scaler is None:  # which leaves steps out
            raise UsageError(
                "find lr: the train step does not step model.optimizer, so its lr cannot be set. Use model.optimizer "
                "in the step, or return the loss.",
                on_all_ranks=True,
            )
        total, count = self._engine.world.all_reduce([self._total, self._count])
        self._total = self._count = 0.0
        goes_on = self.curve.add(total / count if count else math.nan)
        if self._tell is not None:
            self._tell(self.curve)
        if not goes_on:
            raise StopRequested(self.curve.ended)


def own_rate(optimizer: Optimizer) -> float:
    """Returns the rate that an optimizer was made with: that of groups without one of their own."""
    first = optimizer.param_groups[0]
    rate = optimizer.defaults.get("lr")
    return float(first.get("initial_lr", first["lr"]) if rate is None else rate)


def ratios_of(optimizer: Optimizer, rate: float) -> list[float]:
    """Returns the rate of each group over one, without what a schedule has made of it.

    Raises:
        UsageError: that one is 0, and the groups differ.
    """
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    if rate == 0:
        if any(rates):
            raise UsageError(
                "find lr keeps the ratios of the parameter groups' lr "
                f"({', '.join(map(str, rates))}) to the optimizer's "
                "lr, which is 0. Set another lr."
            )
        return [1.0] * len(rates)
    return [own / rate for own in rates]


def key_of_rate(recipe: Recipe, settings: Settings, rate: float) -> str | None:
    """Returns the key with which the optimizer's rate is set, bare where that is enough; None where there is none."""
    takers = recipe.parameters()
    for section in ("optimizer", "model"):
        for name in ("lr", "learning_rate"):
            if name not in takers.get(section, ()):
                continue
            given = getattr(settings.config, section)
            value = given.get(name, recipe.builders[section].defaults().get(name))
            if isinstance(value, (int, float)) and math.isclose(value, rate, rel_tol=1e-6):
                alone = sum(name in names for names in takers.values()) == 1
                known = any(leaf.rpartition(".")[2] == name for leaf in leaves())
                return name if alone and not known else f"{section}.{name}"
    return None


def _number(value: float | Tensor) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)
