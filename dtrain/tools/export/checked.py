"""A net's file is written under another name, run, compared with the net, and only then gets its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dtrain.errors import DtrainError, UsageError
from dtrain.tools.export.formats import Format, Runner, loaded_weights
from dtrain.tools.export.model_call import WEIGHTS_ALONE, ModelCall, tensors_of

TOLERANCE = 1e-4  # of the largest output, or of 1 where that is less
_EPSILONS = 8  # as many steps of the outputs' own precision are always let pass


@dataclass(frozen=True)
class Exported:
    """A file that was written and compared.

    Attributes:
        file: its path.
        bytes: its size.
        difference: the largest absolute difference of any output from the net's own.
        sizes: the batches that were compared, in samples; none where the weights themselves were.
    """

    file: Path
    bytes: int
    difference: float
    sizes: tuple[int, ...]


def check_place(file: Path, *, force: bool) -> None:
    """Whether a file can be written, before any work is done for it.

    Raises:
        UsageError: it is there already, or its folder is not.
    """
    if file.is_dir():
        raise UsageError(f"-o {file}: this is a folder. Name a file in it.")
    if not file.parent.is_dir():
        raise UsageError(f"-o {file}: no such folder: {file.parent}. Create it first.")
    if os.path.lexists(file) and not force:
        raise UsageError(
            f"{file} already exists and is not overwritten. Use --force to replace it, or another -o FILE."
        )


def export_net(  # noqa: PLR0913 - keyword-only after the net, its call and the file
    net: nn.Module,
    call: ModelCall | None,
    file: Path,
    *,
    kind: Format,
    fresh: Callable[[], nn.Module],
    force: bool = False,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Writes a net to a file that is known to compute what the net does.

    Args:
        net: the net, on the CPU; it is put in eval mode.
        call: how it is called, for one batch; None where that is unknown and the file holds weights alone, which are
            then compared themselves.
        file: where; it appears whole and compared, or not at all.
        kind: of file.
        fresh: builds the net anew, for a file that holds weights alone.
        force: whether a file that is there is replaced.
        tolerance: the difference that is let pass, as a part of the largest absolute output (of 1, if that is less).

    Returns:
        what was written.

    Raises:
        UsageError: the net cannot be expressed in this kind of file, or the file cannot be written.
        DtrainError: the file's outputs differ from the net's; nothing is left of it.
    """
    net.eval()
    wanted = _references(net, call, every_size=kind.is_program) if call is not None else []
    with _placed(file, force=force) as part:
        kind.write(net, call, part)
        if call is None:
            difference = _compared_weights(net, loaded_weights(part, fresh), file)
        else:
            run = kind.opened(part, fresh)
            difference = max(_compared(one, outputs, run, file, tolerance) for one, outputs in wanted)
        size = part.stat().st_size
    return Exported(file, size, difference, tuple(one.samples for one, _ in wanted))


def _references(net: nn.Module, call: ModelCall, *, every_size: bool) -> list[tuple[ModelCall, list[Tensor]]]:
    """Returns the net's own outputs for the batch; and, for what takes batches of any size, for other sizes of it."""
    found = [(call, tensors_of(call.outputs(net)))]
    if not found[0][1]:
        raise UsageError("the model returns no tensor, so there is nothing to compare. Return one from forward().")
    for size in (1, call.samples + 1) if every_size else ():
        other = call.rows(torch.arange(size) % call.samples)
        with contextlib.suppress(Exception):  # such as a net that takes the mean of a batch, of which 1 has none
            if size != call.samples:
                found.append((other, tensors_of(other.outputs(net))))
    return found


def _compared(call: ModelCall, expected: list[Tensor], run: Runner, file: Path, tolerance: float) -> float:
    """Returns the largest difference for one batch.

    Raises:
        DtrainError: it is too large.
    """
    try:
        outputs = run(call)
    except UsageError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the file's runtime raises
        first = str(error).partition("\n")[0]
        raise DtrainError(
            f"{file.name} was not written: what was exported fails for a batch of {call.samples} samples: "
            f"{type(error).__name__}: {first} {WEIGHTS_ALONE}"
        ) from None
    if [tuple(one.shape) for one in outputs] != [tuple(one.shape) for one in expected]:
        raise DtrainError(
            f"{file.name} was not written: for {call.samples} samples it returns {_shapes(outputs)}, and the model "
            f"{_shapes(expected)}. {WEIGHTS_ALONE}"
        )
    worst = 0.0
    for one, other in zip(outputs, expected, strict=True):
        difference, allowed = _difference(one, other, tolerance)
        if not difference <= allowed:
            raise DtrainError(
                f"{file.name} was not written: its outputs for {call.samples} samples differ by up to {difference:.3g} "
                f"from the model's, and {allowed:.3g} is allowed. Does the model draw random numbers in eval mode, or "
                "have state that its state_dict() lacks? If this is rounding, raise --tolerance."
            )
        worst = max(worst, difference)
    return worst


def _compared_weights(net: nn.Module, other: nn.Module, file: Path) -> float:
    """Returns 0, as the difference of equal weights.

    Raises:
        DtrainError: one differs.
    """
    there = other.state_dict()
    for name, value in net.state_dict().items():
        if isinstance(value, Tensor) and _difference(there[name], value, 0.0)[0] != 0:
            raise DtrainError(f"{file.name} was not written: {name} differs from the model's.")
    return 0.0


def _difference(one: Tensor, other: Tensor, tolerance: float) -> tuple[float, float]:
    """Returns the largest absolute difference, and what is let pass; NaN and infinities must be at the same places."""
    kind = other.dtype
    if not (kind.is_floating_point or kind.is_complex):
        return (0.0 if torch.equal(one.to(kind), other) else float("inf")), 0.0
    wide = torch.complex128 if kind.is_complex else torch.float64
    left, right = one.detach().cpu().to(wide), other.detach().cpu().to(wide)
    odd = ~right.isfinite()
    if not torch.equal(odd, ~left.isfinite()) or not torch.equal(left[odd].nan_to_num(7.0), right[odd].nan_to_num(7.0)):
        return float("inf"), tolerance
    if not right[~odd].numel():
        return 0.0, tolerance
    scale = max(1.0, float(right[~odd].abs().max()))
    return float((left - right)[~odd].abs().max()), max(tolerance, _EPSILONS * torch.finfo(kind).eps) * scale


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join(str(tuple(one.shape)) for one in tensors) or "nothing"


@contextlib.contextmanager
def _placed(file: Path, *, force: bool) -> Iterator[Path]:
    """Yields a path beside the file, with its ending; it gets its name at the end, or nothing is left of it."""
    part = file.with_name(f".{file.stem}.part-{os.getpid()}{file.suffix}")
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        if force:
            part.replace(file)
        else:
            check_place(file, force=False)  # somebody may have written it meanwhile
            part.rename(file)
    except OSError as error:
        raise UsageError(f"{file}: cannot be written: {error.strerror or error}.") from None
    finally:
        part.unlink(missing_ok=True)
