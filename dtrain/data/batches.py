"""Batches of any nesting: counted, cut and joined by what is known of them, and never by a guess.

What is known comes, in this order, from the user's own functions, from where the batch was put together
(`dtrain.data.collate`), and from the batch itself (`dtrain.data.batch_tree`). Where that leaves open what a sample is,
the batch is refused, in words that say what was found and which function to define.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from dtrain.data.batch_tree import Node, Rows, Scalars, Sequence, Struct, struct_of, tree_of
from dtrain.data.batch_types import UnclearError, is_same
from dtrain.data.collate import Collated
from dtrain.data.partition import part_of
from dtrain.errors import DataError, UsageError

DEFINED = "in the recipe, or give it as an argument: train_model(..., {0}={0}), KerasModel.fit, dtrain.prepare"


_FLAT = (tuple, list, dict)
_SEVERAL = (
    " If it has a batch of each of several loaders, give dtrain a mapping of these loaders instead, with "
    'train.combine=min (combine="min"): it then counts the samples of each.'
)
_MOST_NUMBERS = 1000  # of what may be a constant


@dataclass(frozen=True)
class BatchFunctions:
    """What the user says of the batches of loaders that have no indices.

    Attributes:
        batch_size: batch -> its number of samples.
        split_batch: (batch, sizes) -> a list of batches of so many samples each, in order; the sizes are positive and
            add up to the batch's.
        by_rank: whether the loaders were built with this rank's number, so that those without indices have its part.
    """

    batch_size: Callable[[Any], int] | None = None
    split_batch: Callable[[Any, list[int]], Any] | None = None
    by_rank: bool = False

    def __post_init__(self) -> None:
        """Refuses what cannot be called."""
        for name, function in (("batch_size", self.batch_size), ("split_batch", self.split_batch)):
            if function is not None and not callable(function):
                also = " The batch size itself is the loader's: DataLoader(dataset, batch_size=32)."
                also = also if name == "batch_size" and isinstance(function, int) else ""
                raise UsageError(f"{name} = {function!r}: should be a function of a batch.{also}")


class BatchReader:
    """Counts, cuts and joins the batches of one loader, and remembers how they were read.

    Args:
        functions: the user's.
        ranks: between how many a batch is cut.
        split: the loader's name.
        fixed: whether the parts of a batch that is a list are known to be no samples, as where the step takes a fixed
            number of them.
        collated: whether torch's default_collate made the batches.
    """

    def __init__(
        self,
        functions: BatchFunctions | None = None,
        ranks: int = 1,
        split: str = "train",
        *,
        fixed: bool = False,
        collated: bool = False,
    ) -> None:
        self.functions = functions or BatchFunctions()
        self.collated = collated
        self.ranks = ranks
        self.name = split
        self._fixed = fixed
        self._tuples = False  # whether the batches are tuples, of which a DataLoader made lists
        self._lists: dict[str, bool] = {}  # path -> whether the list there is samples
        self._seen: dict[str, tuple[int, int | None]] = {}  # path -> a list's length, and the one that its items share
        self._whole: set[str] = set()  # paths of lists of scalars that are not the samples'
        self._of_samples: set[str] = set()  # and of those that are
        self._unsure: set[str] = set()  # paths of lists of which nothing else in the batch said what they are
        self._small: dict[str, Any] = {}  # path -> the first batch's list of numbers there, not a long one
        self._flat = 0  # parts of a batch that is nothing but so many tensors; 0 for any other

    # --- counting ---------------------------------------------------------------------------------------

    def size_of(self, batch: Any) -> int:
        """Returns the number of samples of a batch.

        Raises:
            DataError: that is not known.
        """
        count: int | None = None
        if type(batch) is Collated:
            batch, count = self._opened(batch)
        if self.functions.batch_size is not None:
            return self._asked(batch)
        if count is not None and self.collated:
            return count
        if self._flat and count is None:
            size = self._flat_size(batch)
            if size >= 0:
                return size
        try:
            return self._read(batch, count)[1]
        except UnclearError as error:
            raise DataError(
                f"the number of samples in a batch of the {self.name} loader is not known: {error}. Define `def "
                f"batch_size(batch): return ...`, which returns it{_examples(batch)}, {DEFINED.format('batch_size')}."
                f"{_SEVERAL if self.name == 'train' and _is_several(batch) else ''}"
            ) from None

    def _opened(self, batch: Any) -> tuple[Any, int | None]:
        """Returns the user's own batch, and its number of samples where that is known."""
        if type(batch) is not Collated:
            return batch, None
        self._tuples = self._tuples or batch.parts
        return batch.batch, batch.count

    def _flat_size(self, batch: Any) -> int:
        """The same for the most frequent kind of batch, once it was read, with few calls; -1 for any other."""
        if (kind := type(batch)) not in _FLAT or len(batch) != self._flat:
            return -1
        size: int = -1
        for part in batch.values() if kind is dict else batch:
            if type(part) is not Tensor or part.is_nested or part.ndim == 0:
                return -1
            if size >= 0 and part.shape[0] != size:
                return -1
            size = int(part.shape[0])
        return size

    def _asked(self, batch: Any) -> int:
        told: Any = self.functions.batch_size(batch) if self.functions.batch_size is not None else None
        try:
            size = operator.index(told)
        except TypeError:
            size = -1
        if size < 0 or isinstance(told, bool):
            raise DataError(f"batch_size(batch) returned {told!r}: should be the batch's number of samples.")
        return size

    # --- reading ----------------------------------------------------------------------------------------

    def _read(self, batch: Any, count: int | None = None) -> tuple[Node, int]:
        """Returns a batch as a tree, of which all is fixed that can be, and its number of samples.

        Args:
            batch: the batch.
            count: its number of samples, where that is known.

        Raises:
            UnclearError: its number of samples cannot be told.
        """
        node = self._tree(batch, count)
        self._leave_constants_out(node)
        size = self._checked(node, count) if count is not None else self._told(node)
        unsure = count is None and len(node.sizes() or ()) > 1
        node.resolve(size)
        if type(node) is Struct and type(batch) in _FLAT:
            self._flat = len(batch) if all(type(child) is Rows for child in node.children.values()) else 0
        self._remember(node, unsure=unsure)
        return node, size

    def _leave_constants_out(self, node: Node) -> None:
        """Where parts are of unequal lengths, those that are the first batch's are no samples': class weights, say."""
        rows = [one for one in node.nodes() if type(one) is Rows]
        if not self._small:
            self._small = {
                r.path: r.value for r in rows if isinstance(r.value, Tensor) and r.value.numel() <= _MOST_NUMBERS
            }
        elif node.sizes() == frozenset():
            for one in rows:
                one.constant = is_same(one.value, self._small.get(one.path))

    def _tree(self, batch: Any, count: int | None) -> Node:
        node = tree_of(batch, collated=self.collated, known=self._lists)
        if type(node) is not Sequence or node.samples or (count is not None and not self._are_parts(batch)):
            return node
        # The step gets its items as its arguments.
        if node.samples is None and not self._are_parts(batch) and _is_list_of_samples(node):
            node.samples = True
            return node
        parts = struct_of(node)
        if not self._fixed:
            self._check_length(parts)
            parts.doubtful = not self._are_parts(batch) and _may_be_images(node)
        return parts

    def _are_parts(self, batch: Any) -> bool:
        """Whether a batch's items are known to be no samples."""
        return self._fixed or self._tuples or isinstance(batch, tuple)

    def _check_length(self, node: Struct) -> None:
        """Parts are as many in each batch; tensors of one sort that are not may be samples."""
        before = self._seen.setdefault("batch", (len(node.value), None))[0]
        if before != len(node.value):
            raise UnclearError(f"one batch has {before} parts and another {len(node.value)}, as lists of samples have")

    def _told(self, node: Node) -> int:
        sizes = node.sizes()
        if sizes is None:
            return _length_of_scalars(node)
        if not sizes:
            raise UnclearError(f"the first dimensions of its parts differ: {_listed(node)}")
        if len(sizes) > 1:
            sizes = node.preferred() or sizes
        if len(sizes) > 1:
            raise UnclearError(f"it may be {' or '.join(map(str, sorted(sizes)))}, by its parts: {_listed(node)}")
        return next(iter(sizes))

    def _checked(self, node: Node, count: int) -> int:
        sizes = node.sizes()
        # More rows are several of each sample, or another dimension; with fewer, samples may have been left out.
        if self.functions.batch_size is None and sizes and count not in sizes and min(sizes) < count:
            raise UnclearError(
                f"its collate_fn was given {count} samples, and made of them what seems to be "
                f"{' or '.join(map(str, sorted(sizes)))}: {_listed(node)}"
            )
        return count

    def _remember(self, node: Node, *, unsure: bool) -> None:
        for one in node.nodes():
            if isinstance(one, Scalars):
                one.whole = one.path in self._whole
                one.doubtful = not one.is_cut and one.path in self._of_samples
                (self._of_samples if one.is_cut or one.doubtful else self._whole).add(one.path)
            elif type(one) is Sequence and one.samples is not None:
                self._unsure |= {one.path} if (unsure or one.likely) and one.path not in self._lists else set()
                self._remember_list(one)

    def _remember_list(self, node: Sequence) -> None:
        samples, length, common = bool(node.samples), len(node.value), node.common_length()
        before = self._seen.setdefault(node.path, (length, common))
        known = self._lists.setdefault(node.path, samples)
        rows_varied = before[0] == length and None not in (before[1], common) and before[1] != common
        varied = rows_varied if known else before[0] != length
        if known != samples or (varied and node.path in self._unsure):
            raise UnclearError(f"{node.shown()} seems to be samples in one batch and parts in another")

    # --- cutting and joining ----------------------------------------------------------------------------

    def cut(self, batch: Any, start: int, stop: int) -> Any:
        """Returns the batch of samples start to stop.

        Raises:
            DataError: it is not known how a batch is cut.
        """
        batch, count = self._opened(batch)
        if self.functions.split_batch is not None:
            return self._split(self.functions.split_batch, batch, count, start, stop)
        if self.functions.batch_size is not None:
            count = self._asked(batch)
        try:
            return self._read(batch, count)[0].cut(start, stop)
        except UnclearError as error:
            raise DataError(
                f"a batch of the {self.name} loader cannot be cut between {self.ranks} ranks: {error}. Define "
                "`def split_batch(batch, sizes): ...`, which returns a list of batches of so many samples each, "
                f"{DEFINED.format('split_batch')}. Or use train.batch=per_rank (batch='per_rank'), which cuts none."
            ) from None

    def _split(self, split: Callable[..., Any], batch: Any, count: int | None, start: int, stop: int) -> Any:
        total = self.size_of(batch) if count is None else count
        ranges = [part_of(total, rank, self.ranks) for rank in range(self.ranks)]
        if (start, stop) not in ranges:
            ranges = [(0, start), (start, stop), (stop, total)]
        ranges = [(first, last) for first, last in ranges if last > first]
        sizes = [last - first for first, last in ranges]
        made = split(batch, list(sizes))
        if not isinstance(made, (list, tuple)) or len(made) != len(sizes):
            told = f"{len(made)} batches" if isinstance(made, (list, tuple)) else type(made).__name__
            raise DataError(f"split_batch(batch, {sizes}) returned {told}: should be a list of {len(sizes)} batches.")
        part = made[ranges.index((start, stop))]
        if self.functions.batch_size is not None and (size := self._asked(part)) != stop - start:
            raise DataError(
                f"split_batch(batch, {sizes}) made a batch of {stop - start} samples, of which batch_size says {size}."
            )
        return part

    def join(self, batches: list[Any]) -> Any:
        """Returns the batch of all samples of several batches.

        Raises:
            DataError: it is not known how batches are joined.
        """
        if len(batches) == 1:
            return batches[0]
        opened = [self._opened(batch) for batch in batches]
        if self.functions.batch_size is not None:
            opened = [(batch, self._asked(batch)) for batch, _ in opened]
        try:
            for _ in range(2):  # since one batch may show how another is read
                read = [self._read(batch, count) for batch, count in opened]
            nodes = [node for node, _ in read]
            joined = nodes[0].join(nodes)
        except UnclearError as error:
            raise DataError(
                f"batches of the {self.name} loader cannot be joined to one: {error}. With train.batch=global no "
                "batches are joined."
            ) from None
        known = type(batches[0]) is Collated
        return Collated(joined, sum(size for _, size in read)) if known else joined

    def samples(self, batch: Any, count: int) -> list[Any]:
        """Returns the samples of a batch as batches of one.

        Raises:
            UnclearError: it is not known how it is cut.
        """
        if self.functions.split_batch is not None:
            return list(self.functions.split_batch(batch, [1] * count))
        reader = BatchReader(self.functions, fixed=self._fixed, collated=self.collated)
        node, _ = reader._read(batch, count)
        return [node.cut(row, row + 1) for row in range(count)]

    def cut_parts(self, batch: Any) -> dict[str, Any]:
        """Returns the parts of a batch that are cut along the samples, by their places.

        Raises:
            UnclearError: its number of samples is not known.
        """
        node, _ = self._read(*self._opened(batch))
        cut = (one for one in node.nodes() if isinstance(one, Rows) or (isinstance(one, Scalars) and one.is_cut))
        return {one.path: one.value for one in cut}


def takes_fixed_parts(step: Any) -> bool:
    """Whether a step takes a fixed number of parts of a batch, so that these are no samples."""
    try:
        kinds = [parameter.kind for parameter in inspect.signature(step).parameters.values()]
    except (TypeError, ValueError):
        return False
    return inspect.Parameter.VAR_POSITIONAL not in kinds


def _is_list_of_samples(node: Sequence) -> bool:
    """Whether a batch that is a list is a list of samples.

    Raises:
        UnclearError: it may as well be a list of parts.
    """
    if not node.of_one_sort():
        return False
    first, common = node.value[0], node.common_length()
    if not isinstance(first, (Tensor, np.ndarray)):
        if common is not None and not hasattr(first, "keys"):
            raise UnclearError(f"{node.shown()} is a list of samples or of parts. Yield a tuple where it is parts")
        return True
    shapes = {tuple(one.shape) for one in node.value}
    trailing = {shape[1:] for shape in shapes}
    if common is None:
        if len(trailing) > 1 and first.ndim < 3:
            return False  # and then its parts do not agree
        if len(trailing) > 1:
            raise UnclearError(f"{node.shown()} is a list of samples or of parts. Yield a tuple where it is parts")
        return True
    if len(trailing) > 1 and first.ndim >= 3:
        raise UnclearError(f"{node.shown()} is a list of samples or of parts. Yield a tuple where it is parts")
    return False


def _may_be_images(node: Sequence) -> bool:
    """Whether a batch that was taken for parts may be a list of images or videos, whose channels must not be cut."""
    return node.of_one_sort() and isinstance(node.value[0], (Tensor, np.ndarray)) and node.value[0].ndim >= 3


def _length_of_scalars(node: Node) -> int:
    """The length of the lists of texts and the like, where there is nothing else; a batch itself is no such list."""
    lengths = {len(one.value) for one in node.nodes() if isinstance(one, (Scalars, Sequence))}
    if len(lengths) == 1 and not isinstance(node, Scalars):
        return next(iter(lengths))
    raise UnclearError(f"it holds no tensor or array that would tell: {_listed(node)}")


def _listed(node: Node) -> str:
    shown = [one.shown() for one in node.nodes() if type(one) not in (Node, Struct)] or [node.shown()]
    return ", ".join(shown[:5]) + ", ..." * (len(shown) > 5)


def _is_several(batch: Any) -> bool:
    return isinstance(batch, Mapping) and len(batch) > 1 and all(type(one) in _FLAT for one in batch.values())


def _examples(batch: Any) -> str:
    """Expressions in Python, of which one is likely the number of samples; which one is, only the user knows."""
    rows = [node for node in tree_of(batch, collated=True).nodes() if isinstance(node, Rows)]
    found = [f"len({node.path})" for node in rows[:3]]
    found += [f"{node.path}.shape[1]" for node in rows[:1] if len(node.value.shape) > 1]
    return f", such as {' or '.join(f'`{one}`' for one in found)}" if found else ""
