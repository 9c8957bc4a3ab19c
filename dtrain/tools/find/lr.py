"""A learning-rate range test on a recipe: the rate grows with each optimizer step, and the losses are noted."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from dtrain.config import Settings
from dtrain.config.schema import leaves
from dtrain.data.loader_group import has_iterator
from dtrain.data.partition import RankBatch
from dtrain.distributed.world import World
from dtrain.engine.callback import EngineCallback, Order
from dtrain.engine.hooks import IN_TRAINING
from dtrain.engine.loop import Engine
from dtrain.engine.metrics import Mean, Observed, Value
from dtrain.engine.position import TrainPosition
from dtrain.errors import StepError, StopRequested, UsageError
from dtrain.recipe.loader import Recipe
from dtrain.tools.find.curve import Curve, growing
from dtrain.tools.find.rates import TestedRates, name_of, own_rate, ratios_of
from dtrain.trainer.agreed import agree
from dtrain.trainer.setup import configured_engine, load_bound

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
        others: name -> rates of another optimizer's groups over that one.
        of: the name of the optimizer whose rate it is, where there are others.
        anew: whether the recipe builds net and loaders, so that it can be tested again as it was.
    """

    curve: Curve
    key: str | None
    several: tuple[float, ...] = ()
    anew: bool = False
    others: dict[str, tuple[float, ...]] = field(default_factory=dict)
    of: str = ""


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

    Of several optimizers each has its own rate's ratio to that of `model.optimizer`, or of the first one that steps.
    The recipe's schedule, validation, weight average and trackers are left out. A loader that ends goes around again.

    Args:
        settings: the recipe and its parameters.
        world: the ranks.
        rates: the learning rate of each optimizer step.
        tell: is told after each step.

    Raises:
        UsageError: no optimizer of the net steps that can be seen.
        StepError: the train step returns no loss.
        AgreedError: some rank could not set up; every rank raises it.
    """
    recipe, task = agree(world, lambda: load_bound(settings))
    if task.optimizer is not None:
        agree(world, lambda: ratios_of(task.optimizer, own_rate(task.optimizer)))  # type: ignore[arg-type]
    task.dl_valid, task.valid_step, task.scheduler = None, None, None
    once = has_iterator(task.dl_train)
    short = shortened(settings, max_steps=len(rates))
    epochs = 1 if once else len(rates)
    how: dict[str, Any] = {"hooks": IN_TRAINING, "nan": "ignore", "epoch_steps": None}
    engine = configured_engine(task, world, short, epochs=epochs, **how)
    test = RangeTest(engine, Curve(rates), tell)
    engine.callbacks.add(test)
    with contextlib.suppress(StopRequested):
        engine.fit()
    anew = {"model", "data"} <= recipe.builders.keys()
    first, others = test.rates.first, test.rates.others()
    key = None if first is None else key_of_rate(recipe, settings, own_rate(first))
    of = name_of(first, task.module) if others else ""
    return RangeTestResult(test.curve, key, test.rates.ratios(), anew, others, of)


def shortened(settings: Settings, **train: Any) -> Settings:
    """Returns settings for a few steps: without what belongs to a whole run, and with other values of `train`."""
    left_out = {"schedule": None, "ema_decay": None, "swa_from": None, "val_every_steps": None, "cuda_graph": False}
    config = settings.config
    changed = config.train.model_copy(update=left_out | train)
    return replace(settings, config=config.model_copy(update={"train": changed}))


class RangeTest(EngineCallback):
    """Sets the rate before each optimizer step of an engine, whoever calls its `step()`, and notes the loss of each.

    Args:
        engine: it has not trained yet; `max_steps` ends it.
        curve: gets the losses.
        tell: is told after each step.
    """

    order = Order.RECORDS

    def __init__(self, engine: Engine, curve: Curve, tell: Tell | None = None) -> None:
        self.curve = curve
        self.rates = TestedRates(engine.task.module, engine.task.optimizer, self._rate)
        self._engine = engine
        self._tell = tell
        self._total = self._count = 0.0

    def on_train_start(self, engine: Engine) -> None:
        """From here on the optimizers step with the curve's rates."""
        self.rates.open()

    def close(self) -> None:
        """The optimizers are let go."""
        self.rates.close()

    def _rate(self) -> float:
        return self.curve.rates[min(self._engine.place.updates, len(self.curve.rates) - 1)]

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
        if not self.rates.stepped and self._engine.learner.scaler is None:  # which leaves steps out
            raise UsageError(
                "find lr: no torch.optim.Optimizer of the model's parameters steps, so no lr can be set. Use one in "
                "the train step, or return the loss.",
                on_all_ranks=True,
            )
        total, count = self._engine.world.all_reduce([self._total, self._count])
        self._total = self._count = 0.0
        goes_on = self.curve.add(total / count if count else math.nan)
        if self._tell is not None:
            self._tell(self.curve)
        if not goes_on:
            raise StopRequested(self.curve.ended)


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
