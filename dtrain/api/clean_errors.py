"""Errors of calls in a notebook: the user's own lines and what happened, without the frames that lie between."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from dtrain.launch.monitor.describe import describe, skip_installed

P = ParamSpec("P")
T = TypeVar("T")


def clean_in_notebooks(call: Callable[P, T]) -> Callable[P, T]:
    """Has IPython show what a call raises as a command line does; the exception itself, and its traceback, stay."""

    @functools.wraps(call)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if "IPython" in sys.modules and not hasattr(error, "_render_traceback_"):
                with contextlib.suppress(Exception):  # a class of the user's may take no attributes
                    error._render_traceback_ = functools.partial(_lines, error)  # type: ignore[attr-defined]
            raise

    return called


def _lines(error: BaseException, *_: Any) -> list[str]:
    with skip_installed(error):  # IPython's own frames, which ran the cell
        return describe(error)[0].splitlines()
