"""What TeaCache and SeaCache share: a signal of the step, whose relative changes add up until a step is computed."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..site import ForwardContext
from .easy import mean_change, mean_size
from .engine import Decider, StepCacheHandler
from .ranks import ratio


@dataclass(slots=True)
class SignalDecider(Decider):
    """What is measured of a branch.

    Attributes:
        signal: of the last step; on the device.
        now: of this step, where it was taken to decide.
        total: what the steps since the last computed one add up to.
    """

    signal: Tensor | None = None
    now: Tensor | None = None
    total: float = 0.0


class SignalHandler(StepCacheHandler, ABC):
    """A cache on one model that skips steps while mean|s - s'| / mean|s'| of a signal adds up to little."""

    decider_type = SignalDecider

    @abstractmethod
    def signal(self, context: ForwardContext) -> Tensor:
        """Return the signal of a step, on the device."""

    def rescaled(self, context: ForwardContext, change: float) -> float:
        """Return what a relative change counts as."""
        return change

    def indicator(self, context: ForwardContext, decider: SignalDecider) -> float | None:
        """Return what the steps since the last computed one add up to, this one included; waits for the device."""
        if decider.signal is None:
            return None
        decider.now, before = self.signal(context), decider.signal
        change, size = self.numbers(context, mean_change(decider.now, before), mean_size(before))
        decider.total += self.rescaled(context, ratio(change, size))
        return decider.total

    def seen(self, context: ForwardContext, decider: SignalDecider) -> None:
        """Keep the signal, where it was taken."""
        decider.signal, decider.now = decider.now, None
        if not decider.reuse:
            decider.total = 0.0

    def computed(self, context: ForwardContext, decider: SignalDecider, output: Any) -> None:
        """Take the signal of a step that had to be computed, now that its weights are on the device."""
        if decider.signal is None:
            decider.signal = self.signal(context)
