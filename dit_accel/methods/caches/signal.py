"""What TeaCache and SeaCache share: a signal of the step, whose relative changes add up until a step is computed."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..site import ForwardContext
from .easy import mean_change, mean_size
from .engine import StepCacheHandler, StepDecision
from .ranks import ratio


@dataclass(slots=True)
class SignalDecision(StepDecision):
    """What is measured of a branch."""

    signal: Tensor | None = None  # of the last step; on the device
    now: Tensor | None = None  # of this step, where it was taken to decide
    total: float = math.nan  # what the steps since the last computed one add up to


class SignalHandler(StepCacheHandler, ABC):
    """A cache on one model that skips steps while mean|s - s'| / mean|s'| of a signal adds up to little."""

    decision_type = SignalDecision

    @abstractmethod
    def signal(self, context: ForwardContext) -> Tensor:
        """Return the signal of a step, on the device."""

    def rescaled(self, context: ForwardContext, change: float) -> float:
        """Return a relative change as it counts for the threshold."""
        return change

    def indicator(self, context: ForwardContext, decision: SignalDecision) -> float | None:
        """Return the changes of the steps since the last computed one, summed; waits for the device."""
        if decision.signal is None:
            return None
        decision.now, before = self.signal(context), decision.signal
        change, size = self.numbers(context, mean_change(decision.now, before), mean_size(before))
        decision.total += self.rescaled(context, ratio(change, size))
        return decision.total

    def seen(self, context: ForwardContext, decision: SignalDecision) -> None:
        decision.signal, decision.now = decision.now, None
        if not decision.reuse:
            decision.total = 0.0

    def computed(self, context: ForwardContext, decision: SignalDecision, output: Any) -> None:
        """Take the signal of a step that had to be computed, now that its weights are on the device."""
        if decision.signal is None:
            decision.signal = self.signal(context)
