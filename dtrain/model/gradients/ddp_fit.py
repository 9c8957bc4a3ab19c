"""Whether a train step is one that DistributedDataParallel averages rightly: watched, and later held to.

DDP makes ready in a call of the net and averages each gradient as it arrives, once::

    call of the net -> backward, in which each trained parameter gets one gradient -> (again) -> optimizer step

Whatever else a step does (two backward passes over one graph, gradients past the net's own call, parameters that get
none) leaves gradients that are not averaged, or ranks that wait for one another.
"""

from __future__ import annotations


class DdpFit:
    """What one rank's train step has done so far.

    Args:
        names: of the parameters.

    Attributes:
        reason: in words, why DDP would not be right for it; None as long as it is.
        wary: why DDP, which is right for it, may still fail: each call of it overwrites the net's buffers, which torch
            may need for the backward pass of the call before.
        seen: of each parameter, whether it got a gradient since the net was called.
        idle: whether no gradient has arrived since `begin`.
        lacking: the numbers of the parameters that got no gradient in the last pass, where that is all that is amiss.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self.seen = bytearray(len(names))
        self._trained: list[int] = []
        self.lacking: list[int] = []
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
        self._calls = 0
        self.idle = True

    def _clear(self) -> None:
        self.seen[:] = bytes(len(self.seen))
        self._arrived = 0

    def called(self) -> None:
        """The net is called, with gradients."""
        if self._arrived:
            self._clear()
            self._calls = 0
        self._calls += 1
        if self._calls > 1:
            self.wary = "the model is called twice before a backward pass"

    def arrives(self, number: int) -> None:
        """A parameter gets a gradient."""
        self.idle = False
        if self.seen[number]:
            self.misfit("two backward passes bring gradients in a step, without a call of the model between them")
        elif not self._calls:
            self.misfit(
                "gradients come without a call of the model itself: of a part of it, such as model.encoder(x), or of a "
                "function of its weights"
            )
        self.seen[number] = 1
        self._arrived += 1

    def passed(self) -> None:
        """A backward pass ends."""
        self.lacking = []
        if self._arrived == len(self._trained):
            return
        lacking = [number for number in self._trained if not self.seen[number]]
        missing = [self._names[number] for number in lacking]
        self.lacking = lacking if self.reason is None else []
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        self.misfit(
            f"{missing[0]}{more} got no gradient in a backward pass"
            if missing
            else "it changes in a step which parameters are trained"
        )

    def misfit(self, reason: str) -> None:
        """Notes why DDP would not be right for the step."""
        if self.reason is None:
            self.reason = reason
