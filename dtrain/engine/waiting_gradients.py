"""Which gradients wait for an optimizer's step, where a train step does not step on all of them by itself.

In most runs none ever waits. So it is watched in the first train steps, and from then on only where some did wait,
several optimizers step, or a train step takes none. To watch costs one call of a C function for each gradient.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.model.optimizers import optimizers_holding

_FIRST = 3  # train steps that are watched in any case


class WaitingGradients:
    """Follows the gradients of a net.

    Args:
        module: the net.

    Attributes:
        active: whether gradients can wait at all: not where dtrain itself steps on them.
        always: whether they are watched in each train step.
        came_last: whether a gradient has come in the last train step, as long as they are watched.
    """

    def __init__(self, module: nn.Module) -> None:
        self.active = True
        self.always = False
        self.came_last = False
        self._module = module
        # In the order of their coming: a parameter, each time that a gradient reaches it; an optimizer that stepped.
        self._log: list[Any] = []
        self._handles: list[Any] = []
        self._steps = 0
        self._optimizers: set[int] = set()
        self._unknown = False  # whether gradients may wait that came while nobody watched
        self._begun = 0

    @property
    def watching(self) -> bool:
        """Whether gradients are noted."""
        return bool(self._handles)

    def watch(self) -> None:
        """Notes the gradients from now on, also those of parameters that are frozen as yet."""
        if self._handles:
            return
        for parameter in self._module.parameters():
            trained = parameter.requires_grad
            if not (trained or (parameter.is_leaf and (parameter.is_floating_point() or parameter.is_complex()))):
                continue
            parameter.requires_grad_(True)  # without which torch takes no hook
            hooked: Any = parameter
            self._handles.append(hooked.register_post_accumulate_grad_hook(self._log.append))
            parameter.requires_grad_(trained)

    def leave(self) -> None:
        """No gradient of this run will ever wait."""
        self.active = False
        self._log.clear()
        self.unwatch()

    def unwatch(self) -> None:
        """Notes nothing any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(self) -> None:
        """A train step begins."""
        self._begun = len(self._log)

    def came(self) -> bool:
        """Whether a gradient has reached a parameter since the train step began, as long as it is watched."""
        return any(isinstance(one, Tensor) for one in self._log[self._begun :])

    def stepped(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped."""
        self._optimizers.add(id(optimizer))
        if self._handles:
            self._log.append(optimizer)

    def end(self, stepped: bool) -> None:
        """A train step is over.

        Args:
            stepped: whether an optimizer of the net's parameters stepped in it.
        """
        if not self.active:
            return
        if not self._handles:
            if not stepped:  # it is unusual from here on
                self.always = self._unknown = True
                self.watch()
            return
        self.came_last = self.came()
        log, self._begun = self._log, 0
        if log and isinstance(log[-1], Optimizer):
            if len(self._optimizers) == 1:  # what is not its own waits for nobody
                log.clear()
                self._unknown = False
            else:
                self._compress()
        elif log:
            self._compress()
        self._steps += 1
        self.always = self.always or bool(log)
        if not self.always and self._steps >= _FIRST:
            self.unwatch()

    def found(self, known: list[Optimizer]) -> dict[str, Tensor]:
        """Returns the gradients that wait, by the names of their parameters.

        Args:
            known: optimizers of the net; whether there are others is looked for where it matters.
        """
        waiting = {id(one) for one in self._log if isinstance(one, Tensor)}
        if self._unknown:
            waiting |= {id(p) for p in self._module.parameters()}
        held = {id(p) for optimizer in known for group in optimizer.param_groups for p in group["params"]}
        rest = waiting - held
        if rest and any(p.grad is not None for p in self._module.parameters() if id(p) in rest):
            others = optimizers_holding(rest)
            held |= {id(p) for optimizer in others for group in optimizer.param_groups for p in group["params"]}
        waiting &= held
        named = self._module.named_parameters()
        return {name: p.grad for name, p in named if id(p) in waiting and p.grad is not None}

    def put_back(self, gradients: dict[str, Tensor]) -> None:
        """Has gradients wait that did so when a run was saved."""
        parameters = dict(self._module.named_parameters())
        for name, gradient in gradients.items():
            parameters[name].grad = gradient
        if gradients:
            self.always = True
            self.watch()
            self._log += [parameters[name] for name in gradients]

    def _compress(self) -> None:
        """Keeps of the log the parameters alone whose gradients wait, each once."""
        waiting: dict[int, Any] = {}
        for one in self._log:
            if isinstance(one, Tensor):
                waiting[id(one)] = one
                continue
            for group in one.param_groups:
                for parameter in group["params"]:
                    waiting.pop(id(parameter), None)
        self._log[:] = [p for p in waiting.values() if p.grad is not None]
