"""torch._dynamo (what torch.compile runs on) imported when it is needed, not with the first optimizer.

Its import takes as long as that of the rest of torch, and some 80 MB. torch does it when the first optimizer is made,
for two functions that do nothing outside of compiled code: `disable`, which keeps a function of torch's own from being
compiled, and `graph_break`. A stand-in answers these; whatever else is asked of it loads the real module, which then
takes its place, so that torch.compile and all that builds on it work as ever.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

_NAME = "torch._dynamo"


def defer_dynamo() -> None:
    """Puts the stand-in in torch._dynamo's place, unless that is loaded already."""
    spec = importlib.util.find_spec(_NAME) if _NAME not in sys.modules else None
    if spec is None:
        return
    stand_in = _LazyModule(spec)
    sys.modules[_NAME] = torch._dynamo = stand_in
    sys.meta_path.insert(0, _Parts(stand_in))


class _LazyModule(ModuleType):
    """Looks like torch._dynamo, and becomes it."""

    def __init__(self, spec: importlib.machinery.ModuleSpec) -> None:
        super().__init__(_NAME)
        known = {"__spec__": spec, "__file__": spec.origin, "__path__": spec.submodule_search_locations}
        vars(self).update(known, _trusted=[])
        # DDP asks how to cut a net that is compiled; this is the default, which only the real module can change.
        vars(self)["utils"] = _LazyPart(self, "utils", get_optimize_ddp_mode=lambda: "ddp_optimizer")

    def graph_break(self, msg: str = "") -> None:
        """Does nothing where nothing is compiled."""
        if self._loaded():
            self.load().graph_break(msg)

    def disable(self, fn: Any = None, recursive: bool = True, **how: Any) -> Any:
        """Returns torch's own functions as they are, for as long as nothing is compiled."""
        if self._loaded() or fn is None or how != {"wrapping": False}:  # a user's: it must stay disabled
            return self.load().disable(fn, recursive, **how)
        self._trusted.append(fn)
        return fn

    def _loaded(self) -> bool:
        return sys.modules.get(_NAME) is not self

    def load(self) -> Any:
        """Returns the real module, imported now if it was not."""
        if not self._loaded():
            sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Parts)]
            del sys.modules[_NAME], torch._dynamo
            importlib.import_module(_NAME)
            for fn in self._trusted:  # torch asks the real one anew
                vars(fn).pop("__dynamo_disable", None)
        return sys.modules[_NAME]

    def __getattr__(self, name: str) -> Any:
        """Whatever is not known here."""
        if name.startswith("__"):  # what inspect and others look for in any module
            raise AttributeError(name)
        return getattr(self.load(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets it where it is looked for later."""
        if name.startswith("__"):
            vars(self)[name] = value
        else:
            setattr(self.load(), name, value)


class _LazyPart(SimpleNamespace):
    """A part of torch._dynamo of which a few functions are known."""

    def __init__(self, stand_in: _LazyModule, part: str, **known: Callable[..., Any]) -> None:
        super().__init__(**known)
        self._whole: Callable[[], Any] = stand_in.load
        self._part = part

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(self._whole(), self._part), name)


class _Parts(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """`import torch._dynamo.PART` loads the whole first, as it does without the stand-in."""

    def __init__(self, stand_in: _LazyModule) -> None:
        self._stand_in = stand_in
        self._specs: dict[str, Any] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Finds the part that came with the whole, which must not be loaded once more."""
        if not fullname.startswith(f"{_NAME}."):
            return None
        self._stand_in.load()
        if fullname not in sys.modules:
            return importlib.util.find_spec(fullname)
        self._specs[fullname] = sys.modules[fullname].__spec__
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Returns the module that is there."""
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """Leaves it as it is."""
        module.__spec__ = self._specs.pop(module.__name__)
