"""What happens in a run, and who is called then: one protocol, one list, one order.

::

    on_train_start(engine)
    for epoch in ...:
        on_epoch_start(epoch)
        on_pass_start(facts)                    # of training
        for batch in train loader:
            on_fetch_start(), on_fetch_end()    # around the wait for the batch
            on_batch_start(batch)
            train_step, with on_step_kind(kind) in the first one that learns, on_optimizer_step() in each that steps
            on_batch_end(batch, values)
            on_values_known("train", names)     # after the first batch of all
            on_progress(table)
            on_step_end(position)               # where the optimizer has stepped; then validation, where it is due
            on_group_end(position)              # after each group of batches that make one optimizer step
            on_save_point(position)             # where the optimizer has stepped
        on_train_pass_end(trained)
        on_pass_start(facts)                    # of validation
        for batch in valid loader:
            on_values_known("valid", names), on_progress(table), on_validation_step()
        on_epoch_row(row)                       # further columns of it
        on_epoch_end(row)
        on_group_end(position), on_save_point(position)
    on_train_end(), or on_exception(error)
    close()

A validation within an epoch is a pass of its own, and on_validation_end(row) comes after it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ParamSpec

from dtrain.errors import StopRequested
from dtrain.launch.signals.stop_request import is_ctrl_c

if TYPE_CHECKING:
    from dtrain.data.partition import RankBatch
    from dtrain.engine.facts import PassFacts
    from dtrain.engine.loop import Engine
    from dtrain.engine.metrics import MeanTable, Value
    from dtrain.engine.position import FinishedPass, TrainPosition
    from dtrain.engine.step_contract import Kind

P = ParamSpec("P")

logger = logging.getLogger(__name__)


class Order(IntEnum):
    """Who is called first at a hook, and closed first at the end; of the same order, who was added first."""

    AVERAGE = 10
    """the average of the weights, which others look at"""
    CHECKS = 20
    """what may find, with the first values, that the run cannot be right"""
    RECORDS = 30
    """norms, the profiler, the tools' records: a step at which the run is stopped is in them"""
    PROGRESS = 40
    """what a person sees"""
    TRACKERS = 50
    """what is sent elsewhere"""
    USER = 60
    """callbacks of a user's own"""
    EARLY_STOPPING = 70
    """early stopping, and the weights of the best epoch: after all that looks at an epoch's row"""
    STOP = 80
    """a request to stop"""
    CHECKPOINT = 90
    """checkpoints: all of the above is in them"""
    LAST = 100
    """what counts on a checkpoint being written"""


class EngineCallback:
    """What is called in a run. Override the hooks that are needed; what nobody overrides costs nothing.

    The hooks are called on every rank that has the callback. One that takes part in a collective must be on all ranks,
    and then only in a hook that comes at the same places on all of them, which is so of those that get a position, of
    `on_train_start`, `on_epoch_start`, `on_train_pass_end`, `on_validation_end`, `on_epoch_end` and `on_train_end`.
    An error that a hook raises ends the run as one of a step does.

    Attributes:
        order: where in the list.
    """

    order: Order = Order.USER

    def listens(self, hook: str) -> bool:
        """Returns whether a hook is to be called; by default, where the class overrides it."""
        return getattr(type(self), hook) is not getattr(EngineCallback, hook)

    def on_train_start(self, engine: Engine) -> None:
        """Training begins, or a resumed run goes on.

        Args:
            engine: it stands where training begins.
        """

    def on_epoch_start(self, epoch: int) -> None:
        """An epoch begins, or a resumed run goes on within it.

        Args:
            epoch: 1 or more.
        """

    def on_pass_start(self, facts: PassFacts) -> None:
        """A pass over a split begins: training, validation or prediction.

        Args:
            facts: what is known of it.
        """

    def on_fetch_start(self) -> None:
        """The wait for the next training batch begins."""

    def on_fetch_end(self, *, found: bool) -> None:
        """The wait is over: the next training batch is here, and not on the device yet.

        Args:
            found: whether there was one; False at the end of the pass.
        """

    def on_batch_start(self, batch: RankBatch) -> None:
        """A train step begins.

        Args:
            batch: this rank's part of the batch, on its device.
        """

    def on_batch_end(self, batch: RankBatch, values: Mapping[str, Value]) -> None:
        """A train step is done.

        Args:
            batch: as in `on_batch_start`.
            values: what the step returned, by name.
        """

    def on_step_kind(self, kind: Kind) -> None:
        """The first train step that learns has shown its kind; dtrain has not stepped the optimizer yet.

        Args:
            kind: "imperative" or "declarative".
        """

    def on_optimizer_step(self) -> None:
        """An optimizer has stepped; a train step may have several such."""

    def on_values_known(self, split: str, names: tuple[str, ...]) -> None:
        """The names of a step's values are known, after its first batch; not on a rank that has none.

        Of validation they are known twice, where there is one within epochs, too.

        Args:
            split: "train" or "valid".
            names: of the values.
        """

    def on_progress(self, table: MeanTable) -> None:
        """A step of training or validation is done.

        Args:
            table: this rank's running means; reading them waits for the device.
        """

    def on_step_end(self, position: TrainPosition) -> None:
        """A train step in which the optimizer has stepped is done; validation, where it is due, comes next.

        Args:
            position: where the run is.
        """

    def on_group_end(self, position: TrainPosition) -> None:
        """The batches that make one optimizer step are done, whether it was taken or not; or all of an epoch.

        Args:
            position: where the run is; at an epoch's end its split is "checkpoint".
        """

    def on_save_point(self, position: TrainPosition) -> None:
        """All that belongs to an optimizer step, or to an epoch, is done: the run can be saved here, and left.

        Args:
            position: as in `on_group_end`.

        Raises:
            StopRequested: the run is to end here, on all ranks alike.
        """

    def on_train_pass_end(self, trained: FinishedPass) -> None:
        """An epoch's train pass is done, and validation is not.

        Args:
            trained: its result.
        """

    def on_validation_step(self) -> bool:
        """Asked after each step of a validation.

        Returns:
            whether this rank is to leave it: then all ranks raise StopRequested at its end.
        """
        return False

    def on_validation_end(self, row: Mapping[str, Any]) -> None:
        """A validation within an epoch is done, and the train pass goes on.

        Args:
            row: its epoch, step (optimizer steps since the run began), values and seconds.
        """

    def on_epoch_row(self, row: Mapping[str, Any]) -> Mapping[str, float] | None:
        """An epoch's training and validation are done, and its row is not in the history yet.

        Args:
            row: its row so far.

        Returns:
            further columns, equal on all ranks; or None.
        """
        return None

    def on_epoch_end(self, row: Mapping[str, Any]) -> None:
        """An epoch is done.

        Args:
            row: its row of the history.
        """

    def on_train_end(self) -> None:
        """All epochs are done, or training was ended early as it should."""

    def on_exception(self, error: BaseException) -> None:
        """Something has ended training. An error in here is logged, and the first one is raised.

        Args:
            error: what it was; where it is a StopRequested, an error in here is raised in its place.
        """

    def close(self) -> None:
        """The run is over, well or not; called even where another callback cannot be closed. May be called twice."""


HOOKS = tuple(name for name in vars(EngineCallback) if name.startswith("on_"))


def each(hooks: tuple[Callable[P, Any], ...], *args: P.args, **kwargs: P.kwargs) -> None:
    """Calls each of a hook's methods. What comes with each step goes through them itself, which is a call less."""
    for hook in hooks:
        hook(*args, **kwargs)


class Callbacks:
    """The list of a run's callbacks, in their order; for each hook, the methods of those that override it.

    Args:
        callbacks: in any order; None for nobody, as where a rank shows nothing.
    """

    on_train_start: tuple[Callable[[Engine], None], ...]
    on_epoch_start: tuple[Callable[[int], None], ...]
    on_pass_start: tuple[Callable[[PassFacts], None], ...]
    on_fetch_start: tuple[Callable[[], None], ...]
    on_fetch_end: tuple[Callable[..., None], ...]
    on_batch_start: tuple[Callable[[RankBatch], None], ...]
    on_batch_end: tuple[Callable[[RankBatch, Mapping[str, Value]], None], ...]
    on_step_kind: tuple[Callable[[Kind], None], ...]
    on_optimizer_step: tuple[Callable[[], None], ...]
    on_values_known: tuple[Callable[[str, tuple[str, ...]], None], ...]
    on_progress: tuple[Callable[[MeanTable], None], ...]
    on_step_end: tuple[Callable[[TrainPosition], None], ...]
    on_group_end: tuple[Callable[[TrainPosition], None], ...]
    on_save_point: tuple[Callable[[TrainPosition], None], ...]
    on_train_pass_end: tuple[Callable[[FinishedPass], None], ...]
    on_validation_step: tuple[Callable[[], bool], ...]
    on_validation_end: tuple[Callable[[Mapping[str, Any]], None], ...]
    on_epoch_row: tuple[Callable[[Mapping[str, Any]], Mapping[str, float] | None], ...]
    on_epoch_end: tuple[Callable[[Mapping[str, Any]], None], ...]
    on_train_end: tuple[Callable[[], None], ...]
    on_exception: tuple[Callable[[BaseException], None], ...]

    def __init__(self, *callbacks: EngineCallback | None) -> None:
        self._list: list[EngineCallback] = []
        self.add(*callbacks)

    def __iter__(self) -> Iterator[EngineCallback]:
        """All of them, in their order."""
        return iter(self._list)

    def add(self, *callbacks: EngineCallback | None) -> None:
        """Adds callbacks, each at its place in the order."""
        found = [callback for callback in callbacks if callback is not None]
        self._list = sorted([*self._list, *found], key=lambda callback: callback.order)
        self._bind()

    def remove(self, callback: EngineCallback) -> None:
        """Takes a callback out of the list."""
        self._list = [one for one in self._list if one is not callback]
        self._bind()

    @contextlib.contextmanager
    def having(self, callback: EngineCallback) -> Iterator[None]:
        """While inside, a callback is in the list."""
        self.add(callback)
        try:
            yield
        finally:
            self.remove(callback)

    def fail(self, error: BaseException) -> None:
        """Calls `on_exception`.

        Raises:
            Exception: after a StopRequested, what one of them could not do, such as save the run: that is a failure,
                which all are called with in turn.
        """
        for hook in self.on_exception:
            try:
                hook(error)
            except BaseException as second:
                if is_ctrl_c(second):
                    raise
                if isinstance(error, StopRequested) and not isinstance(second, StopRequested):
                    self.fail(second)
                    raise
                logger.warning("a callback could not do what it does after a failure: %s", second, exc_info=True)

    def close(self) -> None:
        """Closes each one, also where another one cannot be closed.

        Raises:
            Exception: what the last of those raised that could not.
        """
        with contextlib.ExitStack() as closing:  # the last one that was put there first
            for callback in reversed(self._list):
                closing.callback(callback.close)

    def _bind(self) -> None:
        for name in HOOKS:
            setattr(self, name, tuple(getattr(one, name) for one in self._list if one.listens(name)))
