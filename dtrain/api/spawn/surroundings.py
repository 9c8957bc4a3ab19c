"""What a process has set for itself and its ranks need too, for the same numbers and the same warnings."""

from __future__ import annotations

import linecache
import warnings
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Surroundings:
    """Settings of one process.

    Attributes:
        dtype: torch's default type.
        precision: of float32 matrix products.
        deterministic: whether torch shall use deterministic algorithms, and only warn where there is none.
        cudnn: cuDNN's benchmark and deterministic flags.
        filters: of warnings, as the warnings module keeps them.
        sources: the lines of notebook cells, by their file names; there are no such files.
    """

    dtype: torch.dtype
    precision: str
    deterministic: tuple[bool, bool]
    cudnn: tuple[bool, bool]
    filters: list[Any]
    sources: dict[str, list[str]]

    @classmethod
    def here(cls) -> Surroundings:
        """Returns this process's."""
        return cls(
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            _deterministic(),
            (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
            list(warnings.filters),
            {name: entry[2] for name, entry in linecache.cache.items() if len(entry) == 4 and entry[1] is None},
        )

    def restore(self) -> None:
        """Makes them this process's own."""
        torch.set_default_dtype(self.dtype)
        torch.set_float32_matmul_precision(self.precision)
        if self.deterministic != _deterministic():  # the call loads all that torch.compile needs
            torch.use_deterministic_algorithms(self.deterministic[0], warn_only=self.deterministic[1])
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = self.cudnn
        _restore_filters(self.filters)
        for name, lines in self.sources.items():  # a traceback then shows the line
            linecache.cache[name] = (sum(map(len, lines)), None, lines, name)


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _restore_filters(filters: list[Any]) -> None:
    warnings.resetwarnings()
    for action, message, category, module, line in reversed(filters):
        warnings.filterwarnings(action, _pattern(message), category, _pattern(module), line)
    # A scheduler wraps its optimizer's step(), and looks for the wrapper once; it does not travel.
    warnings.filterwarnings("ignore", r"Seems like `optimizer\.step\(\)` has been overridden")


def _pattern(compiled: Any) -> str:
    """The text of a filter's pattern, which may be one, a compiled one, or None."""
    return compiled if isinstance(compiled, str) else getattr(compiled, "pattern", "")
