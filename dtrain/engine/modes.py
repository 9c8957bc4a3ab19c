"""Which modules of a net train, and which stay in eval mode, from epoch to epoch.

A net that is in train mode as it is built keeps those of its modules in eval mode that are so: a teacher, a frozen
body, a BatchNorm whose statistics shall stay. What a step or a hook changes holds for the epochs after it, too, and
where the same net is trained once more. Of another net that is in eval mode itself, as Hugging Face's `from_pretrained`
returns it, all modules train.
"""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

from torch import nn

logger = logging.getLogger(__name__)

_MOST_NAMED = 3
# Validation leaves a net in eval mode as a whole, in which nothing shows what was so while it trained.
_trained_before: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()


class Modes:
    """The modes of a net's modules.

    Args:
        module: the net, as its builder left it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._kept = self._in_eval() if module.training else set(_trained_before.get(module, ()))

    def train(self, *, warns: bool = False) -> None:
        """Puts the net into train mode, but for the modules that are to stay in eval mode.

        Args:
            warns: whether a warning names those of them that train all the same.
        """
        self._module.train()
        for name, part in self._module.named_modules():
            if name in self._kept:
                part.training = False
        if warns:
            self._warn()

    def ensure(self) -> None:
        """Does so where the net is in eval mode, as validation leaves it; else a hook may have changed modes."""
        if not self._module.training:
            self.train()

    def note(self) -> None:
        """Takes the modes at a train pass's end for those of the epochs to come.

        Not later: what `after_epoch` does with the modes, as a helper that samples from the net and puts it back into
        train mode as a whole, is no change of how it trains.
        """
        if self._module.training:
            self._kept = self._in_eval()
            _trained_before[self._module] = frozenset(self._kept)

    def state(self, *, within: bool) -> list[str]:
        """Returns the names of the modules in eval mode, for a checkpoint. Changes nothing: it is rank 0 that asks.

        Args:
            within: whether a train pass runs, so that the present modes are those of training.
        """
        return sorted(self._in_eval() if within and self._module.training else self._kept)

    def load(self, names: list[str]) -> None:
        """Puts back what `state` returned."""
        self._kept = set(names)

    def _in_eval(self) -> set[str]:
        return {name for name, part in self._module.named_modules() if not part.training}

    def _warn(self) -> None:
        idle = [
            name
            for name, part in self._module.named_modules()
            if name in self._kept
            and not any(name.startswith(f"{above}.") for above in self._kept)
            and any(p.requires_grad for p in part.parameters())
            and any(_draws(one) for one in part.modules())
        ]
        if idle:
            named = ", ".join(idle[:_MOST_NAMED]) + ", ..." * (len(idle) > _MOST_NAMED)
            logger.warning(
                "%s: trained in eval mode, as the model was built: without dropout, and with BatchNorm's running "
                "statistics. If that is not meant, call model.train() after building the model.",
                named,
            )


def _draws(module: nn.Module) -> bool:
    """Whether a module does something else in train mode."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
