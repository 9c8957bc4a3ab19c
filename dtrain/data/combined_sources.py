"""The parts of several loaders, as those of one: each loader's under its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtrain.data.sources import Sources, State


class CombinedSources(Sources):
    """The parts of several loaders in this process.

    Args:
        loader: the loaders together.
        children: name -> the parts of one.
    """

    def __init__(self, loader: Any, children: Mapping[str, Sources], *, same: bool = False) -> None:
        self._children = dict(children)
        super().__init__(loader, same=same)

    @property
    def kept(self) -> bool:
        """Whether somebody keeps the states."""
        return all(child.kept for child in self._children.values())

    @kept.setter
    def kept(self, kept: bool) -> None:
        for child in self._children.values():
            child.kept = kept

    @property
    def began(self) -> dict[str, State]:
        """What `states` returned as the epoch began."""
        return _joined({name: child.began for name, child in self._children.items()})

    @began.setter
    def began(self, states: Mapping[str, State]) -> None:
        for name, child in self._children.items():
            child.began = _own(states, name)

    def enter(self, epoch: int) -> None:
        """An epoch begins: the states are noted, and the parts told of the epoch."""
        for child in self._children.values():
            child.enter(epoch)

    def begin(self, epoch: int) -> None:
        """A pass begins; enters its epoch where that was not done for this pass."""
        for child in self._children.values():
            child.begin(epoch)

    def stateful(self) -> dict[str, Any]:
        """Returns, by name, the parts that have a state."""
        return _joined({name: child.stateful() for name, child in self._children.items()})

    def states(self, *, datasets: bool = False) -> dict[str, State]:
        """Returns copies of the parts' states by name; see `Sources.states`."""
        return _joined({name: child.states(datasets=datasets) for name, child in self._children.items()})

    def after_epoch(self) -> dict[str, State]:
        """Returns the states with which the next epoch begins."""
        return _joined({name: child.after_epoch() for name, child in self._children.items()})

    def load(self, states: Mapping[str, State]) -> None:
        """Puts back what `states` returned."""
        for name, child in self._children.items():
            child.load(_own(states, name))

    def rewind(self) -> None:
        """Puts the datasets back to where they were when the epoch began."""
        for child in self._children.values():
            child.rewind()

    @property
    def replays(self) -> bool:
        """Whether a resumed epoch reads what was read before."""
        return any(child.replays for child in self._children.values())

    def check(self, split: str) -> None:
        """Looks for a state that cannot be had; see `Sources.check`."""
        for name, child in self._children.items():
            child.check(f"{split}.{name}")


def _joined(by_name: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{name}.{key}" if key else name: value for name, found in by_name.items() for key, value in found.items()}


def _own(states: Mapping[str, State], name: str) -> dict[str, State]:
    """The states of one loader's parts, by the names that these have there."""
    return {key.partition(".")[2]: state for key, state in states.items() if key.partition(".")[0] == name}
