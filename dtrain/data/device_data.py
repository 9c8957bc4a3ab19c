"""Data on the GPU: a dataset's tensors are kept there, and batches are taken out of them there, by index.

The batches are those that `dtrain.data.fetch` takes on the CPU: the same rows in the same order, of the same type.

What changes the data counts. Another tensor in the dataset, and whatever torch does to one of them, which it counts in
the tensor's version, are seen at the next batch. At the beginning of each pass the tensors are copied again, so that
what else has written to their memory counts, too. Memory that others may write to within a pass (NumPy arrays, other
processes) is left where it is, unless the data are asked to be on the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from dtrain.data.fetch import PlacedRows, RowsOf
from dtrain.errors import UsageError

logger = logging.getLogger(__name__)

DataOnDevice = Literal["auto", True, False]
SHARE = 0.1  # of the free memory, which "auto" may take

_MEGA, _GIGA = 1e6, 1e9
_KEY = "data_on_device"


@dataclass(frozen=True)
class Card:
    """A device with memory of its own.

    Attributes:
        device: of the rank.
        free: returns the bytes of its memory that nobody has.
    """

    device: torch.device
    free: Callable[[], int]


def card_of(device: torch.device) -> Card | None:
    """Returns a rank's GPU; None where it is no CUDA device."""
    return Card(device, lambda: torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


class Obstacle(NamedTuple):
    """Why data cannot be kept on the device.

    Attributes:
        why: in words that follow the loader's name.
        remedy: what the user would have to do.
    """

    why: str
    remedy: str


def check_data_on_device(wanted: Any) -> None:
    """Whether a value is one of those that there are.

    Raises:
        UsageError: it is another one.
    """
    if not any(wanted is one for one in get_args(DataOnDevice)) and wanted != "auto":
        raise UsageError(f"{_KEY} = {wanted!r}: should be 'auto', True or False.")


def device_store(wanted: DataOnDevice, device: torch.device) -> DeviceStore | None:
    """Returns what keeps a run's data on its device; None where they stay where they are.

    Raises:
        UsageError: they are asked to be there, and the rank computes on the CPU.
    """
    card = None if wanted is False else card_of(device)
    if card is None and wanted is True:
        raise UsageError(
            f"{_KEY}=true needs a CUDA GPU, and this rank computes on {device.type}. Use {_KEY}=auto, which keeps the "
            "data on a GPU where there is one."
        )
    return None if card is None else DeviceStore(card, asked=wanted is True)


@dataclass(slots=True)
class _Copy:
    """A tensor of a dataset on the device.

    Attributes:
        source: the dataset's own.
        data: what is on the device; the source itself where that is there.
        mark: the source's version and memory, as it was copied.
    """

    source: Tensor
    data: Tensor
    mark: tuple[int, int] = (-1, 0)

    @property
    def fits(self) -> bool:
        """Whether the source has the form that it had, so that it can be copied again."""
        return self.data.shape == self.source.shape and self.data.dtype == self.source.dtype

    def renew(self) -> None:
        """Copies it again. Without waiting: pageable memory has been read when the call returns, pinned has not."""
        self.mark = self.source._version, self.source.data_ptr()
        if self.data is not self.source:
            self.data.copy_(self.source, non_blocking=not _is_pinned(self.source))


class DeviceStore:
    """The tensors of a run's datasets on the device, each once.

    Args:
        card: the device.
        asked: whether the user wants the data there, and not only where it does no harm.
    """

    def __init__(self, card: Card, *, asked: bool) -> None:
        self.card, self.asked = card, asked
        self._copies: dict[int, _Copy] = {}
        self._promised: dict[int, Tensor] = {}  # what is to be copied; held, so that no other one gets its id

    def rows(self, loader: Any, split: str, *, fetch_batches: bool, indexed: bool) -> tuple[DeviceRows | None, str]:
        """Returns what takes a loader's batches on the device, and in words what is done.

        Args:
            loader: the user's.
            split: its name.
            fetch_batches: whether whole batches may be taken at once.
            indexed: whether dtrain deals its indices.

        Raises:
            UsageError: the data are asked to be on the device, and cannot be; says why and what to do.
        """
        found = obstacle(loader, fetch_batches=fetch_batches, indexed=indexed) or self._own_obstacle(loader)
        if found is None:
            tensors = tensors_of(loader.dataset)
            self._promised |= {id(tensor): tensor for tensor in tensors}
            return DeviceRows(RowsOf(loader.dataset), self), f"{split} ({amount(_bytes(tensors))})"
        if self.asked:
            raise UsageError(
                f"{_KEY}=true: the {split} loader's data cannot be kept on {self.card.device}: {found.why}. "
                f"{found.remedy}, or use {_KEY}=auto."
            )
        return None, f"not {split}: {found.why}"

    def _own_obstacle(self, loader: Any) -> Obstacle | None:
        """What is in the way besides the kind of the loader: whose the memory is, and how much there is."""
        tensors, device = tensors_of(loader.dataset), self.card.device
        foreign = next((number for number, tensor in enumerate(tensors) if _is_foreign(tensor)), None)
        if foreign is not None and not self.asked:
            return Obstacle(
                f"the memory of its tensor {foreign} is shared with a NumPy array or another process",
                "Copy it with torch.tensor(array)",
            )
        if any(not tensor.is_cpu and tensor.device != device for tensor in tensors):
            return Obstacle("its tensors are on another device", "Keep them on the CPU")
        needed = _bytes([*self._promised.values(), *tensors], device)
        already = sum(copy.data.nbytes for copy in self._copies.values() if copy.data is not copy.source)
        there, share = self.card.free() + already, 1.0 if self.asked else SHARE
        if needed <= there * share:
            return None
        part = "" if self.asked else f"{SHARE:.0%} of "
        return Obstacle(
            f"{amount(needed)} do not fit into {part}the {amount(there)} that are free",
            "Use a smaller dataset or a larger GPU",
        )

    def copies(self, tensors: Sequence[Tensor]) -> list[_Copy] | None:
        """Copies tensors to the device as they are now; None where they cannot be there."""
        if any(unfit(tensor) is not None for tensor in tensors):
            return None
        if not self.asked and any(map(_is_foreign, tensors)):
            return None
        kept = {id(tensor) for tensor in tensors} | self._promised.keys()
        self._copies = {key: copy for key, copy in self._copies.items() if key in kept and copy.fits}
        new = [tensor for tensor in tensors if id(tensor) not in self._copies]
        if _bytes(new, self.card.device) > self.card.free():
            return None
        try:
            made = {id(tensor): _Copy(tensor, self._empty_like(tensor)) for tensor in new}
        except torch.OutOfMemoryError:
            return None
        self._copies |= made
        found = [self._copies[id(tensor)] for tensor in tensors]
        for copy in {id(one): one for one in found}.values():
            copy.renew()
        return found

    def promise(self, before: Sequence[Tensor], now: Sequence[Tensor]) -> None:
        """A dataset has other tensors than before."""
        for tensor in before:
            self._promised.pop(id(tensor), None)
        self._promised |= {id(tensor): tensor for tensor in now}

    def _empty_like(self, tensor: Tensor) -> Tensor:
        if not tensor.is_cpu:
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=self.card.device)


class DeviceRows:
    """The batches of a TensorDataset, or of a subset of one, taken on the device.

    Args:
        rows: takes them on the CPU.
        store: has the tensors.
    """

    def __init__(self, rows: RowsOf, store: DeviceStore) -> None:
        self.rows, self._store = rows, store
        self._copies: list[_Copy] | None = None
        self._known: Sequence[Tensor] = rows.tensors()
        self._told = False

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._store.card.device

    def begin(self) -> bool:
        """A pass begins: the data are copied as they are now.

        Returns:
            whether they are on the device.

        Raises:
            UsageError: they are asked to be there, and cannot be any more.
        """
        tensors = self.rows.tensors()
        self._store.promise(self._known, tensors)
        self._known = tensors
        self._copies = self._store.copies(tensors)
        if self._copies is None and self._store.asked:
            raise UsageError(
                f"{_KEY}=true: the data have changed, or the memory was taken meanwhile, so they cannot be kept "
                f"on {self.device}. Use {_KEY}=auto, which then reads them on the CPU."
            )
        if self._copies is None and not self._told:
            self._told = True
            logger.warning("the data no longer fit on %s as they are: their batches are made on the CPU", self.device)
        return self._copies is not None

    def fetch(self, batch: Any) -> list[Any]:
        """Returns the rows of a batch.

        Args:
            batch: `PlacedRows`, or indices as `RowsOf` takes them.
        """
        host = batch.host if isinstance(batch, PlacedRows) else self.rows.rows(batch)
        if not isinstance(host, Tensor) or not self._is_fresh():
            return self.rows.__getitems__(host)
        place = batch.device if isinstance(batch, PlacedRows) else host.to(self.device, non_blocking=True)
        return [copy.data.index_select(0, place) for copy in self._copies or ()]

    def _is_fresh(self) -> bool:
        """Whether the data are on the device, copied again where torch has changed them in place.

        Where the dataset has other tensors, the rest of the pass is read on the CPU, which checks each index anew.
        """
        if self._copies is None:
            return False
        tensors = self.rows.tensors()
        if len(tensors) != len(self._copies):
            self._copies = None
            return False
        for copy, tensor in zip(self._copies, tensors, strict=True):
            if copy.source is not tensor or (copy.mark != (tensor._version, tensor.data_ptr()) and not copy.fits):
                self._copies = None
                return False
            if copy.mark != (tensor._version, tensor.data_ptr()):
                copy.renew()
        return True


def obstacle(loader: Any, *, fetch_batches: bool, indexed: bool) -> Obstacle | None:
    """Returns why batches of a loader are not parts of tensors that could lie elsewhere; None where they are.

    Args:
        loader: the user's.
        fetch_batches: whether whole batches may be taken at once.
        indexed: whether dtrain deals its indices.
    """
    if not isinstance(loader, DataLoader) or not indexed:
        return Obstacle(f"it is a {type(loader).__name__}, and no DataLoader over a TensorDataset", "Use one")
    return _own_code(loader) or _own_way(loader, fetch_batches) or _unfit_tensor(loader.dataset)


def _own_code(loader: DataLoader[Any]) -> Obstacle | None:
    """What of the user's own makes the samples or batches."""
    kind = _plain(loader.dataset)
    if type(kind) is not TensorDataset:
        why = f"the samples of its {type(kind).__name__} are made by the dataset's own code"
        return Obstacle(why, "Use a TensorDataset or a Subset of one")
    if loader.collate_fn is not default_collate:
        name = getattr(loader.collate_fn, "__name__", type(loader.collate_fn).__name__)
        return Obstacle(f"its collate_fn ({name}) makes the batches", "Remove the collate_fn")
    return None


def _own_way(loader: DataLoader[Any], fetch_batches: bool) -> Obstacle | None:
    """What of how the loader fetches would be passed over."""
    if loader.num_workers > 0:
        why = f"num_workers={loader.num_workers}, and its workers would have nothing to do"
        return Obstacle(why, "Set num_workers=0 in the DataLoader")
    if loader.batch_sampler is None:
        return Obstacle("batch_size=None, so the dataset makes the batches", "Give the DataLoader a batch_size")
    if not fetch_batches:
        return Obstacle("fetch_batches=false has each sample fetched alone", "Set fetch_batches=true")
    return None


def _unfit_tensor(dataset: Any) -> Obstacle | None:
    return next((found for found in map(unfit, tensors_of(dataset)) if found is not None), None)


def unfit(tensor: Any) -> Obstacle | None:
    """Returns what of a dataset's tensor keeps it where it is."""
    use = "Use plain tensors, such as tensor.detach().clone()"
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        return Obstacle(f"one of its tensors is a {type(tensor).__name__} that is not plain", use)
    if tensor.requires_grad or tensor.is_inference():
        return Obstacle("one of its tensors requires a gradient, or was made in inference mode", use)
    return None


def tensors_of(dataset: Any) -> Sequence[Tensor]:
    """Returns the tensors of a TensorDataset, or of the one that a Subset is of."""
    return _plain(dataset).tensors  # type: ignore[no-any-return]


def dry_words(wanted: DataOnDevice, loaders: dict[str, Any], *, fetch_batches: bool, cpu: bool) -> str:
    """Returns what would be done with loaders' data, for who asks before anything starts.

    Args:
        wanted: the option.
        loaders: by name.
        fetch_batches: the option.
        cpu: whether ranks compute on the CPU.
    """
    if wanted is False:
        return "no"
    if cpu:
        return "no: ranks compute on the CPU" if wanted == "auto" else "refused: ranks compute on the CPU"
    return "; ".join(_dry(wanted, split, loader, fetch_batches=fetch_batches) for split, loader in loaders.items())


def _dry(wanted: DataOnDevice, split: str, loader: Any, *, fetch_batches: bool) -> str:
    from dtrain.data.dataloaders import has_indices

    found = obstacle(loader, fetch_batches=fetch_batches, indexed=has_indices(loader))
    if found is None and wanted == "auto" and any(map(_is_foreign, tensors_of(loader.dataset))):
        found = Obstacle("its memory is shared with a NumPy array or another process", "")
    if found is not None:
        return f"{'not' if wanted == 'auto' else 'refused:'} {split}: {found.why}"
    fits = f"if {SHARE:.0%} of its free memory holds " if wanted == "auto" else ""
    return f"{split}, {fits}{amount(_bytes(tensors_of(loader.dataset)))}"


def amount(count: float) -> str:
    """Returns a number of bytes in words, such as "12.3 MB"."""
    return f"{count / _GIGA:.1f} GB" if count >= _GIGA else f"{count / _MEGA:.1f} MB"


def _plain(dataset: Any) -> Any:
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset


def _bytes(tensors: Sequence[Tensor], device: torch.device | None = None) -> int:
    """The bytes that tensors take, each once; not those that are on the device already."""
    unique = {id(tensor): tensor for tensor in tensors}.values()
    return sum(_size(tensor) for tensor in unique if tensor.is_cpu or tensor.device != device)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()  # also of one that is expanded, whose copy is not


def _is_foreign(tensor: Tensor) -> bool:
    """Whether others can write to its memory without torch's counting it: it is of NumPy, or shared by processes."""
    if not tensor.is_cpu:
        return False
    return bool(tensor.is_shared()) or not tensor.untyped_storage().resizable()  # type: ignore[no-untyped-call]


def _is_pinned(tensor: Tensor) -> bool:
    return torch.cuda.is_available() and tensor.is_pinned()
