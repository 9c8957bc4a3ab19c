"""Whether a train step is one that DistributedDataParallel averages rightly: watched, and later held to.

DDP makes ready in a call of the net and averages each gradient as it arrives, once::

    call of the net -> backward, in which each trained parameter gets one gradient -> (again) -> optimizer step

Whatever else a step does (two backward passes over one graph, gradients past the net's own call, parameters that get
none) leaves gradients that are not averaged, or ranks that wait for one another.
"""

from __future__ import annotations


class Fit:
    """What one rank's train step has done so far.

    Args:
        names: of the parameters.

    Attributes:
        reason: in words, why DDP would not be right for it; None as long as it is.
        wary: why DDP, which is right for it, may still fail: each call of it overwrites the net's buffers, which torch
            may need for the backward pass of the call before.
        calls: of the net, since the last pass of gradients was whole.
        arrived: gradients of the pass that runs.
        idle: whether no gradient has arrived since `begin`.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._seen = bytearray(len(names))
        self._trained: list[int] = []
        self.begin([])

    def begin(self, trained: list[int]) -> None:
        """A micro-batch begins.

        Args:
            trained: the numbers of the parameters that are to get a gradient.
        """
        self._trained = trained
        self._clear()
        self.reason: str | None = None
        self.wary: str | None = None
        self.calls = 0
        self.idle = True

    def _clear(self) -> None:
        self._seen[:] = bytes(len(self._seen))
        self.arrived = 0

    def called(self) -> None:
        """The net is called, with gradients."""
        if self.arrived:
            self._finish()
        self.calls += 1
        if self.calls > 1:
            self.wary = "the model is called twice before a backward pass"

    def arrives(self, number: int) -> None:
        """A parameter gets a gradient."""
        self.idle = False
        if self._seen[number]:
            self._say("two backward passes bring gradients in a step, without a call of the model between them")
        elif not self.calls:
            self._say(
                "gradients come without a call of the model itself: of a part of it, such as model.encoder(x), or of a "
                "function of its weights"
            )
        self._seen[number] = 1
        self.arrived += 1

    def end(self) -> None:
        """The micro-batch ends, or its optimizer steps."""
        if self.arrived:
            self._finish()

    def _finish(self) -> None:
        if self.arrived != len(self._trained) and self.reason is None:
            missing = [self._names[number] for number in self._trained if not self._seen[number]]
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            self._say(
                f"{missing[0]}{more} got no gradient in a backward pass"
                if missing
                else "it changes in a step which parameters are trained"
            )
        self._clear()
        self.calls = 0

    def misfit(self, reason: str) -> None:
        """Notes something else that DDP would not be right for."""
        self._say(reason)

    def _say(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason
