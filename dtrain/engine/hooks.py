"""What a user has called in a run: plain functions, found by their names, and `Callback` objects.

::

    before_train(model, run)
    for epoch in ...:
        before_epoch(model, epoch, run)
        after each optimizer step:                  after_step(model, values, run)
        after each validation within the epoch:     after_validation(model, row, run)
        after the epoch's training and validation:  after_epoch(model, row, run), whose mapping adds columns to the row
    after_train(model, run), or on_exception(error, run)

A function takes the arguments that it names, of those in `ARGUMENTS`; it need not take all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.errors import RecipeError, UsageError, add_remark

if TYPE_CHECKING:
    from torch import nn

    from dtrain.engine.run import Run

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "before_train": ("model", "run"),
    "before_epoch": ("model", "epoch", "run"),
    "after_step": ("model", "epoch", "step", "values", "run"),
    "after_validation": ("model", "epoch", "step", "row", "run"),
    "after_epoch": ("model", "epoch", "row", "run"),
    "after_train": ("model", "history", "run"),
    "on_exception": ("error", "run"),
}
# Those that may change how it trains: what measures training calls them, too.
IN_TRAINING = ("before_train", "before_epoch", "after_step")
_ALIASES = {"net": "model"}
_STATE = ("state_dict", "load_state_dict")


class Callback:
    """What is called in a run. Override the methods that are needed; one that is not overridden costs nothing.

    All methods are called on every rank. One that raises ends the run, as a step that raises does. `before_epoch`,
    `after_step`, `after_validation` and `after_epoch` end training after the present epoch by returning False, on any
    rank; `run.stop(reason)` does the same.

    The state of a class with `state_dict()` and `load_state_dict(state)` is kept in checkpoints: that of rank 0, which
    all ranks get at a resume.
    """

    def before_train(self, model: nn.Module, run: Run) -> None:
        """Training begins, or is resumed.

        Args:
            model: the net, without DDP around it.
            run: where it is, and what can be asked of it.
        """

    def before_epoch(self, model: nn.Module, epoch: int, run: Run) -> bool | None:
        """An epoch begins, or is resumed.

        Args:
            model: as above.
            epoch: 1 or more.
            run: as above.
        """

    def after_step(self, model: nn.Module, values: Mapping[str, Any], run: Run) -> bool | None:
        """An optimizer step was taken.

        Args:
            model: as above.
            values: what `train_step` returned for this rank's part of the last batch, by name, without gradients.
                Reading a tensor waits for the device.
            run: as above.
        """

    def after_validation(self, model: nn.Module, row: Mapping[str, Any], run: Run) -> bool | None:
        """A validation within an epoch (`train.val_every_steps`) is done.

        Args:
            model: as above; with the averaged weights, where there is an average, and in eval mode.
            row: its epoch, step, val_ values and seconds; the same on all ranks.
            run: as above.
        """

    def after_epoch(self, model: nn.Module, row: Mapping[str, Any], run: Run) -> Mapping[str, Any] | bool | None:
        """An epoch's training and validation are done, and its row is not in the history yet.

        Args:
            model: as above; with the averaged weights, where there is an average, and in eval mode.
            row: the epoch's row so far; the same on all ranks.
            run: as above.

        Returns:
            further columns of the row, name -> number, which can be monitored as others are. Ranks that return a column
            must agree on its value; a `dtrain.Mean(total, count)` is added up over the ranks that return it.
        """

    def after_train(self, model: nn.Module, run: Run) -> None:
        """Training has come to its end, whether all epochs were run or not.

        Args:
            model: as above.
            run: as above; its history is complete.
        """

    def on_exception(self, error: BaseException, run: Run) -> None:
        """Training was ended by an error, or by a request to stop (`dtrain.errors.StopRequested`).

        Args:
            error: what it was.
            run: as above.
        """


@dataclass(frozen=True)
class Hook:
    """One function, or method of an object, and what it takes.

    Attributes:
        name: a key of `ARGUMENTS`.
        function: the user's.
        takes: which argument each of its parameters gets.
        where: "NAME (FILE:LINE)".
    """

    name: str
    function: Callable[..., Any]
    takes: Mapping[str, str]
    where: str

    @classmethod
    def of(cls, name: str, function: Callable[..., Any]) -> Hook:
        """Reads a function's signature.

        Raises:
            RecipeError: it takes what there is not, or nothing by name.
        """
        where = f"{name} ({_place(function)})"
        known = ARGUMENTS[name]
        takes: dict[str, str] = {}
        for parameter in inspect.signature(function).parameters.values():
            argument = _ALIASES.get(parameter.name, parameter.name)
            if parameter.kind is parameter.VAR_KEYWORD:
                takes |= {each: each for each in known if each not in takes.values()}
            elif argument in known and parameter.kind is not parameter.POSITIONAL_ONLY:
                takes[parameter.name] = argument
            elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL:
                raise RecipeError(
                    f"{where} has a parameter {parameter.name!r}, which dtrain has no value for. It can take "
                    f"{', '.join(known[:-1])} and {known[-1]}, by name and in any order."
                )
        return cls(name, function, takes, where)

    def __call__(self, arguments: Mapping[str, Callable[[], Any]]) -> Any:
        """Calls it with those arguments that it takes."""
        try:
            return self.function(**{own: arguments[name]() for own, name in self.takes.items()})
        except BaseException as error:
            add_remark(error, f"in {self.where}")
            raise


def hooks_of(functions: Mapping[str, Any], objects: Iterable[Any], source: str) -> list[Hook]:
    """Returns what is to be called, functions first.

    Args:
        functions: names of a module, and what they stand for; other names than hooks' are left out.
        objects: `Callback` objects.
        source: where the objects come from, for messages.

    Raises:
        RecipeError: a function takes what there is not; something is no function, or no `Callback`.
    """
    found = []
    for name in ARGUMENTS:
        function = functions.get(name)
        if function is not None and not callable(function):
            raise RecipeError(f"{source}: {name} is a {type(function).__name__}, not a function.")
        found += [] if function is None else [Hook.of(name, function)]
    for one in objects:
        found += [Hook.of(name, getattr(one, name)) for name in ARGUMENTS if _overrides(one, name)]
    return found


def adds_columns(hooks: Iterable[Hook]) -> bool:
    """Whether some of them may add columns to the history, which need not be there in each epoch."""
    return any(hook.name == "after_epoch" for hook in hooks)


def check_callbacks(objects: Any, source: str) -> list[Callback]:
    """Returns the objects as a list.

    Args:
        objects: a list or tuple of `Callback` objects, or one; None for none.
        source: where they come from, for messages: "callbacks", say.

    Raises:
        UsageError: there is something else among them.
    """
    if objects is None:
        return []
    found = list(objects) if isinstance(objects, Sequence) else [objects]
    for number, one in enumerate(found):
        if isinstance(one, type) and issubclass(one, Callback):
            raise UsageError(f"{source}[{number}] is the class {one.__name__}. Make an object of it: {one.__name__}().")
        if not isinstance(one, Callback):
            raise UsageError(
                f"{source}[{number}] is a {type(one).__name__}, not a dtrain.Callback. Derive its class from "
                f"dtrain.Callback, whose methods are {', '.join(ARGUMENTS)}."
            )
        half = [name for name in _STATE if callable(getattr(one, name, None))]
        if len(half) == 1:
            missing = next(name for name in _STATE if name not in half)
            raise UsageError(
                f"{source}[{number}], a {type(one).__name__}, has {half[0]}() but no {missing}(), so its state could "
                f"not be resumed. Define {missing}(), or remove {half[0]}()."
            )
    return found


def states_of(objects: Sequence[Callback]) -> dict[str, Any]:
    """Returns those with a state that checkpoints keep, by names that are the same at each start."""
    kept: dict[str, Any] = {}
    for one in objects:
        if has_state(one):
            alike = sum(type(other) is type(one) for other in kept.values())
            kept[f"callback {type(one).__name__}" + (f" {alike + 1}" if alike else "")] = one
    return kept


def has_state(one: Callback) -> bool:
    """Whether an object has a state that checkpoints keep."""
    return all(callable(getattr(one, name, None)) for name in _STATE)


def _overrides(one: Callback, name: str) -> bool:
    return getattr(type(one), name) is not getattr(Callback, name) or name in vars(one)


def _place(function: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
    return "?" if code is None else f"{Path(code.co_filename).name}:{code.co_firstlineno}"
